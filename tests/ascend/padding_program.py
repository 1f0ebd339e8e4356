"""Asks vllm-ascend's own runner on two data-parallel ranks how they pad a step, before and after agree_on_padding.

    python -m vllm_npu.emulator run --nproc 2 --soc A3 tests/ascend/padding_program.py '{"tp": 1, "dp": 2, ...}'

`tokens` are those of each rank. Each of `cases` has the CUDAGraphMode that each rank could run alone, as [["NONE", "FULL"]].
Each rank prints one JSON line. For every case it has the token counts that the runner returns, and the mode that all ranks
agreed on.
"""

import json
import os
import sys
from typing import Any

from tests.ascend.layer_program import Sizes, make_layers


def main(given: dict[str, Any]) -> None:
    """Ask before and after, and print both answers."""
    rank = int(os.environ["RANK"])
    config, _ = make_layers(given, [Sizes(given["hidden"], given["experts"], given["top_k"])])

    from vllm.config import CUDAGraphMode, set_current_vllm_config
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    from vllm_npu.plugin import compat

    # The runner's constructor needs a whole model. The method under test reads these attributes only.
    runner = NPUModelRunner.__new__(NPUModelRunner)
    runner.vllm_config, runner.ascend_config = config, get_ascend_config()
    runner.dp_size, runner.dp_rank = given["dp"], rank

    def ask(case: list[str]) -> dict[str, Any]:
        # As the runner does: a rank pads if it could replay a graph.
        mode = CUDAGraphMode[case[rank]]
        _, counts, agreed = runner._sync_metadata_across_dp(
            given["tokens"][rank], cudagraph_mode=mode, allow_dp_padding=mode is not CUDAGraphMode.NONE
        )
        return {"counts": counts.tolist(), "agreed": agreed.name}

    with set_current_vllm_config(config):
        before = [ask(case) for case in given["cases"]]
        compat.current().agree_on_padding(runner)
        print(json.dumps({"rank": rank, "before": before, "after": [ask(case) for case in given["cases"]]}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
