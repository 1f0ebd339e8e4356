"""Our classes have the names and signatures of the classes of vLLM 0.32 that they replace, on CPUs and on GPUs."""

from tests import contracts


def test_our_classes_can_stand_in_for_vllms():
    faults = contracts.run(VLLM_PLUGINS="vllm_npu")
    assert len(faults) == len(contracts.here()) + 2
    assert {name: found for name, found in faults.items() if found} == {}


def test_a_class_without_vllms_base_is_found_out():
    from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase

    from vllm_npu.all2all import All2AllManager

    faults = contracts.faults_of(All2AllManager, All2AllManagerBase)
    assert {"support_fault_tolerance is missing", "allocate_combine_input is missing"} <= set(faults)

    class Renamed(All2AllManagerBase):
        def dispatch(self, hidden_states, weights, ids, is_sequence_parallel=False, extra_tensors=None):
            raise AssertionError

        def max_sms_used(self, limit):
            raise AssertionError

    faults = contracts.faults_of(Renamed, All2AllManagerBase)
    assert [each.partition(":")[0] for each in faults] == ["dispatch"] * 4 + ["max_sms_used"]
