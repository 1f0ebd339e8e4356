"""One rank of the fixture run_in_ranks. See pytest_plugin.py.

A rank with an interpreter of its own is `python -m vllm_npu.emulator.rank_program FOLDER`; a forked rank calls run().
"""

import importlib
import importlib.util
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

FUNCTION, ARGUMENTS = "function", "arguments"  # files that pytest writes to the folder


@dataclass(frozen=True, slots=True)
class RankFunction:
    """The function that each rank calls, and where pytest has it from."""

    module: str
    file: str
    function: str
    search_path: list[str]  # pytest's sys.path


def result_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}"


def load_module(name: str, file: str) -> ModuleType:
    """The module that pytest imported from the file, under the same name, because pickled objects refer to that name."""
    try:
        module = importlib.import_module(name)
        if module.__file__ is not None and Path(module.__file__).samefile(file):
            return module
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
    # With --import-mode=importlib, pytest made the name up, and the packages in the name may not exist.
    packages = name.split(".")[:-1]
    for depth in range(1, len(packages) + 1):
        package = ".".join(packages[:depth])
        sys.modules.setdefault(package, ModuleType(package))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(folder: Path) -> None:
    """Calls the function as the rank that the environment names, and writes what it returns to the folder."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wanted: RankFunction = pickle.loads((folder / FUNCTION).read_bytes())
    sys.path += [entry for entry in wanted.search_path if entry not in sys.path]

    import torch
    import torch_npu

    torch_npu.npu.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("hccl")
    function = getattr(load_module(wanted.module, wanted.file), wanted.function)
    returned = function(rank, num_ranks, *pickle.loads((folder / ARGUMENTS).read_bytes()))
    result_file(folder, rank).write_bytes(pickle.dumps(returned))
    torch.distributed.destroy_process_group()


def main() -> None:
    run(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking torch and torch_npu down in good order takes a second


if __name__ == "__main__":
    main()
