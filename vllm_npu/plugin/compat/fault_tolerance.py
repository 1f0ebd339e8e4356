"""vLLM's fault tolerance (--enable-fault-tolerance, from 0.32 on): what it asks for, and the hooks that it lacks.

vLLM's frame: the engine core catches an exception of a step, aborts its requests and waits for POST /fault_tolerance/apply with
the instruction "retry" (v1/fault_tolerance/engine_core_sentinel.py). Each rank needs a server of its own (an external load
balancer). "retry" makes the engine cores' group anew, and calls the workers' WorkerSentinel.retry
(v1/worker/sentinel/gpu_worker_sentinel.py).

What this package has for it: errors in seconds that name ranks, and new groups in a new epoch (trust/watchdog.py,
Watchdog.next_epoch; tools/launch.py calls it as a worker would). What vLLM 0.32 lacks, for any platform out of its tree:

1. WorkerSentinel.__init__ refuses every all2all backend that is not in its closed set FT_BACKEND_SET. A platform, or its
   all2all manager's support_fault_tolerance, would have to be asked.
2. WorkerSentinel is named in gpu_worker.Worker.__init__. A platform cannot give a class of its own.
3. WorkerSentinel.retry calls torch.accelerator.synchronize(), which raises RuntimeError on a machine without an accelerator.
4. WorkerSentinel.retry makes one group anew: dp's cpu_group. The groups of ep and tp, and dp's device_group, over which gloo,
   HCCL and NCCL move tokens, stay those of the failure, and cannot be used. The device communicator would have to be told to
   make its groups anew, on the ports that the engine cores have agreed on.
5. Nothing numbers the retries for a worker. The engine core keeps _dp_reinit_epoch to itself.
"""

from typing import TYPE_CHECKING

from vllm_npu.errors import UnsupportedConfigError

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

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
        "the deadline, and the engine ends (docs/trust.md)"
    )
