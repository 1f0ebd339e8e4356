"""Ends what vllm-ascend's dynamic EPLB leaves: a wait for a process that has ended, and processes whose worker ends.

Each worker has a process that decides where experts go. vllm-ascend catches every error there, logs "Subprocess crashed, EPLB
optimization will stop" and ends the process. The worker waits for its next decision without a time limit. vllm-ascend ends
neither this process nor that of the dictionary which the two share. They outlive a worker that ends by an error, and hold its
output: whoever reads the output to its end then waits for them.
"""

import queue
from typing import Any

from vllm_npu.errors import ExpertBalancerError

LOOK_SECONDS = 1.0  # between two looks at the process


class WatchedDecisions:
    """Takes the place of the queue `block_update_q`, in the worker alone."""

    def __init__(
        self,
        decisions: Any,  # multiprocessing.Queue
        process: Any,  # multiprocessing.Process that writes to it
    ) -> None:
        self._decisions = decisions
        self._process = process

    def get(self) -> Any:
        """Wait for the next decision. LOCAL. Raises ExpertBalancerError if the process has ended and left none."""
        while True:
            has_ended = not self._process.is_alive()  # looked at before the queue: what it wrote is found
            try:
                return self._decisions.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if has_ended:
                    raise ExpertBalancerError(
                        "vllm-ascend's process that decides where experts go has ended, and this rank needs its decision; the "
                        "log has its error under [eplb/worker]. Choose another eplb_policy_type, or leave dynamic_eplb out"
                    ) from None


def watch_balancer(model_runner: Any) -> None:
    """Make the runner's wait for a decision end when the deciding process has ended. Without dynamic EPLB it does nothing."""
    if getattr(model_runner, "dynamic_eplb", False):
        balancer = model_runner.eplb_process
        balancer.block_update_q = WatchedDecisions(balancer.block_update_q, model_runner.process)


def end_balancer(model_runner: Any) -> None:
    """End the two processes of dynamic EPLB. Without dynamic EPLB it does nothing. Safe to call twice."""
    if getattr(model_runner, "dynamic_eplb", False):
        model_runner.eplb_updator.shutdown()
        model_runner.manager.shutdown()
