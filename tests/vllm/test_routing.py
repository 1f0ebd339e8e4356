"""Every routing scheme of vLLM's models on a CPU against transformers' own routers. vLLM's CPU router is wrong for some."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

from vllm_npu.core.configured_routing import SCORE_NAMES, why_not_routed
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.cpu.routing import SCORES, CpuMoERouter, RoutingScheme, router_for_cpu, why_not_used

EXPERTS, TOP_K, VOCABULARY, ROWS = 16, 4, 32, 64

Routed = tuple[torch.Tensor, torch.Tensor]  # weights and ids, each [rows, top_k]


@dataclass(frozen=True)
class Case:
    """A router of transformers, and what vLLM's model of the same family asks vLLM's router for."""

    name: str
    theirs: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Routed]  # of logits, bias and token ids
    asked: dict[str, Any]
    biased: bool = False
    hashed: bool = False
    top_k: int = TOP_K
    by_logits: bool = False  # transformers compares logits, not scores; the scores of extreme logits would all be 1
    eps: float = 0.0  # by which the family's denominator differs from its neighbours', relative to the weights
    needs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def router_of(family: str, class_name: str, **settings: Any) -> Any:
    """A router of transformers whose logits are its input."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    config = SimpleNamespace(
        num_experts_per_tok=TOP_K,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        n_routed_experts=EXPERTS,
        hidden_size=EXPERTS,
        **settings,
    )
    router = getattr(module, class_name)(config)
    for linear in (router, getattr(router, "gate", None), getattr(router, "classifier", None)):
        if getattr(linear, "weight", None) is not None:
            linear.weight = torch.nn.Parameter(torch.eye(EXPERTS), requires_grad=False)
    return router


def plain(family: str, class_name: str, **settings: Any) -> Callable[..., Routed]:
    """A router that returns logits, weights and ids, and holds its bias itself."""

    def route(logits: torch.Tensor, bias: torch.Tensor, _: torch.Tensor) -> Routed:
        router = router_of(family, class_name, **settings)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias = bias
        if hasattr(router, "moe_statics"):
            router.moe_statics.e_score_correction_bias.data[:] = bias
        _, weights, ids = router(logits)
        return weights, ids

    return route


def with_bias_argument(family: str, class_name: str, **settings: Any) -> Callable[..., Routed]:
    def route(logits: torch.Tensor, bias: torch.Tensor, _: torch.Tensor) -> Routed:
        _, weights, ids = router_of(family, class_name, **settings)(logits, bias)
        return weights, ids

    return route


def afmoe(logits: torch.Tensor, bias: torch.Tensor, _: torch.Tensor) -> Routed:
    _, weights, ids = router_of("afmoe", "AfmoeTokenChoiceRouter", route_scale=2.5)(logits[None], bias)
    return weights, ids


def hashed(logits: torch.Tensor, _: torch.Tensor, token_ids: torch.Tensor) -> Routed:
    settings = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "vocab_size": VOCABULARY}
    router = router_of("deepseek_v4", "DeepseekV4HashRouter", **settings)
    router.tid2eid = hash_table().long()
    _, weights, ids = router(logits, token_ids)
    return weights, ids


def llama4(logits: torch.Tensor, *_: torch.Tensor) -> Routed:
    scores, _ = router_of("llama4", "Llama4Router")(logits)
    weights, ids = scores.topk(TOP_K, dim=-1)
    return weights, ids


def hash_table() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(VOCABULARY)]).int()


def llama4_function() -> Callable[..., Any]:
    from vllm.model_executor.models.llama4 import Llama4MoE

    return Llama4MoE.custom_routing_function


def cohere_function() -> Callable[..., Any]:
    from vllm.model_executor.models.cohere2_moe import token_choice_with_bias

    return token_choice_with_bias


def phimoe_function() -> Callable[..., Any]:
    from vllm.model_executor.models.phimoe import phimoe_routing_function

    return phimoe_routing_function


def phimoe(logits: torch.Tensor, *_: torch.Tensor) -> Routed:
    module = import_module("transformers.models.phimoe.modeling_phimoe")
    return module.sparsemixer(logits, jitter_eps=0.01, training=False, top_k=2)


GROUPS = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
ONE_GROUP = {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
SIGMOID, ROOT_SOFTPLUS = {"scoring_func": "sigmoid"}, {"scoring_func": "sqrtsoftplus"}
DEEPSEEK_GROUPS, GREEDY = {"n_group": 4, "topk_group": 2}, {"n_group": 1, "topk_group": 1}
COHERE = {"expert_selection_fn": "sigmoid"}

CASES = [
    Case("mixtral", plain("mixtral", "MixtralTopKRouter"), {}),
    Case("qwen3-moe", plain("qwen3_moe", "Qwen3MoeTopKRouter", norm_topk_prob=True), {}),
    Case(
        "qwen3-moe, no renormalising",
        plain("qwen3_moe", "Qwen3MoeTopKRouter", norm_topk_prob=False),
        {"renormalize": False},
    ),
    Case(
        "deepseek-v2",
        plain(
            "deepseek_v2",
            "DeepseekV2TopkRouter",
            routed_scaling_factor=1.5,
            topk_method="group_limited_greedy",
            **DEEPSEEK_GROUPS,
        ),
        GROUPS | {"renormalize": False, "routed_scaling_factor": 1.5},
    ),
    Case(  # as BailingMoE asks
        "softmax scaled, no groups",
        plain("deepseek_v2", "DeepseekV2TopkRouter", routed_scaling_factor=2.5, topk_method="greedy", **GREEDY),
        {"renormalize": False, "routed_scaling_factor": 2.5},
    ),
    *(
        Case(
            f"{family}, {name}",
            plain(family, class_name, routed_scaling_factor=2.5, norm_topk_prob=norm, **groups),
            SIGMOID | asked | {"renormalize": norm, "routed_scaling_factor": 2.5},
            biased=True,
        )
        for family, class_name in (
            ("deepseek_v3", "DeepseekV3TopkRouter"),
            ("glm4_moe", "Glm4MoeTopkRouter"),
            ("exaone_moe", "ExaoneMoeTopkRouter"),
        )
        for name, norm, groups, asked in (
            ("groups", True, DEEPSEEK_GROUPS, GROUPS),
            ("groups, no renormalising", False, DEEPSEEK_GROUPS, GROUPS),
            ("one group", True, GREEDY, ONE_GROUP),
            ("no groups", True, GREEDY, {}),
        )
    ),
    Case("minimax-m2", with_bias_argument("minimax_m2", "MiniMaxM2TopKRouter"), SIGMOID, biased=True),
    Case(
        "sigmoid, no groups, no bias",
        plain("cohere2_moe", "Cohere2MoeTopKRouter", norm_topk_prob=True, **COHERE),
        SIGMOID,
        by_logits=True,
    ),
    Case(
        "sigmoid, no groups, no bias, no renormalising",
        plain("cohere2_moe", "Cohere2MoeTopKRouter", norm_topk_prob=False, **COHERE),
        SIGMOID | {"renormalize": False},
        by_logits=True,
    ),
    Case(
        "cohere2-moe, its own function",
        plain("cohere2_moe", "Cohere2MoeTopKRouter", norm_topk_prob=True, **COHERE),
        {},
        by_logits=True,
        needs={"custom_routing_function": cohere_function},
    ),
    Case("ernie-4.5", plain("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", moe_norm_min=1e-12), {}, biased=True),
    Case(
        "longcat-flash without zero experts",
        plain("longcat_flash", "LongcatFlashTopkRouter", routed_scaling_factor=6.0, zero_expert_num=0),
        {"renormalize": False, "routed_scaling_factor": 6.0},
        biased=True,
    ),
    Case(
        "deepseek-v4",
        plain("deepseek_v4", "DeepseekV4TopKRouter", scoring_func="sqrtsoftplus", routed_scaling_factor=1.5),
        ROOT_SOFTPLUS | {"routed_scaling_factor": 1.5},
        biased=True,
    ),
    Case("deepseek-v4, by token id", hashed, ROOT_SOFTPLUS | {"routed_scaling_factor": 1.5}, hashed=True),
    Case(
        "lfm2-moe",
        with_bias_argument(
            "lfm2_moe", "Lfm2MoeTopKRouter", norm_topk_prob=True, routed_scaling_factor=1.5, use_expert_bias=True
        ),
        SIGMOID | ONE_GROUP | {"routed_scaling_factor": 1.5},
        biased=True,
        eps=1e-5,  # its denominator is larger by 1e-6
    ),
    Case("afmoe", afmoe, SIGMOID | ONE_GROUP | {"routed_scaling_factor": 2.5}, biased=True),
    Case("llama4", llama4, {"renormalize": False}, needs={"custom_routing_function": llama4_function}),
    Case("phimoe", phimoe, {"renormalize": False}, needs={"custom_routing_function": phimoe_function}, top_k=2),
]


def logits_of(kind: str) -> torch.Tensor:
    """[ROWS, EXPERTS]. Tied logits are whole numbers, so that many experts of a row have the same score."""
    generator = torch.Generator().manual_seed(5)
    if kind == "tied":
        return torch.randint(-3, 4, (ROWS, EXPERTS), generator=generator).float()
    scale = {"random": 2.0, "extreme": 30.0}[kind]
    return torch.randn(ROWS, EXPERTS, generator=generator) * scale


def as_matrix(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[rows, EXPERTS]: the weight of each expert. The order of a row's experts does not count."""
    return torch.zeros(weights.shape[0], EXPERTS).scatter_(1, ids.long(), weights.float())


def ours(case: Case, logits: torch.Tensor, bias: torch.Tensor, token_ids: torch.Tensor) -> Routed:
    """Route by the router that vLLM makes and our runner replaces."""
    made = {name: make() for name, make in case.needs.items()}
    router = router_for_cpu(
        create_fused_moe_router(
            top_k=case.top_k,
            global_num_experts=EXPERTS,
            e_score_correction_bias=bias if case.biased else None,
            hash_indices_table=hash_table() if case.hashed else None,
            **{**case.asked, **made},
        )
    )
    hidden_states = torch.zeros(logits.shape[0], 8)
    weights, ids = router.select_experts(
        hidden_states, logits, topk_indices_dtype=torch.int32, input_ids=token_ids if case.hashed else None
    )
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert weights.shape == ids.shape == (logits.shape[0], case.top_k)
    return weights, ids


@pytest.mark.parametrize("kind", ["random", "tied", "extreme"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_go_where_transformers_sends_them(case: Case, kind: str):
    logits = logits_of(kind) / (10 if case.by_logits and kind == "extreme" else 1)
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(7)) * 0.3
    token_ids = torch.arange(ROWS) % VOCABULARY
    expected = as_matrix(*case.theirs(logits.clone(), bias, token_ids))
    got = as_matrix(*ours(case, logits, bias, token_ids))
    torch.testing.assert_close(got, expected, rtol=max(2e-6, case.eps), atol=max(1e-7, case.eps))


def test_a_token_is_routed_alike_in_every_batch():
    logits, bias = logits_of("random"), torch.zeros(EXPERTS)
    token_ids = torch.arange(ROWS) % VOCABULARY
    for case in CASES:
        whole = as_matrix(*ours(case, logits, bias, token_ids))
        for rows in (slice(0, 1), slice(5, 9), slice(0, 0)):
            torch.testing.assert_close(
                as_matrix(*ours(case, logits[rows], bias, token_ids[rows])), whole[rows], rtol=1e-6, atol=1e-7
            )


def test_logits_of_16_bits_are_scored_in_32():
    """As transformers does. vLLM's own router takes the softmax in 16 bits, and its weights add up to 1 only roughly."""
    logits = logits_of("random").bfloat16()
    weights, ids = ours(CASES[0], logits, torch.zeros(EXPERTS), torch.zeros(ROWS, dtype=torch.long))
    expected = as_matrix(*CASES[0].theirs(logits.float(), torch.zeros(EXPERTS), torch.zeros(ROWS)))
    torch.testing.assert_close(as_matrix(weights, ids), expected, rtol=2e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts_per_tok": 8, "scoring_func": "sigmoid", "zero_expert_num": 0, "zero_expert_type": None}, None),
        ({"zero_expert_num": 256, "zero_expert_type": "identity"}, "zero experts return a token as it is"),
        ({"moe_apply_router_weight_on_input": True, "num_experts_per_tok": 1}, None),
        ({"moe_apply_router_weight_on_input": True, "num_experts_per_tok": 8}, "this model chooses 8"),
        ({"score_function": "tanh"}, "score_function: router scores 'tanh' are not supported"),
    ],
    ids=str,
)
def test_a_config_tells_what_cannot_be_routed(config: dict[str, Any], message: str | None):
    reason = why_not_routed(config)
    assert reason is None if message is None else message in str(reason)


def test_the_names_of_scores_are_those_that_are_computed():
    assert set(SCORE_NAMES) == set(SCORES)


def test_unknown_scores_are_refused_by_name():
    with pytest.raises(UnsupportedConfigError, match=r"'tanh' are not supported; supported: softmax, sigmoid"):
        RoutingScheme(top_k=2, scoring="tanh", renormalize=True)


def test_zero_experts_and_several_weights_on_the_input_are_refused():
    zero = create_fused_moe_router(
        top_k=2,
        global_num_experts=EXPERTS,
        zero_expert_type="identity",
        num_logical_experts=EXPERTS - 4,
        e_score_correction_bias=torch.zeros(EXPERTS),
    )
    assert router_for_cpu(zero) is zero
    assert "zero experts" in why_not_used(zero, weight_on_input=False, top_k=2)
    router = router_for_cpu(create_fused_moe_router(top_k=2, global_num_experts=EXPERTS))
    assert isinstance(router, CpuMoERouter)
    assert why_not_used(router, weight_on_input=False, top_k=2) is None
    assert why_not_used(router, weight_on_input=True, top_k=1) is None
    assert "chooses 2" in why_not_used(router, weight_on_input=True, top_k=2)
