"""What the graphs of a model hold: their strategies, their token counts, and the collectives that each replay runs again."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.trust.recording import CollectiveCounter

WAY_OUT = "start the engine with the moe_comm that you want, or with --enforce-eager"


@dataclass(frozen=True, slots=True)
class Held:
    """What was frozen when a graph was captured."""

    num_tokens_across_dp: tuple[int, ...]
    strategy: str


class CapturedSteps:
    """The captured steps of one model in this process.

    The first step of a graph captures it. Each later step of the graph replays it: no layer runs Python, so the plan of the
    replay must be the plan that was captured. LOCAL. Host sync: no.
    """

    def __init__(self, counter: CollectiveCounter | None) -> None:
        self._counter = counter
        self._held: dict[Hashable, Held] = {}
        self._collectives: dict[Hashable, tuple[Counter[str], Counter[str]]] = {}  # calls and bytes of a replay
        self._capturing: tuple[Hashable, Counter[str], Counter[str]] | None = None  # the graph; calls and bytes before

    def begin(self, graph: Hashable | None, step: Held) -> None:
        """Note a step that begins. `graph` names the graph that holds it; None: it runs eagerly.

        Counts the collectives of a replay. Raises UnsupportedConfigError if the graph holds another step.
        """
        self._end_capture()
        if graph is None:
            return
        held = self._held.get(graph)
        if held is None:
            self._held[graph] = step
            if self._counter is not None:
                self._capturing = graph, Counter(self._counter.calls), Counter(self._counter.bytes_sent)
            return
        if held != step:
            raise UnsupportedConfigError(
                f"the graph {graph} holds {held.strategy} for {list(held.num_tokens_across_dp)} tokens of the data-parallel "
                f"ranks, and this step wants {step.strategy} for {list(step.num_tokens_across_dp)}; {WAY_OUT}"
            )
        if self._counter is not None:
            calls, sent = self._collectives[graph]
            self._counter.calls.update(calls)
            self._counter.bytes_sent.update(sent)

    def check_change(self, strategy: str) -> None:
        """Raise UnsupportedConfigError if there are graphs, since a graph keeps the strategy that it was captured with."""
        if self._held:
            strategies = ", ".join(sorted({held.strategy for held in self._held.values()}))
            raise UnsupportedConfigError(
                f"moe_comm cannot change to {strategy}: {len(self._held)} captured graphs hold {strategies}; {WAY_OUT}"
            )

    def _end_capture(self) -> None:
        """Keep what the capture counted. The step after it begins now, and no other step was counted in between."""
        if self._capturing is not None and self._counter is not None:
            graph, calls, sent = self._capturing
            self._collectives[graph] = self._counter.calls - calls, self._counter.bytes_sent - sent
        self._capturing = None
