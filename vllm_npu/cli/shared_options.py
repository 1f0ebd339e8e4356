"""Options of a layer and its ranks that several commands take, so that they read and mean the same in each."""

from typing import Annotated

import typer

from vllm_npu.tools.layers import DTYPES

Ranks = Annotated[int, typer.Option(min=1, max=16, help="Ranks to start on this machine.")]
SeveralRanks = Annotated[int, typer.Option(min=2, max=16, help="Ranks to start on this machine.")]
Experts = Annotated[int, typer.Option(min=1, help="Experts of the layer.")]
TopK = Annotated[int, typer.Option(min=1, help="Experts a token.")]
HiddenSize = Annotated[int, typer.Option(min=1, help="hidden_size.")]
Dtype = Annotated[str, typer.Option(help=f"Of hidden states: {', '.join(DTYPES)}.")]
