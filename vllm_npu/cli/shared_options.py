"""Options that several commands have: the numbers of a layer and of its ranks."""

from typing import Annotated

import typer

from vllm_npu.tools.layers import DTYPES

Ranks = Annotated[int, typer.Option(min=1, max=16, help="Ranks to start on this machine.")]
SeveralRanks = Annotated[int, typer.Option(min=2, max=16, help="Ranks to start on this machine.")]
Experts = Annotated[int, typer.Option(min=1, help="Experts of the layer.")]
TopK = Annotated[int, typer.Option(min=1, help="Experts for each token.")]
HiddenSize = Annotated[int, typer.Option(min=1, help="hidden_size of the model.")]
Dtype = Annotated[str, typer.Option(help=f"dtype of hidden states: {', '.join(DTYPES)}.")]
