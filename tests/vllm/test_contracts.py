"""Our classes have the names and signatures of the classes of vLLM that they replace, on CPUs and on GPUs."""

import pytest

from tests import contracts
from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.plugin import release_lines

FURTHER = 3  # comparisons that are no row of CONTRACTS


def test_our_classes_can_stand_in_for_vllms():
    faults = contracts.run(VLLM_PLUGINS="vllm_npu")
    assert len(faults) == len(contracts.here()) + FURTHER
    assert {name: found for name, found in faults.items() if found} == {}


# vLLM 0.23's classes were compared in tests/ascend, where it is installed.
BY_CONTRACT = [line for line in release_lines.CUDA_LINES if line not in release_lines.SUPPORTED]


@pytest.mark.nightly  # downloads 340 MB
@pytest.mark.timeout(4 * PATIENCE_SECONDS)
@pytest.mark.parametrize("line", BY_CONTRACT)
def test_our_classes_can_stand_in_for_those_of_a_line_that_only_gpus_run(line):
    faults = contracts.run(f"{line}.0", seconds=3 * PATIENCE_SECONDS, VLLM_PLUGINS="")
    assert len(faults) == len(contracts.here(line)) + FURTHER
    assert {name: found for name, found in faults.items() if found} == {}


def test_a_class_without_vllms_base_is_found_out():
    from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase

    from vllm_npu.all2all import All2AllManager

    faults = contracts.faults_of(All2AllManager, All2AllManagerBase)
    assert {"support_fault_tolerance is missing", "combine_into_output is missing"} <= set(faults)

    class Renamed(All2AllManagerBase):
        def dispatch(self, hidden_states, weights, ids, is_sequence_parallel=False, extra_tensors=None):
            raise AssertionError

        def max_sms_used(self, limit):
            raise AssertionError

    faults = contracts.faults_of(Renamed, All2AllManagerBase)
    assert [each.partition(":")[0] for each in faults] == ["dispatch"] * 4 + ["max_sms_used"]
