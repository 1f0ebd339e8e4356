"""Published times of exchanges beside the model of link_model.py: a correction from one half of them, tested on the other half.

Published times come in groups: those of one fabric whose rows travel alike, inside of a node or between nodes. One half of a
group gives two numbers, by which the time of the bytes is multiplied: a factor, and its growth with the ranks. The other half
tests the correction. The interval of an estimate holds both halves' errors. A strategy without a group of its own has no
correction, and the errors of the groups that are most like it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np

from vllm_npu.strategies.select import distinct_destinations
from vllm_npu.tools.link_model import (
    GATHER,
    PER_EXPERT,
    PER_NODE,
    Fabric,
    bytes_us,
    demand,
    fabrics,
    figures,
    rows_of,
    start_us,
)

MOST_AS_ONE_NUMBER = 0.30  # an estimate that may be off by more is shown as an interval
FACTORS = np.geomspace(0.1, 100, 301)
GROWTHS = np.linspace(0.0, 1.0, 101)
FEWEST_RANKS = 8  # the growth counts from here: fewer ranks are in one node everywhere


@dataclass(frozen=True, slots=True)
class RowPath:
    """How rows travel."""

    fabric: str
    exchange: str
    by: str
    leaves_node: bool  # over links that are slower than those of a node

    @classmethod
    def of(cls, fabric: Fabric, exchange: str, by: str, ep_size: int) -> Self:
        """The path of an exchange of so many ranks."""
        return cls(fabric.name, exchange, by, ep_size > fabric.ranks_per_node and not fabric.shared_links)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTime:
    """One published number, and what the model has for it. Times are microseconds."""

    source: str
    path: "RowPath"
    ep_size: int
    stage: str  # dispatch, combine, both, or one way
    unit: str
    published: float  # in `unit`
    published_us: float
    start_us: float
    bytes_us: float
    fits: bool  # whether it is in the half that gives the correction
    alike: bool  # whether the exchange is one of ours, so that its errors say something about ours

    @property
    def estimated_us(self) -> float:
        """The corrected estimate."""
        return self.start_us + self.bytes_us * calibration_of(self.path).scale(self.ep_size)

    @property
    def uncorrected_us(self) -> float:
        """The estimate without a correction."""
        return self.start_us + self.bytes_us

    @property
    def interval(self) -> tuple[float, float]:
        """What the estimate may be, in the unit of the published number."""
        calibration = calibration_of(self.path)
        low, high = sorted(self.in_unit(self.estimated_us * part) for part in (calibration.low, calibration.high))
        return low, high

    @property
    def error(self) -> float:
        """Relative error of the corrected estimate: of the time, or of the speed for numbers in GB/s."""
        return self.in_unit(self.estimated_us) / self.published - 1

    def in_unit(self, time_us: float) -> float:
        """A time of this exchange in the unit of the published number."""
        return time_us if self.unit == "us" else self.published * self.published_us / time_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The correction of a kind of exchange, and how far published times were from corrected estimates."""

    factor: float = 1.0  # of the bytes' time
    growth: float = 0.0  # the factor grows with this power of the ranks, from FEWEST_RANKS on
    low: float  # published times divided by their estimates: the least, and 1 at most
    high: float  # the most, and 1 at least

    def scale(self, ep_size: int) -> float:
        """What the bytes' time is multiplied by."""
        return float(self.factor * (max(ep_size, FEWEST_RANKS) / FEWEST_RANKS) ** self.growth)


def is_one_number(low: float, high: float) -> bool:
    """Whether an estimate with this interval may be shown as one number."""
    return low >= 1 - MOST_AS_ONE_NUMBER and high <= 1 + MOST_AS_ONE_NUMBER


@cache
def calibration_of(path: RowPath) -> Calibration:
    """The correction and the interval of an exchange."""

    def of(chosen: Callable[[PublishedTime], bool]) -> list[PublishedTime]:
        return [row for row in published_times() if chosen(row)]

    own = of(lambda row: row.path == path)
    if own:
        factor, growth = _fitted([row for row in own if row.fits])
        fitted = Calibration(factor=factor, growth=growth, low=1.0, high=1.0)
        ratios = [row.published_us / (row.start_us + row.bytes_us * fitted.scale(row.ep_size)) for row in own]
    else:
        factor, growth = 1.0, 0.0
        like = of(
            lambda row: (
                row.alike
                and row.path.fabric == path.fabric
                and (row.path.exchange == path.exchange or row.path.by == path.by)
            )
        )
        ratios = [
            row.published_us / row.uncorrected_us
            for row in like or of(lambda row: row.alike and row.path.by == path.by)
        ]
    return Calibration(factor=factor, growth=growth, low=min([1.0, *ratios]), high=max([1.0, *ratios]))


def _fitted(rows: Sequence[PublishedTime]) -> tuple[float, float]:
    """The factor and the growth with the least sum of squared logarithms of errors. Of equal ones, the least growth. Without
    rows: no correction."""
    if not rows:
        return 1.0, 0.0
    errors = np.zeros((len(GROWTHS), len(FACTORS)))
    for row in rows:
        ranks = max(row.ep_size, FEWEST_RANKS) / FEWEST_RANKS
        scales = FACTORS[None, :] * ranks ** GROWTHS[:, None]
        errors += np.log((row.start_us + row.bytes_us * scales) / row.published_us) ** 2
    growth, factor = np.unravel_index(errors.round(12).argmin(), errors.shape)
    return float(FACTORS[factor]), float(GROWTHS[growth])


@cache
def published_times() -> tuple[PublishedTime, ...]:
    """Every published number of fabrics.toml: 256 experts, top 8, uniform routing."""
    halves: dict[RowPath, int] = {}
    return tuple(row for table in figures()["published"] for row in _rows(table, halves))


def _rows(table: Mapping[str, Any], halves: dict[RowPath, int]) -> Iterator[PublishedTime]:
    """The numbers of one table. Those that gave a figure of fabrics.toml are in the half for fits, and of the others of a group
    every second one, in the order of the file."""
    fabric, exchange, by = fabrics()[table["fabric"]], table["exchange"], table["by"]
    for ep, published in table["values"].items():
        ep_size = int(ep)
        path = RowPath.of(fabric, exchange, by, ep_size)
        fits = ep_size in table.get("fitted", ())
        if not fits:
            halves[path] = halves.get(path, 0) + 1
            fits = halves[path] % 2 == 0
        in_node, outside = _rows_of_table(table, fabric, ep_size)
        slower = in_node if ep_size <= fabric.ranks_per_node else outside + (in_node if fabric.shared_links else 0)
        starts, times, speeds = [], [], []
        for size in table["row_bytes"]:
            starts.append(start_us(fabric, ep_size, exchange, by))
            times.append(bytes_us(fabric, ep_size, in_node * size, outside * size))
            speeds.append(slower * size / 1e3)  # GB/s of a time of one microsecond
        stages: tuple[str, ...] = ("dispatch", "combine")
        if len(published) == 1:
            stages = ("both",) if exchange == GATHER else ("one way",)
            if exchange == GATHER:
                starts, times = [sum(starts)], [sum(times)]
        for stage, value, start, time, speed in zip(stages, published, starts, times, speeds, strict=False):
            yield PublishedTime(
                source=table["source"],
                path=path,
                ep_size=ep_size,
                stage=stage,
                unit=table["unit"],
                published=float(value),
                published_us=float(value) if table["unit"] == "us" else speed / value,
                start_us=start,
                bytes_us=time,
                fits=fits,
                alike="unlike" not in table,
            )


def _rows_of_table(table: Mapping[str, Any], fabric: Fabric, ep_size: int) -> tuple[float, float]:
    """Rows of a rank in its node, and over the network. All ranks are alike, because published times have uniform routing."""
    wanted = demand(256, 8, ep_size, 0.0, 0)
    if table["exchange"] == PER_NODE and ep_size > fabric.ranks_per_node:
        nodes = ep_size // fabric.ranks_per_node
        reached = min(distinct_destinations(256, nodes, 8), table["max_nodes"])  # nodes that a token reaches
        forwarded = wanted.per_rank.sum() * (fabric.ranks_per_node - 1) / fabric.ranks_per_node
        return float(table["tokens"] * forwarded), float(table["tokens"] * reached * (nodes - 1) / nodes)
    if table["exchange"] == GATHER:
        return rows_of(fabric, ep_size, GATHER, table["tokens"], wanted, 0)
    rows = wanted.per_expert if table["exchange"] == PER_EXPERT else wanted.per_rank
    in_node = min(ep_size, fabric.ranks_per_node)
    each = float(rows[0]) * table["tokens"]
    return each * (in_node - 1), each * (ep_size - in_node)
