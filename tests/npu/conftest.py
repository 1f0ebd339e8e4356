"""One process for each NPU of this machine, over HCCL."""

from collections.abc import Iterator

import pytest

from vllm_npu.tools.launch import ProcessRankPool, RankPool

RANKS = (2, 4, 8)


def num_npus() -> int:
    """Return the number of NPUs that torch_npu sees. It is 0 without torch_npu or CANN."""
    try:
        import torch_npu
    except ImportError:
        return 0
    return torch_npu.npu.device_count()


NUM_NPUS = num_npus()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needed = item.callspec.params.get("npus", 1) if hasattr(item, "callspec") else 1
        if item.get_closest_marker("npu") and needed > NUM_NPUS:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {needed} Ascend NPUs, CANN and torch_npu; found {NUM_NPUS}")
            )


@pytest.fixture(scope="module", params=RANKS)
def npus(request) -> Iterator[RankPool]:
    with ProcessRankPool(request.param, timeout=300, transport="hccl") as pool:
        yield pool
