"""Our classes have the names and signatures of the classes of vLLM and vllm-ascend that they replace, on each release line."""

from tests import contracts
from tests.ascend.test_layer import PLUGINS


def test_our_classes_can_stand_in_for_vllms_and_vllm_ascends():
    faults = contracts.run(VLLM_PLUGINS=PLUGINS, VLLM_NPU_EMULATOR="1", TORCHDYNAMO_DISABLE="1")
    assert {name: found for name, found in faults.items() if found} == {}
    assert sum("vllm_ascend" in name for name in faults) == 3
    assert len(faults) == len(contracts.here()) + 3
