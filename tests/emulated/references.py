"""What the ops must give, in plain Python: layouts, counts and roundings, as their documents have them; and refusals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests import cases
from tests.cases import seeded

Triple = tuple[int, int, int]  # source rank, token, k


def refused(text: str, call: Callable[[], Any]) -> None:
    """The call must raise an error that has the text: a regular expression, whose dots are line ends too."""
    with pytest.raises(RuntimeError, match=rf"(?s){text}"):
        call()


def random_rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed)).to(dtype)


def small_integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Integers of -2..2: sums of a few dozen products of them are exact in 16 bits."""
    return torch.randint(-2, 3, shape, generator=seeded(seed)).to(dtype)


def distinct_ids(tokens: int, top_k: int, experts: int, seed: int) -> torch.Tensor:
    """[tokens, top_k] int32 expert ids, distinct in a row."""
    return cases.distinct_ids(tokens, top_k, experts, seeded(seed)).int()


def is_undefined(x: torch.Tensor) -> bool:
    """Whether all of it is what the emulator leaves where an op writes nothing."""
    if x.is_floating_point():
        return bool(x.isnan().all())
    return bool((x == torch.iinfo(x.dtype).min).all())


# --- Routing on one rank ---


def sorted_pairs(ids: torch.Tensor, first: int, end: int) -> list[int]:
    """Pairs token * top_k + k of the experts in [first, end), by expert, then by pair."""
    flat = ids.flatten().tolist()
    return sorted((pair for pair, expert in enumerate(flat) if first <= expert < end), key=lambda pair: flat[pair])


def counts_of(ids: torch.Tensor, first: int, end: int) -> list[int]:
    return [int((ids == expert).sum()) for expert in range(first, end)]


def sum_of_pairs(
    rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, kind: type[np.floating]
) -> torch.Tensor:
    """For each token and k ascending: total + rows[index] * weight, each step rounded to numpy's type `kind`, but nothing for
    an index that is no row. index and weights are [tokens, k]. float64 gives the exact sums."""
    values, scales = rows.double().numpy().astype(kind), weights.double().numpy().astype(kind)
    total = np.zeros((index.shape[0], rows.shape[1]), kind)
    for token, chosen in enumerate(index.tolist()):
        for k, row in enumerate(chosen):
            if 0 <= row < rows.shape[0]:
                total[token] = total[token] + values[row] * scales[token, k]
    return torch.from_numpy(total)


def half_units(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half of the distance between neighbours of `dtype` at each value of `exact`, which is float64."""
    return 2.0 ** exact.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor() * torch.finfo(dtype).eps / 2


# --- Roundings ---


def product_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dispatch's quant_mode 2: rint(x * (127 / max|x|)) and its scale."""
    factor = torch.tensor(127.0) / rows.float().abs().amax(1, keepdim=True)  # a number / x is x.reciprocal() * number
    return (rows.float() * factor).round().to(torch.int8), (1 / factor).squeeze(1)


def quotient_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """init_routing's quant_mode 1: x / (max|x| / 127) in float32, truncated to fp16, rounded half away from zero."""
    scales = np.abs(rows).max(1) / np.float32(127)
    quotients = rows / scales[:, None]
    halves = quotients.astype(np.float16)
    too_large = np.abs(halves.astype(np.float32)) > np.abs(quotients)
    halves = np.where(too_large, np.nextafter(halves, np.float16(0)), halves).astype(np.float32)
    return (np.sign(halves) * np.floor(np.abs(halves) + 0.5)).astype(np.int8), scales


def through_int8_groups(rows: torch.Tensor) -> torch.Tensor:
    """Combine's comm_quant_mode 2: int8 by groups of 8, whose scale is rounded to the rows' dtype on the wire."""
    groups = rows.float().unflatten(-1, (-1, 8))
    scales = groups.abs().amax(-1, keepdim=True) * torch.tensor(1 / 127)
    values = torch.where(scales > 0, groups / scales, 0.0).half().round()
    return (values.float() * scales.to(rows.dtype).float()).flatten(-2).to(rows.dtype)


# --- Dispatch and combine ---


@dataclass(frozen=True)
class Layer:
    """One layer's tokens and routing, as all ranks together see them: all from one seed."""

    num_ranks: int
    tokens: Sequence[int]  # by rank
    dtype: torch.dtype = torch.bfloat16
    masks: Sequence[torch.Tensor] | None = None  # by rank: [B] or [B, K]
    shared_experts: int = 0
    shared_ranks: int = 0
    special: tuple[int, int, int] = (0, 0, 0)  # zero, copy, constant
    global_bs: int = 0
    top_k: int = 3
    experts_per_rank: int = 4
    width: int = 1024  # the least that A3 takes
    integers: bool = False  # small ones, so that sums of products are exact
    seed: int = 0
    x: list[torch.Tensor] = field(init=False, repr=False)
    ids: list[torch.Tensor] = field(init=False, repr=False)
    weights: list[torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = small_integers if self.integers else random_rows
        num_ids = self.experts + sum(self.special)
        x, ids, weights = [], [], []
        for rank, tokens in enumerate(self.tokens):
            seed = 1000 * self.seed + 10 * rank
            x.append(rows(tokens, self.width, dtype=self.dtype, seed=seed))
            ids.append(distinct_ids(tokens, self.top_k, num_ids, seed=seed + 1))
            weights.append(random_rows(tokens, self.top_k, seed=seed + 2))
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "weights", weights)

    @property
    def experts(self) -> int:
        return self.experts_per_rank * (self.num_ranks - self.shared_ranks)

    @property
    def rows_of_a_rank(self) -> int:
        """The most tokens of any rank, as global_bs or else the even number of tokens says."""
        return self.global_bs // self.num_ranks if self.global_bs else self.tokens[0]

    def active(self, rank: int) -> torch.Tensor:
        """[B, K] bool."""
        shape = self.ids[rank].shape
        if self.masks is None:
            return torch.ones(shape, dtype=torch.bool)
        mask = self.masks[rank]
        return mask if mask.dim() == 2 else mask[:, None].expand(shape)

    def arrivals(self, rank: int) -> list[list[list[Triple]]]:
        """[local expert][source rank]: the triples, in the order in which they lie in expand_x."""
        ranks = range(self.num_ranks)
        if rank < self.shared_ranks:
            copies = self.shared_ranks // self.shared_experts
            shared = rank // copies
            served = [source for source in ranks if source % copies == rank % copies]
            return [
                [
                    [(s, t, self.top_k + shared) for t in range(self.tokens[s]) if self.active(s)[t].any()]
                    if s in served
                    else []
                    for s in ranks
                ]
            ]
        first = (rank - self.shared_ranks) * self.experts_per_rank
        ids = [each.tolist() for each in self.ids]
        active = [self.active(s).tolist() for s in ranks]
        return [
            [
                [
                    (s, t, k)
                    for t in range(self.tokens[s])
                    for k in range(self.top_k)
                    if ids[s][t][k] == expert and active[s][t][k]
                ]
                for s in ranks
            ]
            for expert in range(first, first + self.experts_per_rank)
        ]

    def capacity(self, rank: int) -> int:
        """Rows of expand_x."""
        if rank < self.shared_ranks:
            return self.rows_of_a_rank * -(-self.num_ranks // (self.shared_ranks // self.shared_experts))
        return self.rows_of_a_rank * self.num_ranks * min(self.experts_per_rank, self.top_k)


def flat(arrivals: list[list[list[Triple]]]) -> list[Triple]:
    return [triple for by_source in arrivals for triples in by_source for triple in triples]


def group_name() -> str:
    backend = dist.group.WORLD._get_backend(torch.device("npu"))
    return backend.get_hccl_comm_name(dist.get_rank())


def members(layer: Layer, rank: int) -> dict[str, Any]:
    """The arguments that dispatch_v2 and combine_v2 both take, in the default group."""
    zero, copy, constant = layer.special
    return {
        "group_ep": group_name(),
        "ep_world_size": layer.num_ranks,
        "ep_rank_id": rank,
        "moe_expert_num": layer.experts,
        "shared_expert_num": layer.shared_experts,
        "shared_expert_rank_num": layer.shared_ranks,
        "global_bs": layer.global_bs,
        "x_active_mask": None if layer.masks is None else layer.masks[rank].npu(),
        "zero_expert_num": zero,
        "copy_expert_num": copy,
        "const_expert_num": constant,
    }
