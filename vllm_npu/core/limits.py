"""Limits of each implementation of a strategy, with their sources. strategies.select() enforces them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch

from vllm_npu.core.ascend_recipes import (
    COMBINE_QUANT_MODE,
    FULL_MESH,
    FULL_MESH_V2,
    HIERARCHY,
    INT8_GROUPS,
    MC2_ALGORITHM,
    FusedMC2Asked,
    FusedOperator,
    MC2Asked,
)
from vllm_npu.core.expert_limits import ExpertLimits
from vllm_npu.core.token_layout import ceil_div
from vllm_npu.core.topology import places_of_experts
from vllm_npu.errors import UnsupportedConfigError

MIB = 1 << 20
VECTOR_CORE_BYTES = 192 << 10  # memory of one vector core of A2 and A3
INT8_GROUP = 8  # numbers with one scale in rows that come back as int8: combine_v2's kernel for quantised rows
MAX_FUSED_TOKENS = 1 << 20  # the fused operators have no limit of their own; HCCL's buffer ends far below


class QuantMode(IntEnum):
    """Form in which a row travels to its experts. The values are the quant_mode of npu_moe_distribute_dispatch_v2."""

    NONE = 0
    """The row unchanged."""

    INT8_PER_TOKEN = 2
    """int8 and one float32 scale for each row: value = int8 * scale. For W8A8 models with dynamic scales."""


class BalanceMode(IntEnum):
    """Choice of the replica of an expert that a token goes to. The values are the balance_mode of npu_moe_update_expert."""

    BY_RANK = 0
    """All tokens of a rank go to one replica. Ranks are spread evenly over the replicas."""

    BY_TOKEN = 1
    """The tokens of a rank go to the replicas in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayer:
    """Facts of a layer on which limits depend. Equal on every rank and in every step."""

    num_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype  # of hidden_states
    quant_mode: QuantMode = QuantMode.NONE
    int4_weights: bool = False  # whether the weights of the experts are int4
    # Facts for an operator that computes the experts too. None: not known before the layer is built.
    intermediate_size: int | None = None  # of an expert; the first product has twice as many columns
    activation: str | None = None  # vLLM's name
    swiglu_limit: float | None = None  # None and 0: the activation clamps nothing
    has_bias: bool = False  # whether the experts' products add a bias


BufferBytes = Callable[[MoELayer, int, int], int]
"""(layer, ep_size, most tokens of a rank) -> bytes that the op uses of HCCL's buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MC2Limits:
    """Limits of one implementation of the MC2 dispatch and combine ops. None means no limit."""

    name: str
    native: bool
    """Whether a fused kernel runs it. If not, `auto` does not choose mc2: the portable op sends back top_k rows for each
    token, and all2all sends back one row from each rank."""
    source: str
    max_tokens_per_rank: int
    ep_sizes: tuple[range, ...] | None = None
    hidden_sizes: range | None = None
    max_experts: int | None = None
    max_experts_per_rank: int | None = None
    max_top_k: int | None = None
    version: int = 2  # version of the ops
    comm_alg: str = ""  # argument of the ops; empty: full mesh
    takes_mask: bool = True  # whether the ops take x_active_mask
    takes_weights: bool = False  # whether dispatch needs the top-k weights
    takes_uneven_ranks: bool = True  # whether each rank may bring another number of rows
    combine_quant_modes: tuple[int, ...] = (0,)  # values of comm_quant_mode that the combine takes
    combine_quant_mode: int = 0  # the one that it gets
    dtypes: tuple[torch.dtype, ...] | None = None
    buffer_bytes: BufferBytes | None = None

    def why_not(self, layer: MoELayer, ep_size: int) -> str | None:
        """Reason why the ops cannot run this layer with any number of tokens, or None."""
        if self.dtypes is not None and layer.dtype not in self.dtypes:
            return f"{self.name} takes {_names(self.dtypes)}, hidden_states are {_names([layer.dtype])}"
        if self.ep_sizes is not None and not any(ep_size in sizes for sizes in self.ep_sizes):
            return f"{self.name} takes ep_size {_spans(self.ep_sizes)}, not {ep_size}"
        if self.hidden_sizes is not None and layer.hidden_size not in self.hidden_sizes:
            return f"{self.name} takes hidden_size {_spans([self.hidden_sizes])}, not {layer.hidden_size}"
        if self.combine_quant_mode == INT8_GROUPS and layer.hidden_size % INT8_GROUP:
            return f"{self.name} with int8 rows takes hidden_size in steps of {INT8_GROUP}, not {layer.hidden_size}"
        return _too_many_experts(self, layer, ep_size)

    def buffer_mb(self, layer: MoELayer, ep_size: int, max_tokens_per_rank: int) -> int | None:
        """HCCL_BUFFSIZE in MiB that the ops need for steps of up to max_tokens_per_rank tokens. None: they need no buffer."""
        if self.buffer_bytes is None:
            return None
        return ceil_div(self.buffer_bytes(layer, ep_size, max_tokens_per_rank), MIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedMC2Limits:
    """Limits of one operator that dispatches, computes the experts, and combines."""

    name: str
    source: str
    operator: FusedOperator
    quant_mode: QuantMode  # of the layers that it computes
    takes_mask: bool  # whether it leaves out the rows that a mask names; if not, padding rows travel as tokens do
    takes_swiglu_limit: bool
    takes_uneven_ranks: bool = False  # whether each rank may bring another number of rows
    no_experts_per_rank: int | None = None  # the number with which the kernel computes no activation
    bytes_of_column: int = 0  # of a vector core's memory, for each column of the first product
    columns_within_hidden_size: bool = False  # whether 2 * intermediate_size may be no more than hidden_size
    buffer_bytes: BufferBytes
    max_ep_size: int
    hidden_size_multiple: int = 32
    hidden_sizes: range | None = None
    intermediate_sizes: tuple[int, ...] | None = None
    max_experts: int | None = None
    max_experts_per_rank: int | None = None
    max_top_k: int | None = None
    dtypes: tuple[torch.dtype, ...]
    max_tokens_per_rank: int = MAX_FUSED_TOKENS

    def why_not(self, layer: MoELayer, ep_size: int) -> str | None:
        """Reason why the operator cannot run this layer with any number of tokens, or None. A fact that is None passes."""
        experts, columns = ceil_div(layer.num_experts, ep_size), 2 * (layer.intermediate_size or 0)
        if layer.dtype not in self.dtypes:
            return f"{self.name} takes {_names(self.dtypes)}, hidden_states are {_names([layer.dtype])}"
        if layer.int4_weights:
            return f"{self.name} takes no int4 weights"
        if ep_size > self.max_ep_size:
            return f"{self.name} takes at most {self.max_ep_size} ranks, not {ep_size}"
        if layer.hidden_size % self.hidden_size_multiple:
            return f"{self.name} takes hidden_size in steps of {self.hidden_size_multiple}, not {layer.hidden_size}"
        if self.hidden_sizes is not None and layer.hidden_size not in self.hidden_sizes:
            return f"{self.name} takes hidden_size {_spans([self.hidden_sizes])}, not {layer.hidden_size}"
        if experts == self.no_experts_per_rank:
            return f"{self.name} computes no activation with {experts} experts a rank"
        if columns * self.bytes_of_column > VECTOR_CORE_BYTES or (
            self.columns_within_hidden_size and columns > layer.hidden_size
        ):
            most = VECTOR_CORE_BYTES // self.bytes_of_column
            most = min(most, layer.hidden_size) if self.columns_within_hidden_size else most
            return f"{self.name} takes intermediate_size up to {most // 2} here, not {layer.intermediate_size}"
        sizes = self.intermediate_sizes
        if sizes is not None and layer.intermediate_size is not None and layer.intermediate_size not in sizes:
            return f"{self.name} takes intermediate_size {_spans(_one(*sizes))}, not {layer.intermediate_size}"
        if layer.activation not in (None, "silu"):
            return f"{self.name} computes the activation silu, not {layer.activation}"
        if layer.swiglu_limit and not self.takes_swiglu_limit:
            return f"{self.name} leaves out swiglu_limit, which is {layer.swiglu_limit:g}"
        if layer.has_bias:
            return f"{self.name} adds no bias of the experts"
        return _too_many_experts(self, layer, ep_size)

    def received_rows(self, layer: MoELayer, ep_size: int, tokens: int) -> int:
        """The most rows that can arrive at a rank if all ranks together send the rows of this many tokens.

        A token has top_k distinct experts, and a rank cannot have more of them than it has experts.
        """
        return tokens * min(layer.top_k, ceil_div(layer.num_experts, ep_size))

    def buffer_mb(self, layer: MoELayer, ep_size: int, max_tokens_per_rank: int) -> int:
        """HCCL_BUFFSIZE in MiB that the operator needs for steps of up to max_tokens_per_rank tokens."""
        return ceil_div(self.buffer_bytes(layer, ep_size, max_tokens_per_rank), MIB)


def _too_many_experts(limits: MC2Limits | FusedMC2Limits, layer: MoELayer, ep_size: int) -> str | None:
    """Reason why the operator cannot run this layer's number of experts, or None."""
    for what, value, most in (
        ("experts", layer.num_experts, limits.max_experts),
        ("experts a rank", ceil_div(layer.num_experts, ep_size), limits.max_experts_per_rank),
        ("experts a token", layer.top_k, limits.max_top_k),
    ):
        if most is not None and value > most:
            return f"{limits.name} takes at most {most} {what}, not {value}"
    return None


def _names(dtypes: tuple[torch.dtype, ...] | list[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _spans(sizes: tuple[range, ...] | list[range]) -> str:
    """Text such as '2 to 8, 16, 32 to 64 in steps of 32'."""
    texts = []
    for each in sizes:
        text = str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"
        texts.append(text + (f" in steps of {each.step}" if each.step > 1 and len(each) > 1 else ""))
    return ", ".join(texts)


def _either(values: Sequence[object]) -> str:
    return " or ".join(map(str, values))


def _one(*sizes: int) -> tuple[range, ...]:
    return tuple(range(size, size + 1) for size in sizes)


def _aligned(value: int, alignment: int) -> int:
    return ceil_div(value, alignment) * alignment


# Formulas of the documents of aclnnMoeDistributeDispatchV2 (CANN 8.5): 2 bytes for each element of a row, 4 bytes for each id
# and each weight. fullmesh_v2 sends a row in blocks of 512 bytes, of which 480 are the row's.


def _a2_full_mesh_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    rows = tokens * ep_size * min(layer.num_experts // ep_size, layer.top_k)
    return 2 * (rows * 2 * layer.hidden_size + 2 * MIB)


def _a2_hierarchy_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    row = 2 * layer.hidden_size + 4 * 4 * _aligned(layer.top_k, 8)
    return (layer.num_experts + ep_size // 4) * _aligned(tokens * row, 512) + 8 * MIB


def _a3_full_mesh_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    sent = _aligned(_aligned(2 * layer.hidden_size, 32) + 64, 512)  # a row and the values sent with it
    returned = _aligned(2 * layer.hidden_size, 512)
    return 2 * tokens * (_a3_slots(layer, ep_size) * sent + layer.top_k * returned)


def _a3_full_mesh_v2_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    sent = ceil_div(_aligned(2 * layer.hidden_size, 32) + 64, 480) * 512
    returned = _aligned(2 * layer.hidden_size, 512)
    return 2 * tokens * (_a3_slots(layer, ep_size) * sent + layer.top_k * returned)


def _a3_version_1_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    row = 2 * (layer.hidden_size + 128)
    return 2 * MIB + 2 * tokens * row * (_a3_slots(layer, ep_size) + layer.top_k + 1)


def _a3_slots(layer: MoELayer, ep_size: int) -> int:
    return layer.num_experts // ep_size * ep_size


def _a3_hierarchy_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    # The two documents of A3_HIERARCHY give different values for a row: the larger one counts.
    facts = max(4 * 4 * _aligned(layer.top_k, 8), 3 * 4 * _aligned(layer.top_k, 8) + 64)
    return layer.num_experts * tokens * (2 * layer.hidden_size + facts) + 404 * MIB


# The fused operators' use of HCCL's buffer (PeermemInfo in their kernels): rows sent in the first third, 1 MiB, rows that come
# back, and 2 MiB at the end.


def _fused_layout_bytes(layer: MoELayer, tokens: int, sent_bytes: int) -> int:
    pairs = tokens * layer.top_k
    returned = pairs * 2 * layer.hidden_size + 3 * MIB
    return max(3 * pairs * sent_bytes, ceil_div(3 * returned, 2))


def _fused_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    return _fused_layout_bytes(layer, tokens, 2 * layer.hidden_size)


def _fused_int8_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    checked = 3 * tokens * layer.top_k * layer.hidden_size + 10 * MIB  # by the tiling, which refuses less
    return max(checked, _fused_layout_bytes(layer, tokens, layer.hidden_size + 32))


# dispatch_gmm_combine_decode sends the rows in one half of the buffer, and they come back in the other. Each half has a place
# for each expert, of the most rows of a rank in 16 bits. The places of a rank begin 512 bytes behind those of the rank before.


def _fused_decode_bytes(layer: MoELayer, ep_size: int, tokens: int) -> int:
    return 2 * layer.num_experts * tokens * 2 * layer.hidden_size + 512 * ep_size


def _finds_largest(intermediate_size: int) -> bool:
    """Whether dispatch_gmm_combine_decode finds the largest number of a row of the activation. It halves the row until at most
    64 columns are left, in whole blocks of 8 columns: those behind the last block of a step are left out."""
    width = intermediate_size // 2
    while width % 8 == 0 and width > 64:
        width //= 2
    return width % 8 == 0


SIXTEEN_BIT = (torch.bfloat16, torch.float16)

PORTABLE_MC2 = MC2Limits(
    name="portable mc2",
    max_tokens_per_rank=512,
    native=False,
    source="portable_ops has no limit of its own; 512 is the limit of npu_moe_distribute_dispatch_v2 on A3 (CANN 8.5), so that "
    "a laptop and a cluster choose the same strategy",
)
_A2_DOCUMENT = (
    "document of aclnnMoeDistributeDispatchV2 for Atlas A2, CANN 8.5; 24 counts in a row of the kernel's table"
)
_A3_DOCUMENT = "document of aclnnMoeDistributeDispatchV2 for Atlas A3, CANN 8.5"
A2_FULL_MESH = MC2Limits(
    name="mc2 on A2, full mesh",
    native=True,
    source=_A2_DOCUMENT,
    max_tokens_per_rank=256,
    ep_sizes=(range(2, 9), *_one(16, 32, 64, 128, 256)),
    hidden_sizes=range(32, 7168 + 1, 32),
    max_experts=512,
    max_experts_per_rank=24,
    max_top_k=16,
    dtypes=SIXTEEN_BIT,
    buffer_bytes=_a2_full_mesh_bytes,
)
A2_HIERARCHY = MC2Limits(
    name="mc2 on A2, hierarchy",
    native=True,
    source=f"{_A2_DOCUMENT}; vllm-ascend 0.30.0rc2, should_skip_allreduce_across_dp_group: as many rows from each rank",
    max_tokens_per_rank=512,
    ep_sizes=_one(16, 32, 64),
    hidden_sizes=range(32, 10240 + 1, 32),
    max_experts=512,
    max_top_k=16,
    comm_alg=HIERARCHY,
    takes_mask=False,
    takes_weights=True,
    takes_uneven_ranks=False,
    combine_quant_modes=(0, INT8_GROUPS),
    dtypes=SIXTEEN_BIT,
    buffer_bytes=_a2_hierarchy_bytes,
)
A3_FULL_MESH = MC2Limits(
    name="mc2 on A3, full mesh",
    native=True,
    source=_A3_DOCUMENT,
    max_tokens_per_rank=512,
    ep_sizes=(range(2, 768 + 1),),
    hidden_sizes=range(1024, 8192 + 1),
    max_experts=1024,
    max_top_k=16,
    combine_quant_modes=(0, INT8_GROUPS),
    dtypes=SIXTEEN_BIT,
    buffer_bytes=_a3_full_mesh_bytes,
)
A3_FULL_MESH_V2 = replace(
    A3_FULL_MESH,
    name="mc2 on A3, fullmesh_v2",
    source=f"{_A3_DOCUMENT}; op-plugin's document of npu_moe_distribute_dispatch_v2 for 256 tokens (CANN's has 512)",
    max_tokens_per_rank=256,
    max_top_k=12,
    comm_alg="fullmesh_v2",
    buffer_bytes=_a3_full_mesh_v2_bytes,
)
A5_FULL_MESH = replace(
    A3_FULL_MESH,
    name="mc2 on A5, full mesh",
    source="documents of aclnnMoeDistributeDispatchV4 and CombineV4 for Ascend 950PR and 950DT (CANN's ops-transformer, commit "
    "01a1a43f): numbers and buffer of A3, no comm_alg in the combine, no top-k weights in the dispatch. op-plugin's document "
    "does not name the chip. The forms 2, 3 and 4 of rows that come back were never run",
    combine_quant_modes=(0,),
)
A3_HIERARCHY = MC2Limits(
    name="mc2 on A3, hierarchy",
    native=True,
    source="op-plugin's document of npu_moe_distribute_dispatch_v2, and CANN's of aclnnMoeDistributeDispatchV4, where they "
    "differ the smaller number: 256 tokens (512), hidden size up to 7168 in steps of 32 (8192), 24 experts a rank (none). No "
    "public source says how its combine rounds int8 rows, which were never run",
    max_tokens_per_rank=256,
    ep_sizes=(range(16, 256 + 1, 16),),
    hidden_sizes=range(1024, 7168 + 1, 32),
    max_experts=512,
    max_experts_per_rank=24,
    max_top_k=16,
    comm_alg=HIERARCHY,
    takes_weights=True,
    takes_uneven_ranks=False,
    dtypes=SIXTEEN_BIT,
    buffer_bytes=_a3_hierarchy_bytes,
)
_VERSION_1_DOCUMENT = "op-plugin's document of npu_moe_distribute_dispatch, where x_active_mask is reserved"
A2_VERSION_1 = replace(
    A2_FULL_MESH,
    name="mc2 on A2, version 1",
    source=_VERSION_1_DOCUMENT,
    ep_sizes=_one(16, 32, 64),
    version=1,
    takes_mask=False,
    takes_weights=True,
)
A3_VERSION_1 = replace(
    A3_FULL_MESH,
    name="mc2 on A3, version 1",
    source=_VERSION_1_DOCUMENT,
    ep_sizes=_one(8, 16, 32, 64, 128, 144, 256, 288),
    hidden_sizes=range(7168, 7168 + 1),
    max_experts=512,
    max_top_k=8,
    version=1,
    takes_mask=False,
    combine_quant_modes=(0,),
    buffer_bytes=_a3_version_1_bytes,
)


_FUSED_SOURCE = "vllm-ascend 0.23.0.post1 and 0.30.0rc2, csrc/mc2/dispatch_ffn_combine"
_FUSED_DECODE_SOURCE = "vllm-ascend 0.23.0.post1, csrc/mc2/dispatch_gmm_combine_decode"
A3_FUSED_MC2 = (
    FusedMC2Limits(
        name="dispatch_ffn_combine with 16-bit weights",
        source=f"{_FUSED_SOURCE}_bf16: MAX_RANK_SIZE of hccl_shmem.hpp; epilogueGranularity = experts - 2 is 0 for 2 experts; "
        "26 bytes a column in block_epilogue_pertoken_swiglu.hpp; no mask and no limit among the arguments",
        operator=FusedOperator.FFN_COMBINE,
        quant_mode=QuantMode.NONE,
        takes_mask=False,
        takes_swiglu_limit=False,
        no_experts_per_rank=2,
        bytes_of_column=26,
        max_ep_size=32,
        buffer_bytes=_fused_bytes,
        dtypes=SIXTEEN_BIT,
    ),
    FusedMC2Limits(
        name="dispatch_ffn_combine with int8 weights",
        source=f"{_FUSED_SOURCE}: MAX_RANK_SIZE of hccl_shmem.hpp; epilogueGranularity = experts - 1 is 0 for 1 expert; "
        "24 bytes a column in block_epilogue_pertoken_swiglu.hpp; rows of the first product lie hidden_size apart",
        operator=FusedOperator.FFN_COMBINE,
        quant_mode=QuantMode.INT8_PER_TOKEN,
        takes_mask=True,
        takes_swiglu_limit=True,
        no_experts_per_rank=1,
        bytes_of_column=24,
        columns_within_hidden_size=True,
        max_ep_size=32,
        buffer_bytes=_fused_int8_bytes,
        dtypes=SIXTEEN_BIT,
    ),
    FusedMC2Limits(
        name="dispatch_gmm_combine_decode",
        source=f"{_FUSED_DECODE_SOURCE}: the tiling for tokens, hidden size, twice the intermediate size (1024 to 6144), "
        "experts a token, experts, and experts a rank, which half of a chip's 48 vector cores receive. GMM1_L1N is 128: a tile "
        "of the first product is gate or up. BlockQuant halves a row of the activation. No argument limits the activation, and "
        "vllm-ascend passes no mask",
        operator=FusedOperator.GMM_COMBINE_DECODE,
        quant_mode=QuantMode.INT8_PER_TOKEN,
        takes_mask=False,
        takes_swiglu_limit=False,
        takes_uneven_ranks=True,
        max_ep_size=512,
        hidden_sizes=range(512, 7168 + 1, 32),
        intermediate_sizes=tuple(size for size in range(512, 3072 + 1, 128) if _finds_largest(size)),
        max_experts=512,
        max_experts_per_rank=24,
        max_top_k=12,
        buffer_bytes=_fused_decode_bytes,
        dtypes=SIXTEEN_BIT,
        max_tokens_per_rank=256,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricLimits:
    """Limits of the symmetric strategy. Its windows are sized for them."""

    max_tokens_per_rank: int
    max_ep_size: int = 8
    row_alignment: int = 4  # bytes; the kernels move rows in words of this size
    source: str


SYMMETRIC = SymmetricLimits(
    max_tokens_per_rank=4096,
    source="measured up to 4096 tokens a rank (docs/benchmarks); windows take 2 x ep_size x tokens x (row + returned row) "
    "bytes: 0.47 GB on each of 2 GPUs, 1.9 GB on each of 8, at hidden size 7168 in bfloat16",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """Strategies and ops that a family of chips can run, with their limits."""

    family: str
    mc2: MC2Limits | None  # None: the chips have no MC2 op
    socs: tuple[str, ...] = ()  # prefixes of the chips' names
    mc2_hierarchy: MC2Limits | None = None  # MC2's other algorithm, for layers that the first one cannot run
    mc2_version_1: MC2Limits | None = None  # replaces both if torch_npu has only version 1 of MC2's ops
    mc2_algorithms: Mapping[str, MC2Limits] = field(default_factory=dict)  # by value of vllm-ascend's mc2_comm_alg
    mc2_reads_variables: bool = False  # whether HCCL's variables choose where no algorithm is named
    fused_mc2: tuple[FusedMC2Limits, ...] = ()  # one for each operator and quantisation; empty: the chips have none
    fused_mc2_asked: FusedMC2Asked | None = None  # None: vllm-ascend prepares no weights, since enable_fused_mc2 is 0
    all2all: bool = True
    symmetric: SymmetricLimits | None = None  # None: the ranks share no memory
    uneven_collectives: bool = False  # has HcclAllGatherV and HcclReduceScatterV between ranks of one server
    routing_ops: bool = True
    """Whether the chips have npu_moe_init_routing_v2 with a range of experts, and npu_moe_token_unpermute.

    npu_moe_token_unpermute adds the experts' rows up, and not npu_moe_finalize_routing, as in vllm-ascend (AllGatherCommImpl in
    ops/fused_moe/moe_comm_method.py of 0.23.0.post1: npu_moe_finalize_routing "will lead to accuracy issues"). The sources of
    both kernels (moe/ of CANN's ops-transformer) show two reasons on A2 and A3:
    - npu_moe_finalize_routing adds float16 rows up in float16. npu_moe_token_unpermute always adds up in float32.
    - In drop_pad_mode 0 and 2, npu_moe_finalize_routing multiplies an old row where an index is -1. Pairs of experts on other
      ranks have this index. SGLang found this too (its pull request 40705).
    npu_moe_token_unpermute leaves out an index past the last row, and on A2 and A3 every pair of weight 0. On A5, it calls
    npu_moe_finalize_routing's kernel for A5, which adds up in float32, and leaves out -1 and indices past the last row.
    """
    update_expert: bool = False  # has npu_moe_update_expert
    captures: tuple[str, ...] = ()  # strategies without host syncs, which a graph can capture
    experts: ExpertLimits | None = None  # None: the experts are not this package's
    uneven_experts: bool = False  # whether the plugin for this device serves ranks of which some have one expert more
    no_engine: str | None = None  # why no engine on these chips has tokens that the plugin could move. None: one has

    def of_version(self, version: int) -> "DeviceLimits":
        """These limits for a torch_npu whose newest MC2 ops have this version. 0: it has no MC2 ops."""
        if version == 2:
            return self
        return replace(self, mc2=self.mc2_version_1 if version == 1 else None, mc2_hierarchy=None, mc2_algorithms={})

    def with_mc2(self, asked: MC2Asked) -> "DeviceLimits":
        """These limits with what vllm-ascend's options ask of MC2's ops. LOCAL.

        An algorithm that was asked for is the only one: no layer goes back to another. Raises UnsupportedConfigError that names
        the option for an algorithm or a form of rows that these chips' ops do not take, or that was never run.
        """
        if self.mc2 is None or not self.mc2.native:
            return self
        by_variables = asked.hierarchy_by_variables and self.mc2_reads_variables
        algorithm = asked.algorithm or (HIERARCHY if by_variables else "")
        device = self
        if algorithm:
            limits = self.mc2_algorithms.get(algorithm)
            if limits is None:
                raise UnsupportedConfigError(
                    f"additional_config {MC2_ALGORITHM}: MC2 on {self.family} was never run with {algorithm} (as version "
                    f"{self.mc2.version} of its ops, it takes {' or '.join(self.mc2_algorithms) or 'none by name'}); leave the "
                    'option out, or keep vllm-ascend\'s own communication: {"vllm_npu": {"moe_comm": "off"}}'
                )
            device = replace(self, mc2=limits, mc2_hierarchy=None)
        return device._with_combine(asked.combine_quant_mode)

    def _with_combine(self, mode: int) -> "DeviceLimits":
        """These limits for rows that come back in this form. Raises UnsupportedConfigError as with_mc2."""
        if mode == 0 or self.mc2 is None:
            return self
        if mode not in self.mc2.combine_quant_modes:
            raise UnsupportedConfigError(
                f"additional_config {COMBINE_QUANT_MODE}: {self.mc2.name} takes {_either(self.mc2.combine_quant_modes)}, not "
                f"{mode} ({self._why_no_form(mode)}); leave the option out, or keep vllm-ascend's own communication: "
                '{"vllm_npu": {"moe_comm": "off"}}'
            )
        other = self.mc2_hierarchy
        if other is not None:
            other = replace(other, combine_quant_mode=mode) if mode in other.combine_quant_modes else None
        return replace(self, mc2=replace(self.mc2, combine_quant_mode=mode), mc2_hierarchy=other)

    def _why_no_form(self, mode: int) -> str:
        if mode != INT8_GROUPS:
            return "CANN's document names it for A5 alone, where it was never run"
        if any(mode in limits.combine_quant_modes for limits in self.mc2_algorithms.values()):
            names = [name for name, limits in self.mc2_algorithms.items() if mode in limits.combine_quant_modes]
            return f"it was run with {MC2_ALGORITHM} {_either(names)} only"
        return "it was never run there"

    def for_layer(self, layer: MoELayer | None, ep_size: int) -> "DeviceLimits":
        """These limits with the MC2 algorithm for the layer: the hierarchy if only the hierarchy can run it."""
        if layer is None or self.mc2 is None or self.mc2_hierarchy is None:
            return self
        if self.mc2.why_not(layer, ep_size) is None or self.mc2_hierarchy.why_not(layer, ep_size) is not None:
            return self
        return replace(self, mc2=self.mc2_hierarchy, mc2_hierarchy=None)

    def places(self, num_experts: int, ep_size: int) -> int:
        """The number of experts that strategies see: their places, where ranks may differ by one expert. A rank needs one."""
        if not self.uneven_experts or num_experts < ep_size:
            return num_experts
        return places_of_experts(num_experts, ep_size)

    def placed(self, layer: MoELayer, ep_size: int) -> MoELayer:
        """The layer as strategies see it."""
        return replace(layer, num_experts=self.places(layer.num_experts, ep_size))

    def fused_limits(self, layer: MoELayer) -> FusedMC2Limits | None:
        """The operator that vllm-ascend was asked for, for layers of this quantisation. None: there is none."""
        asked = self.fused_mc2_asked
        return next(
            (
                limits
                for limits in self.fused_mc2
                if asked is not None and limits.operator is asked.operator and limits.quant_mode is layer.quant_mode
            ),
            None,
        )

    def fits(self, strategy: str, tokens_per_rank: int) -> bool:
        """Whether the strategy can run steps of this many tokens on each rank. True for strategies without a capacity."""
        return tokens_per_rank <= self.capacities.get(strategy, tokens_per_rank)

    @property
    def capacities(self) -> dict[str, int]:
        """The most tokens of a rank, for each strategy that has such a limit and runs on these chips."""
        limited = {"mc2": self.mc2, "symmetric": self.symmetric}
        return {name: limits.max_tokens_per_rank for name, limits in limited.items() if limits is not None}


UNPERMUTE_MAX_TOP_K = 512
"""Most rows that npu_moe_token_unpermute adds up for a token. Source: CANN's document of aclnnMoeTokenUnpermute."""

PORTABLE = DeviceLimits(
    family="no NPU",
    mc2=PORTABLE_MC2,
    uneven_experts=True,
    # What vLLM's fused kernel for CPUs computes (experts/cpu_moe.py). It takes no limit: swigluoai has that of GPT-OSS.
    experts=ExpertLimits(place="a CPU", activations={"silu": None, "gelu": None, "gelu_tanh": None, "swigluoai": 7.0}),
)
NVLINK = DeviceLimits(family="GPUs of one host", mc2=PORTABLE_MC2, symmetric=SYMMETRIC, captures=("symmetric",))
# The routing ops return the same number of rows for any routing. all2all always reads its split sizes on the host.
_NPU_CAPTURES = ("mc2", "allgather", "naive")
# uneven_collectives: HCCL's documents (CANN 8.5) name A3, 300I Duo and some servers of A2. The chip's name does not tell these
# servers from other A2 servers. No document names A5.
DEVICES = {
    "A2": DeviceLimits(
        family="A2",
        mc2=A2_FULL_MESH,
        mc2_hierarchy=A2_HIERARCHY,
        mc2_version_1=A2_VERSION_1,
        mc2_algorithms={FULL_MESH: replace(A2_FULL_MESH, comm_alg="fullmesh"), HIERARCHY: A2_HIERARCHY},
        mc2_reads_variables=True,
        socs=("Ascend910B",),
        captures=_NPU_CAPTURES,
    ),
    "A3": DeviceLimits(
        family="A3",
        mc2=A3_FULL_MESH,
        mc2_hierarchy=A3_HIERARCHY,
        mc2_version_1=A3_VERSION_1,
        mc2_algorithms={  # vllm-ascend's fullmesh is fullmesh_v1 for A3's ops
            FULL_MESH: replace(A3_FULL_MESH, comm_alg="fullmesh_v1"),
            FULL_MESH_V2: A3_FULL_MESH_V2,
            HIERARCHY: A3_HIERARCHY,
        },
        uneven_collectives=True,
        update_expert=True,
        fused_mc2=A3_FUSED_MC2,
        socs=("Ascend910_93",),
        captures=(*_NPU_CAPTURES, "fused_mc2"),
    ),
    # op-plugin's document of npu_moe_token_unpermute does not name 310P. CANN's does, without bfloat16, and only for hidden
    # sizes that 128 divides. no_engine: _310p/fused_moe of vllm-ascend 0.23.0.post1 (fused_moe.py) and 0.30.0rc2
    # (token_dispatcher.py; its model runner V2 refuses expert parallelism by name). On 310P, op-plugin calls
    # aclnnMoeInitRoutingV2 (MoeInitRoutingV2KernelNpuOpApi.cpp), which has no active_expert_range.
    "310P": DeviceLimits(
        family="310P",
        mc2=None,
        all2all=False,
        uneven_collectives=True,
        routing_ops=False,
        socs=("Ascend310P",),
        no_engine="vllm-ascend has no expert parallelism there: the layer of 0.23 refuses it, and that of 0.30 names a rank's "
        "experts by a range, which torch_npu does not pass to this chip's npu_moe_init_routing_v2. Data parallelism alone was "
        "never run with other communication",
    ),
    "A5": DeviceLimits(
        family="A5",
        mc2=A5_FULL_MESH,  # no mc2_algorithms: its combine takes no comm_alg, and vllm-ascend would pass one
        update_expert=True,
        socs=("Ascend950",),
        captures=_NPU_CAPTURES,
    ),
}
