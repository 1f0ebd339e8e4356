"""What an engine core does after a failed step under fault_tolerance=retry: it meets the others, and runs its requests again.

vLLM's fault_tolerant_wrapper calls on_fault in place of EngineCoreSentinel.on_fault. vLLM's own waits for an instruction from
outside. All requests lose their cached tokens here, since the scheduler counts a block as cached before the step that fills it.
"""

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vllm.distributed.utils import init_gloo_process_group, stateless_destroy_torch_distributed_process_group
from vllm.logger import init_logger
from vllm.v1.engine import EngineStatusType
from vllm.v1.fault_tolerance.utils import FaultToleranceRequest, FaultToleranceResult
from vllm.v1.request import RequestStatus

from vllm_npu import envs
from vllm_npu.transport.renewal import collect, drop_frames, highest, set_time_out, store_of_epoch
from vllm_npu.trust.watchdog import FAILURE_SECONDS

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.fault_tolerance import EngineCoreSentinel

logger = init_logger("vllm.npu.plugin.cpu.engine_retry")

RETRY = "retry"  # vLLM's name of the instruction


def watch_engines(sentinel: "EngineCoreSentinel") -> None:
    """Give up on an engine core that does not come to the engines' own all-reduce. LOCAL. Call it once the engine is built."""
    if hasattr(sentinel.engine, "dp_group"):
        set_time_out(sentinel.engine.dp_group, _engine_deadline())


def _engine_deadline() -> float:
    """Seconds. An engine comes late by as much as its worker needs to notice another late worker."""
    return envs.COLLECTIVE_DEADLINE.read_seconds() + FAILURE_SECONDS


def on_fault(sentinel: "EngineCoreSentinel", error: Exception) -> None:
    """Return when all ranks are in a new epoch and this engine can go on. COLLECTIVE over the engine cores.

    Requests run again from their last token, and their clients see a pause. Requests that were in a step in which this engine's
    own worker raised an exception end with finish_reason "abort": they may be its cause. Raises `error`, which ends the engine,
    if a rank has ended, if a worker says that no retry can help, or after vLLM's engine_recovery_timeout_sec.
    """
    began, engine, ended = time.monotonic(), sentinel.engine, 0
    if not engine.is_running():
        raise error  # the others may have shut down already
    sentinel.resumed.clear()
    _set_status(sentinel, EngineStatusType.UNHEALTHY, type(error).__name__)
    logger.warning("A step failed, and all ranks will meet in a new epoch: %s", error)
    drop_frames(error)
    _leave_group(engine)
    in_step = [request.request_id for request in engine.scheduler.running]
    _requeue(engine.scheduler)
    while True:
        answer = _ask_worker(engine)
        if answer["own_fault"] and in_step:
            engine._send_abort_outputs(engine.scheduler.finish_requests(in_step, RequestStatus.FINISHED_ABORTED))
            ended, in_step = len(in_step), []
        why_not = answer["why_not"] or _meet(engine, answer["epoch"])
        waited = time.monotonic() - began
        if not why_not:
            break
        if answer["hopeless"] or waited > sentinel.engine_recovery_timeout_sec or not engine.is_running():
            logger.error("No new epoch after %.1f s, and the engine ends: %s", waited, why_not)
            raise error
        logger.warning("No new epoch after %.1f s: %s", waited, why_not)
    _set_status(sentinel, EngineStatusType.HEALTHY)
    logger.warning(
        "Epoch %d begins %.1f s after the error: %d requests run again, and %d ended with it",
        answer["epoch"],
        waited,
        len(engine.scheduler.requests),
        ended,
    )
    sentinel.resumed.set()


def _set_status(sentinel: "EngineCoreSentinel", status: EngineStatusType, fault: str | None = None) -> None:
    """For GET /fault_tolerance/status."""
    sentinel.status_type, sentinel.fault_info = status, fault
    sentinel._push_status()


def _leave_group(engine: Any) -> None:  # DPEngineCoreProc
    """Leave the engine cores' group, so that those that wait in it fail now. LOCAL, safe to call twice."""
    if engine.dp_group is not None:
        stateless_destroy_torch_distributed_process_group(engine.dp_group)
        engine.dp_group = None
        collect()


def _requeue(scheduler: "Scheduler") -> None:
    """Let all requests start from their prompts and the tokens that they have, and forget all cached blocks. LOCAL."""
    scheduler.reset_prefix_cache(reset_running_requests=True)
    for request in scheduler.requests.values():
        # vLLM expects the output of the broken step, and would drop it. It never comes.
        request.num_in_flight_tokens = request.num_stale_output_tokens = 0
        request.drop_stale_output = False
        if request.status is RequestStatus.PREEMPTED and not request.num_output_tokens:
            request.status = RequestStatus.WAITING  # the worker may not know it
    scheduler.reset_encoder_cache()


def _ask_worker(engine: Any) -> dict[str, Any]:  # DPEngineCoreProc
    """Let the worker meet the others in a new epoch. COLLECTIVE over the workers.

    Returns the answer of RetryingWorkerSentinel.retry.
    """
    executor = engine.model_executor
    kept = [request.request_id for request in engine.scheduler.requests.values() if request.num_output_tokens]
    command = FaultToleranceRequest(instruction=RETRY, params={"kept": kept})
    answer: dict[str, Any]
    try:
        [answer] = executor.collective_rpc("handle_ft_command", args=(command,))
    except Exception as error:  # noqa: BLE001 - the executor raises bare errors, also where its worker has ended
        return {"own_fault": False, "epoch": 0, "why_not": f"the worker failed: {error}", "hopeless": True}
    return answer


def _meet(engine: Any, epoch: int) -> str | None:  # DPEngineCoreProc
    """Open the engine cores' group of this epoch, and begin a wave together. COLLECTIVE over the engine cores. Returns why not,
    if one does not come."""
    deadline = _engine_deadline()
    try:
        store = store_of_epoch(engine.dp_store, epoch, deadline)
        engine.dp_group = init_gloo_process_group(store, engine.dp_rank, engine.dp_size, timedelta(seconds=deadline))
        # An engine may have ended the wave in whose last step another one failed.
        engine.current_wave = highest(engine.dp_group, engine.current_wave)
    except RuntimeError as error:
        drop_frames(error)
        _leave_group(engine)
        return f"an engine core did not come: {error}"
    engine.step_counter = 0
    engine.engines_running = True
    return None


def refuse_instruction(sentinel: "EngineCoreSentinel", request: FaultToleranceRequest) -> FaultToleranceResult:
    """In place of EngineCoreSentinel.retry, for POST /fault_tolerance/apply."""
    reason = "fault_tolerance=retry of vllm_npu retries by itself, and takes no instruction; wait"
    return FaultToleranceResult(request_id=request.request_id, success=False, reason=reason)
