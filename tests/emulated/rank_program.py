"""One rank of conftest.run_in_ranks: rank_program.py MODULE:FUNCTION FOLDER."""

import importlib
import os
import pickle
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    module_name, function_name = sys.argv[1].split(":")
    folder = Path(sys.argv[2])
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    import torch
    import torch_npu  # noqa: F401

    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("hccl")
    function = getattr(importlib.import_module(module_name), function_name)
    returned = function(rank, num_ranks, *pickle.loads((folder / "arguments").read_bytes()))
    (folder / f"rank{rank}").write_bytes(pickle.dumps(returned))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
