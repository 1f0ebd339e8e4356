"""What vLLM's built layers say of themselves decides, before the first step, whether an exchange on GPUs can carry them.

The layers' configurations, methods, kernels and experts are vLLM's own. Nothing computes, so no GPU is needed.
"""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import MoEPrepareAndFinalizeNaiveDPEPModular

from vllm_npu.core.topology import ParallelTopology
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.gpu.layer_check import check_layers
from vllm_npu.plugin.options import Options

FP8 = FusedMoEQuantConfig.make(torch.float8_e4m3fn, block_shape=[128, 128])
STATIC = FusedMoEQuantConfig.make(torch.float8_e4m3fn, a1_scale=torch.ones(1))


class Method(FusedMoEMethodBase):
    """A method of a layer that computes nothing. vLLM's own choose a backend, and know none for these sizes without a GPU."""

    def create_weights(self, *_: object, **__: object) -> None:
        raise NotImplementedError

    def apply(self, *_: object, **__: object) -> torch.Tensor:
        raise NotImplementedError

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig | None:
        return self.moe_quant_config


def layer(
    *,
    tp: int = 1,
    dp: int = 2,
    sliced: bool = False,
    hidden_size: int = 256,
    quantised: FusedMoEQuantConfig | None = None,
) -> torch.nn.Module:
    """A layer as vLLM leaves it after loading: a module with a method, which has a kernel with experts."""
    parallel = FusedMoEParallelConfig(
        tp_size=1, pcp_size=1, dp_size=dp, ep_size=tp * dp, tp_rank=0, pcp_rank=0, dp_rank=0, ep_rank=0,
        sp_size=tp if sliced else 1, use_ep=True, all2all_backend="allgather_reducescatter", enable_eplb=False,
    )  # fmt: skip
    config = FusedMoEConfig(
        num_experts=8, experts_per_token=2, hidden_dim=hidden_size, intermediate_size=64, num_local_experts=8 // (tp * dp),
        num_logical_experts=8, activation=MoEActivation.SILU, device="cpu", routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel, in_dtype=torch.bfloat16,
    )  # fmt: skip
    method = Method(config)
    method.moe_quant_config = quantised or FUSED_MOE_UNQUANTIZED_CONFIG
    method.moe_kernel = mk.FusedMoEKernel(
        MoEPrepareAndFinalizeNaiveDPEPModular(is_sequence_parallel=sliced, num_dispatchers=tp * dp),
        TritonExperts(config, method.moe_quant_config),
    )
    module = torch.nn.Module()
    module.quant_method = method
    return module


def check(built: torch.nn.Module, *, tp: int = 1, **options: str) -> None:
    topology = ParallelTopology.of_rank(0, tp_size=tp, dp_size=2, expert_parallel=True)
    config = VllmConfig()
    config.additional_config = {"vllm_npu": options}
    check_layers([torch.nn.Linear(1, 1), built], Options.of(config), topology)


@pytest.mark.parametrize(
    ("facts", "tp", "options", "message"),
    [
        ({"tp": 2}, 2, {"moe_comm": "symmetric"}, "symmetric completes the sum over TP"),
        ({"tp": 2}, 2, {"moe_comm": "mc2"}, "mc2 completes the sum over TP"),
        ({"tp": 2}, 2, {"moe_comm": "all2all"}, "choose allgather or naive"),
        ({"quantised": FP8}, 1, {"moe_comm": "mc2"}, "mc2 does not send what quantised experts need"),
        ({"quantised": FP8}, 1, {"all2all": "pplx"}, "without the scales of this model's quantised experts"),
        ({"hidden_size": 255}, 1, {"moe_comm": "symmetric"}, "rows of a multiple of 4 bytes, not 510"),
        (
            {"hidden_size": 254, "quantised": FP8},
            1,
            {"moe_comm": "symmetric"},
            "rows of a multiple of 4 bytes, not 254",
        ),
    ],
)
def test_what_an_exchange_cannot_carry_is_refused(facts, tp, options, message):
    with pytest.raises(UnsupportedConfigError, match=message):
        check(layer(**facts), tp=tp, **options)


@pytest.mark.parametrize(
    ("facts", "tp", "options"),
    [
        ({"tp": 2, "sliced": True}, 2, {"moe_comm": "symmetric"}),
        ({"quantised": FP8}, 1, {"moe_comm": "all2all"}),
        ({"tp": 2}, 2, {"moe_comm": "auto"}),
        ({"tp": 2}, 2, {"moe_comm": "allgather"}),
        ({"tp": 2}, 2, {"all2all": "agrs"}),
        ({"tp": 2}, 2, {}),
        ({"quantised": FP8}, 1, {"moe_comm": "symmetric"}),
        ({"quantised": FP8}, 1, {"moe_comm": "naive"}),
        ({"quantised": STATIC}, 1, {"moe_comm": "mc2"}),
        ({"quantised": STATIC}, 1, {"all2all": "pplx"}),
        ({"hidden_size": 254}, 1, {"moe_comm": "symmetric"}),
        ({"hidden_size": 255}, 1, {"moe_comm": "auto"}),
    ],
)
def test_what_it_can_carry_is_left_alone(facts, tp, options):
    check(layer(**facts), tp=tp, **options)
