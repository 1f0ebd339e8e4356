"""What the ranks' steps come to, at vLLM's Prometheus endpoint (/metrics): docs/metrics.md lists the series.

Ranks are processes of their own, so the numbers travel as prometheus_client's multi-process mode has it: each process writes
into a file in PROMETHEUS_MULTIPROC_DIR, and vLLM's endpoint adds the files up. Nothing is sent, and no step waits.
"""

import os
from functools import cache

from prometheus_client import Counter
from vllm.logger import init_logger

from vllm_npu import envs
from vllm_npu.core.topology import ParallelTopology
from vllm_npu.trust.recording import CollectiveCounter

logger = init_logger("vllm.npu.metrics")


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
    """Counts this rank's steps. A few dictionary look-ups and writes to mapped memory a step; no device, no other rank."""

    def __init__(self, topology: ParallelTopology, sent: CollectiveCounter | None) -> None:
        self._rank = str(topology.rank)
        self._counts_tokens = topology.tp_rank == 0
        self._sent = sent
        self._sent_before = 0 if sent is None else sent.bytes_sent.total()
        self._strategy: str | None = None  # of the step that has begun last
        _series()["agreement_failures"].labels(self._rank)  # at 0, so that its first increase is one

    @classmethod
    def if_wanted(cls, topology: ParallelTopology, sent: CollectiveCounter | None) -> "StepMetrics | None":
        """The metrics, or None where VLLM_NPU_METRICS is not 1, or nothing would show them, which is logged."""
        if not envs.METRICS.read_flag():
            return None
        if not os.environ.get(envs.PROMETHEUS_FOLDER):
            logger.warning_once(
                "%s=1, and %s is not set, without which vLLM's /metrics cannot show what workers count; start the server "
                "by vllm-npu serve, or set it to an empty folder before the start",
                envs.METRICS.name,
                envs.PROMETHEUS_FOLDER,
            )
            return None
        return cls(topology, sent)

    def begin_step(self, requested: str, strategy: str, num_tokens: int, *, is_fallback: bool) -> None:
        """Count a step that begins, and what the one before it sent. LOCAL, no host sync."""
        series = _series()
        if self._sent is not None and self._strategy is not None:
            total = self._sent.bytes_sent.total()
            sent = total - self._sent_before if total >= self._sent_before else total  # less: the counter began anew
            series["sent_bytes"].labels(self._strategy, self._rank).inc(sent)
            self._sent_before = total
        self._strategy = strategy
        series["steps"].labels(strategy, self._rank).inc()
        if self._counts_tokens:
            series["tokens"].labels(strategy, self._rank).inc(num_tokens)
        if is_fallback:
            series["fallbacks"].labels(requested, strategy, self._rank).inc()

    def plans_differ(self) -> None:
        """Count a step that ends in PlanDisagreementError."""
        _series()["agreement_failures"].labels(self._rank).inc()
