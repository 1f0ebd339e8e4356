"""Counters of this rank's steps for vLLM's Prometheus endpoint (/metrics). docs/metrics.md lists the series.

Each rank is a process of its own. It writes its counts into a file in PROMETHEUS_MULTIPROC_DIR, as the multi-process mode of
prometheus_client does, and vLLM's endpoint adds the files up. No rank sends a message for this, and no step waits.
"""

import os
from functools import cache

from prometheus_client import Counter
from vllm.logger import init_logger

from vllm_npu import envs
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.trust.recording import CollectiveCounter

logger = init_logger("vllm.npu.plugin.metrics")


@cache
def _series() -> dict[str, Counter]:
    return {
        name: Counter(f"vllm_npu:moe_{name}", meaning, labels)
        for name, meaning, labels in (
            ("steps", "Steps of the model by the strategy of its MoE layers.", ("strategy", "rank")),
            ("tokens", "Tokens of those steps, each counted by the first TP rank of its DP rank.", ("strategy", "rank")),
            ("sent_bytes", "Bytes sent to other ranks in those steps.", ("strategy", "rank")),
            (
                "fallbacks",
                "Steps that could not take the strategy asked for, and took another.",
                ("requested", "strategy", "rank"),
            ),
            ("agreement_failures", "Steps for which the ranks' plans differed.", ("rank",)),
        )
    }  # fmt: skip


class StepMetrics:
    """Counts this rank's steps. LOCAL: a few dictionary look-ups and writes to mapped memory in a step, no host sync."""

    def __init__(self, topology: ParallelTopology, sent: CollectiveCounter | None) -> None:
        self._rank = str(topology.rank)
        self._counts_tokens = topology.tp_rank == 0
        self._sent = sent
        self._sent_before = 0 if sent is None else sent.bytes_sent.total()
        self._strategy: str | None = None  # of the last step that has begun
        # The series shows 0 from the start, so that Prometheus sees its first increase.
        _series()["agreement_failures"].labels(self._rank)

    @classmethod
    def if_wanted(cls, topology: ParallelTopology, sent: CollectiveCounter | None) -> "StepMetrics | None":
        """The metrics. None if VLLM_NPU_METRICS is not 1. None with a warning in the log if vLLM could not show them."""
        if not envs.METRICS.read_flag():
            return None
        if not os.environ.get(envs.PROMETHEUS_FOLDER):
            logger.warning_once(
                "%s=1, and %s is not set, so vLLM's /metrics cannot show what workers count; start the server with vllm-npu "
                "serve, or set %s to an empty folder before the start",
                envs.METRICS.name,
                envs.PROMETHEUS_FOLDER,
                envs.PROMETHEUS_FOLDER,
            )
            return None
        return cls(topology, sent)

    def begin_step(self, requested: str, strategy: str, num_tokens: int, *, is_fallback: bool) -> None:
        """Count a step that begins, and the bytes that the step before it sent. LOCAL. Host sync: no."""
        if self._strategy is not None:
            self._count_sent(self._strategy)
        self._strategy = strategy
        self._count(requested, strategy, num_tokens, is_fallback=is_fallback)

    def end_step(self, requested: str, strategy: str, num_tokens: int, *, is_fallback: bool) -> None:
        """Count a step that has ended, and the bytes that it sent. LOCAL. Host sync: no.

        Callers that learn the strategy from the step itself call this in place of begin_step.
        """
        self._count(requested, strategy, num_tokens, is_fallback=is_fallback)
        self._count_sent(strategy)

    def _count(self, requested: str, strategy: str, num_tokens: int, *, is_fallback: bool) -> None:
        series = _series()
        series["steps"].labels(strategy, self._rank).inc()
        if self._counts_tokens:
            series["tokens"].labels(strategy, self._rank).inc(num_tokens)
        if is_fallback:
            series["fallbacks"].labels(requested, strategy, self._rank).inc()

    def _count_sent(self, strategy: str) -> None:
        if self._sent is None:
            return
        total = self._sent.bytes_sent.total()
        sent = total - self._sent_before if total >= self._sent_before else total  # a smaller total: it was reset
        _series()["sent_bytes"].labels(strategy, self._rank).inc(sent)
        self._sent_before = total

    def plans_differ(self) -> None:
        """Count a step that ends with PlanDisagreementError."""
        _series()["agreement_failures"].labels(self._rank).inc()
