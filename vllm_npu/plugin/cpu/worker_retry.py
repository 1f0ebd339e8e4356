"""What a worker does after a failed step under fault_tolerance=retry: all its groups are made anew in a new epoch.

vLLM's engine core calls WorkerSentinel.retry through Worker.handle_ft_command. vLLM's own sentinel takes two all2all backends
only, and makes one group anew (plugin/compat/fault_tolerance.py).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from vllm.distributed import parallel_state
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.fault_tolerance.utils import FaultToleranceRequest
from vllm.v1.worker.sentinel.gpu_worker_sentinel import WorkerSentinel

from vllm_npu.errors import LyingCollectiveError, PlanDisagreementError, TransportError, UnsupportedConfigError
from vllm_npu.plugin.groups import follow_new_groups, leave_groups, present_watchdog
from vllm_npu.plugin.step_planner import restart_planners
from vllm_npu.transport.renewal import ProcessGroups, came_from_a_collective, drop_frames, set_time_out
from vllm_npu.trust.watchdog import Watchdog

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger("vllm.npu.plugin.cpu.worker_retry")

MOST_FRUITLESS = 3  # epochs without a step that ends; then a retry does not help
NO_RETRY_HELPS = (LyingCollectiveError, UnsupportedConfigError)


class RetryingWorkerSentinel(WorkerSentinel):
    """Names the culprit of a failed step, and makes this worker's groups anew."""

    def __init__(self, worker: "Worker") -> None:
        # Not vLLM's __init__, which refuses all2all backends of other platforms.
        self.worker = worker
        self._fault: str | None = None  # of the step that failed in this epoch
        self._own_fault = False  # it failed in this worker, and not in a collective
        self._hopeless = False
        self._steps = 0  # that ended in this epoch
        self._fruitless = 0  # epochs one after another in which no step ended
        self._watchdog: Watchdog | None = None  # of the newest epoch that this rank has entered
        self._process_groups: ProcessGroups | None = None
        self._watches_vllm = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each call of the model runner. An error that leaves it names the ranks that caused it. LOCAL.

        After an error, every step raises until a retry: an engine may have asked for the next step already.
        """
        if self._fault is not None:
            raise RuntimeError(f"this worker waits for a new epoch since a step failed: {self._fault}")
        try:
            yield
        except Exception as error:
            named = self._named(error)
            self._fault = f"{type(named).__name__}: {named}"
            self._fruitless = 0 if self._steps else self._fruitless + 1
            self._hopeless = isinstance(named, NO_RETRY_HELPS) or self._fruitless > MOST_FRUITLESS
            if named is error:
                raise
            raise named from error
        self._steps += 1
        if not self._watches_vllm and (watchdog := present_watchdog()) is not None:
            watch_vllms_groups(watchdog.deadline)
            self._watches_vllm = True

    def _named(self, error: Exception) -> Exception:
        """The error, or one that names ranks where a collective of vLLM's own failed. Tells other ranks of an own fault."""
        watchdog = self._watchdog or present_watchdog()
        if isinstance(error, (TransportError, PlanDisagreementError)) or watchdog is None:
            return error
        if came_from_a_collective(error):
            return watchdog.failure("a collective of vLLM", "dp", watchdog.rank, str(error))
        self._own_fault = True
        watchdog.tell_fault(error)
        return error

    def retry(self, ft_request: FaultToleranceRequest) -> dict[str, Any]:
        """Leave all groups, meet the other ranks in a new epoch, and make the groups anew. COLLECTIVE over all workers.

        Returns "epoch", and why there is none yet. "hopeless": no later call can help. "own_fault": the step failed in this
        worker itself. Takes the deadline and FAILURE_SECONDS where a rank does not come.
        """
        answer = {"own_fault": self._own_fault, "epoch": 0, "why_not": None, "hopeless": False}
        watchdog = self._watchdog or present_watchdog()
        if watchdog is None:
            return answer | {"why_not": "the first step had not begun", "hopeless": True}
        if self._hopeless:
            return answer | {"why_not": f"{self._fault} (epochs without a step: {self._fruitless})", "hopeless": True}
        self._forget_requests(ft_request.params["kept"])
        if self._process_groups is None:
            self._process_groups = ProcessGroups(timeout=watchdog.deadline)
        times = [time.monotonic()]
        try:
            leave_epoch(self._process_groups)
            times.append(time.monotonic())
            watchdog = self._watchdog = watchdog.next_epoch()
            times.append(time.monotonic())
            open_epoch(self._process_groups, watchdog, use_all2all=self.worker.parallel_config.use_all2all)
        except RuntimeError as error:  # RankFailureError is one, and so are all errors of torch.distributed
            drop_frames(error)
            return answer | {"why_not": f"{type(error).__name__}: {error}", "hopeless": bool(watchdog.ended())}
        self._fault, self._own_fault, self._steps = None, False, 0
        seconds = [end - begin for begin, end in pairwise([*times, time.monotonic()])]
        logger.info(
            "Epoch %d: left the old groups in %.1f s, met all ranks after %.1f s, opened groups in %.1f s",
            watchdog.epoch,
            *seconds,
        )
        return answer | {"epoch": watchdog.epoch}

    def _forget_requests(self, kept: Sequence[str]) -> None:
        """Take all requests out of the batch, and forget those that the scheduler will send as new ones. LOCAL."""
        runner: Any = self.worker.model_runner
        runner.reset_encoder_cache()
        if self.worker.use_v2_model_runner:
            self._clean_worker_state()  # the scheduler sends all of them as new ones
            return
        states = {name: runner.requests[name] for name in kept if name in runner.requests}
        logprobs = {name: runner.num_prompt_logprobs[name] for name in states if name in runner.num_prompt_logprobs}
        self._clean_worker_state()
        runner.requests.clear()
        runner.requests.update(states)
        runner.num_prompt_logprobs.clear()
        runner.num_prompt_logprobs.update(logprobs)


def watch_vllms_groups(deadline: float) -> None:
    """Let the collectives of vLLM's own groups of the first epoch fail after the deadline, in seconds. LOCAL.

    The transports set it for the groups that they use. vLLM agrees on token counts in a group that none of them uses.
    """
    for coordinator in _coordinators():
        if coordinator.world_size > 1:
            set_time_out(coordinator.device_group, deadline)
            set_time_out(coordinator.cpu_group, deadline)


def leave_epoch(process_groups: ProcessGroups) -> None:
    """Drop every reference to the groups of the present epoch, vLLM's and ours. LOCAL, safe to call twice."""
    leave_groups()
    for coordinator in _coordinators():
        coordinator.device_communicator = None
        for group in ("device_group", "cpu_group"):
            coordinator.__dict__.pop(group, None)
    process_groups.leave()


def open_epoch(process_groups: ProcessGroups, watchdog: Watchdog, *, use_all2all: bool) -> None:
    """Make the groups of all of vLLM's coordinators anew, as their constructors do. COLLECTIVE over all workers.

    watchdog: of the epoch. use_all2all: ParallelConfig's. Raises RuntimeError if a rank does not come in time.
    """
    process_groups.open_world(watchdog.epoch)
    communicator_class = resolve_obj_by_qualname(current_platform.get_device_communicator_cls())
    for coordinator in _coordinators():
        coordinator.device_group = process_groups.subgroup(coordinator.group_ranks)
        coordinator.cpu_group = process_groups.subgroup(coordinator.group_ranks)
        if coordinator.use_device_communicator and coordinator.world_size > 1:
            coordinator.device_communicator = communicator_class(
                cpu_group=coordinator.cpu_group,
                device=coordinator.device,
                device_group=coordinator.device_group,
                unique_name=coordinator.unique_name,
                use_all2all=use_all2all,  # heeded by the group of ep only
            )
    follow_new_groups(watchdog)
    restart_planners()


def _coordinators() -> list[parallel_state.GroupCoordinator]:
    """vLLM's living groups, in the order in which every rank has made them."""
    living = [reference() for reference in parallel_state._groups.values()]
    return [coordinator for coordinator in living if coordinator is not None]
