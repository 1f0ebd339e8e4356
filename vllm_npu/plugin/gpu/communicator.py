"""vLLM's device communicator on GPUs, with the all2all manager and the all-reduce that the options name."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.distributed import get_dp_group, get_tp_group
from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger

from vllm_npu import __version__
from vllm_npu.all2all import All2AllManager, manager_class
from vllm_npu.all2all.flashinfer import ALL_REDUCE_MAX_BYTES, FlashInferAllReduce
from vllm_npu.all2all.pplx import PPLXAll2AllManager
from vllm_npu.all2all.strategy import StrategyAll2AllManager
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin.eplb_communicators import DEVICE_TRANSPORTS
from vllm_npu.plugin.gpu.vllm_manager import VllmAll2AllManager, VllmStep, rows_of_ranks
from vllm_npu.plugin.groups import open_watchdog
from vllm_npu.plugin.metrics import StepMetrics
from vllm_npu.plugin.options import Options, topology_of
from vllm_npu.strategies.table import AUTO
from vllm_npu.transport.base import Groups, Transport
from vllm_npu.transport.gloo import GlooTransport
from vllm_npu.transport.table import transport_class
from vllm_npu.trust.agreement import agree
from vllm_npu.trust.recording import record
from vllm_npu.trust.self_test import OFF, run_self_test
from vllm_npu.trust.settings import Settings, agree_on_settings, prepare_together
from vllm_npu.trust.step_lookout import StepLookout

logger = init_logger("vllm.npu.plugin.gpu.communicator")

DIFFERENT_STARTS = (
    "ranks start with different exchanges; start all of them with the same versions, model and vllm_npu options"
)


class CudaMoECommunicator(CudaCommunicator):
    """CudaCommunicator, unchanged where no option names a manager or an all-reduce.

    The constructor for the EP group is COLLECTIVE over it: the ranks compare their options, whether or not one names a manager.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or self.world_size < 2:
            return
        options = Options.of(vllm_config)
        if self.use_all2all:
            manager = self.build_manager(vllm_config, options)
            if manager is not None:
                self.all2all_manager: All2AllManagerBase | None = manager  # replaces vLLM's, which holds nothing
                logger.info_once("All2all manager: %s", type(manager.inner).__name__)
        if options.flashinfer_all_reduce and self.unique_name.split(":")[0] == "tp":
            major, minor = torch.cuda.get_device_capability()
            self.fi_ar_comm = FlashInferAllReduce(
                self.cpu_group, self.device_group, max_bytes=ALL_REDUCE_MAX_BYTES.get(10 * major + minor, {})
            )

    def build_manager(self, vllm_config: VllmConfig, options: Options) -> VllmAll2AllManager | None:
        """Build the manager that the options name. None: vLLM's own manager stays. COLLECTIVE over the group.

        The ranks first compare their variables and options. With a manager they then run the self-test of the collectives, and
        open the watchdog. Raises PlanDisagreementError, LyingCollectiveError and UnsupportedConfigError.
        """
        if self.device_group is None:
            if options.all2all is None and options.exchange is None:
                return None
            raise UnsupportedConfigError("all2all managers of vllm_npu need torch's process groups, not stateless ones")
        gloo, world = GlooTransport(self.cpu_group, "ep-vote"), get_world_group()
        settings = agree_on_settings(gloo, world.rank, world.world_size)
        vote = record(gloo, None, settings.ring, self.ranks)
        topology = topology_of(vllm_config.parallel_config)
        agree(
            {
                "vllm_npu": __version__,
                "topology": f"TP{topology.tp_size} DP{topology.dp_size} EP{topology.ep_size}",
                "moe_comm": options.exchange,
                "all2all": options.all2all,
                "self_test": options.self_test,
                "experts": vllm_config.model_config.get_num_experts(),
                "enforce_eager": vllm_config.model_config.enforce_eager,
            },
            vote,
            difference=DIFFERENT_STARTS,
        )
        found = prepare_together(lambda: None if options.all2all is None else manager_class(options.all2all), vote)
        if options.exchange is None and found is None:
            return None  # vLLM's own
        groups = self._groups(vllm_config, settings)
        watchdog = open_watchdog(groups, vote, settings.deadline)
        self._test_collectives(groups, vote, options.self_test)
        if settings.counter is not None:
            settings.counter.reset()  # the counts leave the self-test out
        inner = self._build(vllm_config, options.exchange, found, groups)
        metrics = StepMetrics.if_wanted(groups.topology, settings.counter)
        return VllmAll2AllManager(inner, StepLookout(watchdog, groups=(groups.tp, groups.dp, groups.ep)), metrics)

    def _build(
        self, vllm_config: VllmConfig, exchange: str | None, named: type[All2AllManager] | None, groups: Groups
    ) -> All2AllManager:
        num_experts = int(vllm_config.model_config.get_num_experts())
        if named is None:
            return StrategyAll2AllManager(
                groups, self.cpu_group, strategy=exchange or AUTO, num_experts=num_experts, running=VllmStep()
            )
        if named is PPLXAll2AllManager:
            return PPLXAll2AllManager(
                groups,
                rows_of_ranks,
                self.cpu_group,
                num_experts=num_experts,
                max_tokens_per_rank=int(vllm_config.scheduler_config.max_num_batched_tokens),
                internode=bool(getattr(self.all2all_manager, "internode", False)),
                micro_batch=VllmStep().micro_batch,
            )
        return named(groups, rows_of_ranks, self.cpu_group)

    def _groups(self, vllm_config: VllmConfig, settings: Settings) -> Groups:
        tp, dp = get_tp_group(), get_dp_group()
        transport = transport_class(DEVICE_TRANSPORTS[self.device.type])

        def opened(process_group: Any, name: str, ranks: list[int]) -> Transport:
            return record(transport(process_group, name), settings.counter, settings.ring, ranks)  # type: ignore[call-arg, arg-type]

        return Groups(
            topology_of(vllm_config.parallel_config, tp_rank=tp.rank_in_group, dp_rank=dp.rank_in_group),
            opened(tp.device_group, "tp", tp.ranks),
            opened(dp.device_group, "dp", dp.ranks),
            opened(self.device_group, "ep", self.ranks),
        )

    def _test_collectives(self, groups: Groups, vote: Transport, mode: str) -> None:
        if mode == OFF:
            return
        seconds = run_self_test(groups, vote, self.device, mode)
        logger.info_once("Self-test (%s) of collectives on %s: passed in %.0f ms", mode, groups.topology, seconds * 1e3)
