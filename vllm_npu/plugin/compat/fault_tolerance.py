"""vLLM's fault tolerance (--enable-fault-tolerance, from 0.32 on), and how fault_tolerance=retry takes its place on CPUs.

vLLM's frame: the engine core catches an exception of a step, aborts its requests and waits for POST /fault_tolerance/apply with
the instruction "retry" (v1/fault_tolerance/engine_core_sentinel.py). Each rank needs a server of its own (an external load
balancer). "retry" makes the engine cores' group anew, and calls the workers' WorkerSentinel.retry
(v1/worker/sentinel/gpu_worker_sentinel.py).

What stays vLLM's under fault_tolerance=retry: the wrapper of the busy loop, the sentinels' status and their messages to the API
servers, and the call of the worker, Worker.handle_ft_command. What vLLM 0.32 lacks for a platform out of its tree, and what
stands here for it:

1. WorkerSentinel.__init__ refuses every all2all backend that is not in its closed set FT_BACKEND_SET. A platform, or its
   all2all manager's support_fault_tolerance, would have to be asked. take_worker_sentinel replaces the class.
2. WorkerSentinel is named in gpu_worker.Worker.__init__. A platform cannot give a class of its own: so too.
3. WorkerSentinel.retry calls torch.accelerator.synchronize(), which raises RuntimeError on a machine without an accelerator.
   cpu/worker_retry.py does not call it.
4. WorkerSentinel.retry makes one group anew: dp's cpu_group. The groups of ep and tp, and dp's device_group, over which gloo,
   HCCL and NCCL move tokens, stay those of the failure, and cannot be used. cpu/worker_retry.py makes all of them anew.
5. Nothing numbers the retries for a worker, and engine cores that failed a different number of times wait for one another
   under different keys (_dp_reinit_epoch). Here the workers' epoch numbers both.
6. An engine core learns only in its next collective that another one has failed, and ProcessGroup.shutdown() closes no
   connection of gloo. cpu/engine_retry.py drops all references to the group at once.
7. EngineCoreSentinel.on_fault leaves the scheduler's prefix cache as it is. The scheduler counts the blocks of a step as cached
   before the step fills them, so a later request with the same prefix would read what was never written. Here on_fault
   forgets all cached blocks.
8. EngineArgs refuses --enable-fault-tolerance without an external load balancer, because somebody must instruct all ranks. Here
   nobody has to, so start_retries turns it on later than that check.
"""

from typing import TYPE_CHECKING, Any

from vllm_npu import envs
from vllm_npu.errors import UnsupportedConfigError

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

BACKENDS = frozenset({"deepep_low_latency", "nixl_ep"})  # vLLM's FT_BACKEND_SET; importing it imports vLLM's GPU worker


def refuse_fault_tolerance(
    parallel_config: "ParallelConfig",
    backend: str | None = None,  # the all2all backend that will run; None: one that this platform's ranks cannot retry
) -> None:
    """Raise UnsupportedConfigError if the engine asks for fault tolerance that its ranks cannot give. Runs before any process
    starts; without it, vLLM's workers raise ValueError after they have started."""
    if not getattr(parallel_config, "enable_fault_tolerance", False) or backend in BACKENDS:
        return
    raise UnsupportedConfigError(
        f"--enable-fault-tolerance needs an all2all backend whose kernels mask a lost rank ({', '.join(sorted(BACKENDS))}), on "
        "GPUs; the exchanges of this package, on CPUs, NPUs and GPUs, have no hook in vLLM to open their groups anew. Leave "
        "out --enable-fault-tolerance and --fault-tolerance-config: a rank that ends or hangs is named on all others within "
        "the deadline, and the engine ends, or goes on with fault_tolerance=retry on CPUs (docs/trust.md)"
    )


def check_retry(vllm_config: "VllmConfig", *, on_cpus: bool) -> None:
    """Raise UnsupportedConfigError if ranks of this engine cannot go on after a failed step. Runs before any process starts."""
    parallel_config, model_config = vllm_config.parallel_config, vllm_config.model_config
    is_moe = model_config is not None and model_config.is_moe
    reasons = {
        "it makes gloo's groups anew, and those of HCCL and NCCL cannot be: use CPUs": not on_cpus,
        "it needs data-parallel ranks of an MoE model, since others do not wait for one another": (
            not is_moe or parallel_config.data_parallel_size < 2
        ),
        "tensor-parallel ranks on CPUs meet in vLLM's shared memory, where a wait has no end; set --tensor-parallel-size 1": (
            parallel_config.tensor_parallel_size > 1
        ),
        "a pipeline stage does not know which steps of other stages have failed; set --pipeline-parallel-size 1": (
            parallel_config.pipeline_parallel_size > 1
        ),
        "prefill context parallelism has groups that it was not tried with": (
            parallel_config.prefill_context_parallel_size > 1
        ),
        "a failed rearrangement may have moved some experts; leave out --enable-eplb": parallel_config.enable_eplb,
        "elastic EP makes groups by itself; leave out --enable-elastic-ep": parallel_config.enable_elastic_ep,
        "a connector may have sent blocks of the broken step; leave out --kv-transfer-config": (
            vllm_config.kv_transfer_config is not None
        ),
        "a draft model keeps tokens of the broken step; leave out --speculative-config": (
            vllm_config.speculative_config is not None
        ),
        "Ray's executor has no workers that this process may call; leave out --data-parallel-backend": (
            parallel_config.data_parallel_backend != "mp"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedConfigError(f"fault_tolerance=retry cannot run here: {reason}")


def start_retries(vllm_config: "VllmConfig") -> None:
    """Let vLLM's engine cores call the functions of take_engine_sentinel, and its workers those of take_worker_sentinel. Runs
    after vLLM has chosen its executor, before any process starts.

    Raises UnsupportedConfigError if the workers are no processes of their own.
    """
    from vllm.logger import init_logger  # vLLM imports this module's users before it knows its platform

    parallel_config = vllm_config.parallel_config
    if parallel_config.distributed_executor_backend != "mp":
        raise UnsupportedConfigError(
            "fault_tolerance=retry needs workers that are processes of the engine core (the executor mp, got "
            f"{parallel_config.distributed_executor_backend!r}); start the ranks with vllm serve"
        )
    parallel_config.enable_fault_tolerance = True
    if envs.COLLECTIVE_DEADLINE.read_if_set() is None:
        init_logger("vllm.npu.plugin.compat.fault_tolerance").warning_once(
            "fault_tolerance=retry: a late rank is given up after %s s; set %s to the longest step that you expect",
            envs.COLLECTIVE_DEADLINE.read(),
            envs.COLLECTIVE_DEADLINE.name,
        )


# COMPAT(vllm 0.32): a platform cannot name its sentinels (1 to 8 above). CAN REMOVE when vLLM asks the platform for them.
def take_engine_sentinel() -> None:
    """Let vLLM's engine cores in this process recover by themselves. A second call changes nothing. CPUs only: the other
    engines with fault tolerance on a CPU are refused."""
    from vllm.v1.fault_tolerance import EngineCoreSentinel

    from vllm_npu.plugin.cpu import engine_retry

    if EngineCoreSentinel.on_fault is engine_retry.on_fault:
        return
    theirs = EngineCoreSentinel.__init__

    def start(self: EngineCoreSentinel, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        engine_retry.watch_engines(self)

    EngineCoreSentinel.__init__ = start
    EngineCoreSentinel.on_fault = engine_retry.on_fault
    EngineCoreSentinel.retry = engine_retry.refuse_instruction


def take_worker_sentinel() -> None:
    """Let vLLM's worker in this process build our sentinel. A second call changes nothing."""
    from vllm.v1.worker import gpu_worker

    from vllm_npu.plugin.cpu.worker_retry import RetryingWorkerSentinel

    gpu_worker.WorkerSentinel = RetryingWorkerSentinel
