"""Configurations are checked, and wrong ones refused, when vLLM builds its configuration: before any process starts."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import psutil
import torch
import vllm
from pydantic import ValidationError
from vllm import LLM, EngineArgs
from vllm.config import CacheConfig, ParallelConfig, VllmConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.plugins import load_general_plugins
from vllm.utils import cpu_resource_utils
from vllm.utils.ompmultiprocessing import OMPProcessManager

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.all2all import FLASHINFER, PPLX
from vllm_npu.cli import doctor as doctor_command
from vllm_npu.cli import plan as plan_command
from vllm_npu.core.limits import DEVICES, PORTABLE
from vllm_npu.envs import CPU_OMP_THREADS_BIND
from vllm_npu.errors import HcclBufferError, UnsupportedConfigError, UnsupportedDeviceError
from vllm_npu.plugin import compat, engine_check, options
from vllm_npu.plugin.gpu.config_check import WORKER as GPU_WORKER
from vllm_npu.plugin.gpu.config_check import required_backend, set_worker
from vllm_npu.plugin.options import Options
from vllm_npu.strategies.start_checks import PlannedShape
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.doctor.examination import examine
from vllm_npu.tools.engines.tiny_models import QWEN3_MOE, write_tiny_model

WORKER = "vllm_npu.plugin.cpu.worker.CpuMoEWorker"
EP2 = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
EXTERNAL_DP2 = {"data_parallel_size": 2, "data_parallel_rank": 0, "data_parallel_external_lb": True}


@pytest.fixture(scope="module", autouse=True)
def plugins_loaded():
    load_general_plugins()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restore the environment, which vLLM changes when it builds a configuration."""
    before = dict(os.environ)
    for name in (CPU_OMP_THREADS_BIND, "VLLM_NPU_MOE_COMM"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_tiny_model(QWEN3_MOE, tmp_path_factory.mktemp("config_models") / "moe"))


def engine_config(model: str, section=None, **arguments) -> VllmConfig:
    """Build a configuration from arguments as vLLM does. `section` holds the plugin's options."""
    additional = {} if section is None else {"additional_config": {"vllm_npu": section}}
    return EngineArgs(model=model, **additional, **arguments).create_engine_config()


# ------------------------------------------------------------------------------------------------------ strategies


@pytest.mark.parametrize("name", ["auto", *STRATEGIES])
def test_every_strategy_can_be_named(model, name):
    assert Options.of(engine_config(model, {"moe_comm": name}, **EP2)).moe_comm == name


def test_the_self_test_is_quick_unless_the_section_says_otherwise(model):
    assert Options.of(engine_config(model, **EP2)).self_test == "quick"
    assert Options.of(engine_config(model, {"self_test": "off"}, **EP2)).self_test == "off"


def test_without_expert_parallelism_some_strategies_remain(model):
    for name in ("auto", "allgather", "naive"):
        assert Options.of(engine_config(model, {"moe_comm": name}, tensor_parallel_size=2)).moe_comm == name


def test_the_environment_is_the_fallback_and_the_configuration_wins(model, environment):
    assert Options.of(engine_config(model, **EP2)).moe_comm == "auto"
    environment.setenv("VLLM_NPU_MOE_COMM", "naive")
    assert Options.of(engine_config(model, **EP2)).moe_comm == "naive"
    assert Options.of(engine_config(model, {}, **EP2)).moe_comm == "naive"
    assert Options.of(engine_config(model, {"moe_comm": "all2all"}, **EP2)).moe_comm == "all2all"


def test_other_plugins_sections_are_not_ours(model):
    arguments = EngineArgs(model=model, additional_config={"another_plugin": {"level": 3}}, **EP2)
    assert Options.of(arguments.create_engine_config()).moe_comm == "auto"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"moe_comm": "fastest"}, "unknown moe_comm 'fastest'; there are: auto, mc2, all2all, allgather, naive"),
        ({"moe_com": "mc2"}, "has unknown keys ['moe_com']; there are: moe_comm, all2all, flashinfer_all_reduce"),
        ({"self_test": "slow"}, "has self_test='slow'; there are: quick, full, off"),
        ({"fault_tolerance": "always"}, "has fault_tolerance='always'; there are: off, retry"),
        ({"moe_comm": "mc2", "depth": 1, "age": 2}, "has unknown keys ['age', 'depth']"),
        ("mc2", "additional_config['vllm_npu'] is 'mc2'; it must be a dictionary"),
        (["mc2"], "additional_config['vllm_npu'] is ['mc2']; it must be a dictionary"),
        ({"moe_comm": ["mc2"]}, "moe_comm"),
        ({"moe_comm": 5}, "moe_comm"),
        ({"moe_comm": 0}, "moe_comm"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(model, section, message):
    with pytest.raises(ValueError) as error:
        engine_config(model, section, **EP2)
    assert message in str(error.value)


def test_a_strategy_in_the_environment_that_does_not_exist_is_refused(model, environment):
    environment.setenv("VLLM_NPU_MOE_COMM", "fastest")
    with pytest.raises(ValueError, match="unknown moe_comm 'fastest'; there are: auto"):
        engine_config(model, **EP2)


@pytest.mark.parametrize("name", [name for name, row in STRATEGIES.items() if row.needs_expert_parallel])
@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel_size": 2}, {"enable_expert_parallel": True}], ids=str)
def test_a_strategy_that_needs_expert_parallelism_says_how_to_get_it(model, name, sizes):
    with pytest.raises(ValueError) as error:
        engine_config(model, {"moe_comm": name}, **sizes)
    assert f"{name} needs ep_size > 1 (got 1 on TP" in str(error.value)
    assert "use allgather, or start vLLM with --enable-expert-parallel" in str(error.value)


# --------------------------------------------------------------------------------------------- parallel settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_dbo": True}, "start vLLM without --enable-dbo"),
        (
            {"enable_dbo": True, "all2all_backend": "deepep_low_latency", "data_parallel_size": 2},
            "start vLLM without --enable-dbo",
        ),
        ({"prefill_context_parallel_size": 2}, "set --prefill-context-parallel-size 1"),
        (
            {"prefill_context_parallel_size": 2, "tensor_parallel_size": 1},
            "set --prefill-context-parallel-size 1",
        ),
        ({"expert_placement_strategy": "round_robin"}, "set --expert-placement-strategy linear"),
        ({"enable_fault_tolerance": True, **EXTERNAL_DP2}, "Leave out --enable-fault-tolerance"),
        (
            {"fault_tolerance_config": {"engine_recovery_timeout_sec": 9}, **EXTERNAL_DP2},
            "Leave out --enable-fault-tol",
        ),
        (
            {"enable_fault_tolerance": True, "all2all_backend": "deepep_low_latency", **EXTERNAL_DP2},
            "Leave out --enable-fault-tolerance",
        ),
    ],
    ids=str,
)
def test_what_the_layers_cannot_do_is_refused_with_the_remedy(model, arguments, message):
    with pytest.raises(ValueError) as error:
        engine_config(model, **(EP2 | arguments))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_expert_num": 4, "zero_expert_type": "identity"}, "zero experts return a token as it is"),
        ({"scoring_func": "tanh"}, "scoring_func: router scores 'tanh' are not supported"),
        ({"moe_apply_router_weight_on_input": True}, "this model chooses 2"),
    ],
    ids=str,
)
def test_routing_that_cannot_run_is_refused_by_name(model, settings, message):
    grid = {"data_parallel_size": 2}
    with pytest.raises(ValueError, match=re.escape(message)):  # pydantic's, around ours
        engine_config(model, hf_overrides=settings, **grid)
    engine_config(model, hf_overrides=settings)  # one rank runs vLLM's own layer


DP2 = {"data_parallel_size": 2, "enable_expert_parallel": True}
RETRY = {"fault_tolerance": "retry"}


@pytest.mark.parametrize("arguments", [DP2, DP2 | {"data_parallel_size": 4}, DP2 | EXTERNAL_DP2], ids=str)
def test_retries_run_in_vllms_frame_and_in_our_worker(model, arguments):
    config = engine_config(model, RETRY, **arguments)
    assert config.parallel_config.enable_fault_tolerance
    assert config.parallel_config.worker_cls == WORKER
    config.__post_init__()  # as each engine core does it
    assert config.parallel_config.enable_fault_tolerance


@pytest.mark.parametrize("section", [None, {"fault_tolerance": "off"}])
def test_without_retries_nothing_of_it_is_on(model, section):
    config = engine_config(model, section, **DP2)
    assert not config.parallel_config.enable_fault_tolerance
    assert config.parallel_config.worker_cls != WORKER


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (EP2, "it needs data-parallel ranks of an MoE model"),
        ({}, "it needs data-parallel ranks of an MoE model"),
        (DP2 | {"tensor_parallel_size": 2}, "set --tensor-parallel-size 1"),
        (DP2 | {"pipeline_parallel_size": 2}, "set --pipeline-parallel-size 1"),
        (DP2 | {"enable_eplb": True}, "leave out --enable-eplb"),
        (DP2 | {"worker_cls": "some.other.Worker"}, "--worker-cls names some.other.Worker; leave it out"),
        (
            DP2 | {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "leave out --kv-transfer-config",
        ),
        (
            DP2 | {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "leave out --speculative-config",
        ),
    ],
    ids=str,
)
def test_retries_are_refused_before_the_start_where_they_cannot_run(model, arguments, message):
    with pytest.raises(ValueError) as error:
        engine_config(model, RETRY, **arguments)
    assert message in str(error.value)


def test_retries_are_refused_with_ranks_of_torchrun(model, environment):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}.items():
        environment.setenv(name, value)
    environment.setenv(CPU_OMP_THREADS_BIND, "nobind")  # this process stays unbound
    with pytest.raises(ValueError, match="start the ranks with vllm serve"):
        engine_config(model, RETRY, **DP2, distributed_executor_backend="external_launcher")


def test_retries_are_refused_on_gpus(model):
    config = engine_config(model, {}, **EP2)
    config.additional_config = {"vllm_npu": RETRY}
    with pytest.raises(UnsupportedConfigError, match="fault_tolerance=retry cannot run here: it makes gloo's groups"):
        required_backend(config)


EPLB = {"enable_eplb": True, "eplb_config": {"num_redundant_experts": 2, "use_async": False}}


def test_experts_may_be_balanced_as_vllm_users_write_it(model):
    config = engine_config(model, **EP2, **EPLB)
    assert config.parallel_config.worker_cls == WORKER
    assert config.parallel_config.eplb_config.num_redundant_experts == 2
    assert engine_config(model, **EP2).parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eplb_config": {"num_redundant_experts": 2}}, 'add "use_async": false to --eplb-config'),
        (
            {"eplb_config": {"num_redundant_experts": 1, "use_async": False}},
            '8 experts and 1 redundant ones do not divide over 2 ranks; set "num_redundant_experts": 2 in --eplb-config',
        ),
        ({"enable_elastic_ep": True, "data_parallel_size": 2}, "leave out --enable-elastic-ep"),
        ({"runner": "pooling"}, "a pooling model samples none; leave out --enable-eplb"),
        ({"pipeline_parallel_size": 2}, "set --pipeline-parallel-size 1"),
        ({"worker_cls": "a.Worker"}, "--worker-cls names a.Worker; leave it out"),
        ({"enable_expert_parallel": False}, "enable_expert_parallel must be True to use EPLB"),  # vLLM's
        ({"tensor_parallel_size": 1}, "EPLB requires tensor, prefill-context, or data parallelism"),  # vLLM's
    ],
    ids=str,
)
def test_balancing_that_cannot_work_is_refused_with_the_remedy(model, arguments, message):
    with pytest.raises(ValueError) as error:
        engine_config(model, **(EP2 | EPLB | arguments))
    assert message in str(error.value)


def test_balancing_needs_vllms_first_model_runner(model, environment):
    environment.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        engine_config(model, **EP2, **EPLB)


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        (
            {"num_experts": 3},
            4,
            "3 experts do not divide over ep_size=4; choose tp_size * dp_size = 3, or add 1 redundant",
        ),
        ({"num_experts": 62}, 4, None),
    ],
)
def test_a_model_that_the_planner_forbids_is_refused_before_a_process_starts(tmp_path, config, ranks, message):
    folder = write_tiny_model(QWEN3_MOE, tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    arguments = {"tensor_parallel_size": ranks // 2, "data_parallel_size": 2, "enable_expert_parallel": True}
    if message is None:
        engine = engine_config(str(folder), **arguments)
        layer = engine_check.configured_layer(engine, engine_check.model_facts(engine), engine_check.AddedExperts())
        assert (layer.num_experts, layer.top_k, layer.hidden_size) == (62, 2, 256)
        return
    with pytest.raises(ValueError) as error:
        engine_config(str(folder), **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_experts_for_a_token_than_there_are_are_refused_on_cpus(tmp_path, ranks):
    folder = write_tiny_model(QWEN3_MOE, tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": 8, "num_experts_per_tok": 9}))
    message = "a token chooses 9 experts of 8; correct config.json"
    with pytest.raises(ValueError, match=message):
        engine_config(str(folder), tensor_parallel_size=ranks, enable_expert_parallel=True)


def test_more_experts_for_a_token_than_there_are_are_refused_on_gpus(model):
    config = gpu_config(model, {}, {})
    config.model_config.hf_text_config.num_experts_per_tok = 99
    with pytest.raises(UnsupportedConfigError, match="a token chooses 99 experts of"):
        required_backend(config)


def test_the_planner_sees_the_steps_that_vllm_is_configured_for(model):
    config = engine_config(model, max_num_seqs=24, max_num_batched_tokens=256, **EP2)
    assert engine_check.planned_shape(config) == PlannedShape(decode_tokens=24)


def test_on_an_npu_the_same_check_names_the_buffer(model, environment):
    """Call the check as the platform beside vllm-ascend does, with the configuration of an engine here."""
    config = engine_config(model, max_num_seqs=24, dtype="bfloat16", **EP2)
    config.model_config.hf_text_config.hidden_size = 7168
    environment.setenv("HCCL_BUFFSIZE", "1")
    with pytest.raises(HcclBufferError, match=r"export HCCL_BUFFSIZE=\d+ on every rank"):
        engine_check.check_engine(config, Options.of(config), DEVICES["A3"])
    environment.setenv("HCCL_BUFFSIZE", "200")
    engine_check.check_engine(config, Options.of(config), DEVICES["A3"])
    config.additional_config = {"vllm_npu": {"moe_comm": "mc2"}}
    with pytest.raises(UnsupportedDeviceError, match="310P has no MC2; use allgather"):
        engine_check.check_engine(config, Options.of(config), DEVICES["310P"])


def test_one_rank_may_ask_for_what_it_does_not_use(model):
    assert engine_config(model, expert_placement_strategy="round_robin").parallel_config.world_size == 1


@pytest.mark.parametrize(
    ("arguments", "topology"),
    [
        ({}, "TP1xDP1"),
        (EP2, "TP2xDP1xEP"),
        ({"data_parallel_size": 2}, "TP1xDP2"),
        (EP2 | {"data_parallel_size": 2}, "TP2xDP2xEP"),
        (EP2 | {"pipeline_parallel_size": 2}, "TP2xDP1xEP"),
    ],
    ids=str,
)
def test_the_topology_is_that_of_one_pipeline_stage(model, arguments, topology):
    assert str(options.topology_of(engine_config(model, **arguments).parallel_config)) == topology


def test_workers_understand_our_calls_unless_the_user_has_an_extension(model):
    ours = "vllm_npu.plugin.worker_extension.MoECommWorkerExtension"
    assert engine_config(model).parallel_config.worker_extension_cls == ours
    assert engine_config(model, worker_extension_cls="a.B").parallel_config.worker_extension_cls == "a.B"


# ------------------------------------------------------------------------------------ what the experts cannot compute

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
# The change of config.json, vLLM's arguments, doctor's options, and the refusal.
REFUSED_EXPERTS = {
    "quantised": ({"quantization_config": FP8}, {}, [], "experts quantised by fp8 are not supported"),
    "activation": ({"hidden_act": "relu2"}, {}, [], "the experts' activation 'relu2' is not supported"),
    "limit": ({"swiglu_limit": 7.0}, {}, [], "the experts' activation 'silu' with limit 7 is not supported"),
    "adapters": ({}, {"enable_lora": True}, ["--enable-lora"], "LoRA adapters on experts are not supported"),
    "experts": ({"num_experts": 1, "num_experts_per_tok": 1}, {}, [], "1 experts do not divide over ep_size=2"),
    "top-k": ({"num_experts": 8, "num_experts_per_tok": 9}, {}, [], "a token chooses 9 experts of 8"),
}


@pytest.mark.parametrize("fault", REFUSED_EXPERTS)
def test_engine_doctor_and_plan_refuse_experts_in_the_same_words(tmp_path, fault):
    """No process is started: the error comes from vLLM's configuration, which LLM() builds first."""
    changes, arguments, options, message = REFUSED_EXPERTS[fault]
    folder = write_tiny_model(QWEN3_MOE, tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    before = children()
    with pytest.raises(ValidationError) as refused:
        LLM(model=str(folder), **EP2, **arguments)
    assert children() == before
    text = str(refused.value.errors()[0]["ctx"]["error"])
    assert text.startswith(message)

    given = doctor_command.parse(["--model", str(folder), "--ep", "2", "--tp", "2", *options])
    [found] = examine(doctor_command.planned_engine(given), checks={})
    assert (found.status, f"UnsupportedConfigError: {text}") == ("problem", f"{found.what}; {found.remedy}")

    if fault != "adapters":  # plan knows no options of an engine
        with pytest.raises(UnsupportedConfigError) as planned:
            plan_command.plan(ep=2, tp=2, model=folder)
        assert str(planned.value) == text


def test_experts_run_as_vllm_runs_them_where_no_token_travels(tmp_path):
    folder = write_tiny_model(QWEN3_MOE, tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": FP8}))
    for arguments in ({}, {"tensor_parallel_size": 2}):
        assert engine_config(str(folder), **arguments).model_config.quantization == "fp8"
    with pytest.raises(ValueError, match="experts quantised by fp8"):
        engine_config(str(folder), data_parallel_size=2)


def test_a_method_that_the_user_names_counts_like_that_of_the_file(model):
    with pytest.raises(ValueError, match="experts quantised by fp8 are not supported"):
        engine_config(model, quantization="fp8", **EP2)


def test_adapters_of_other_layers_than_experts_are_left_to_vllm(model):
    config = engine_config(model, enable_lora=True, lora_target_modules=["q_proj"], **EP2)
    assert config.lora_config.target_modules == ["q_proj"]
    with pytest.raises(ValueError, match="LoRA adapters on experts"):
        engine_config(model, enable_lora=True, lora_target_modules=["q_proj", "experts"], **EP2)


def test_the_table_of_activations_is_that_of_vllms_kernel():
    kernel = CPUUnquantizedExperts
    supported = {each.value for each in MoEActivation if kernel._supports_activation(each)}
    assert PORTABLE.experts is not None
    assert set(PORTABLE.experts.activations) == supported


def children() -> set[int]:
    """The ids of this process's children."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


# ------------------------------------------------------------------------------------------------ thread binding


def binding_of(world_size: int, **arguments) -> list[list[int]] | None:
    """Build a configuration, and return the CPUs of each rank as vLLM's workers read them."""
    VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=world_size, **arguments))
    text = os.environ.get(CPU_OMP_THREADS_BIND)
    return None if text is None else [[int(cpu) for cpu in share.split(",")] for share in text.split("|")]


def more_ranks_than_nodes() -> int:
    return len(compat.current().cpus_of_nodes()) + 1


def test_ranks_beyond_the_numa_nodes_share_all_cpus():
    shares = binding_of(more_ranks_than_nodes())
    cpus = sorted(os.sched_getaffinity(0))
    assert len(shares) == more_ranks_than_nodes()
    assert all(shares)
    assert sorted({cpu for share in shares for cpu in share}) == cpus
    if len(cpus) >= len(shares):
        assert sum(map(len, shares)) == len(cpus), "two ranks share a CPU while there are enough"


def test_every_rank_gets_a_cpu_where_there_are_fewer_cpus_than_ranks():
    ranks = 2 * len(os.sched_getaffinity(0)) + more_ranks_than_nodes()
    shares = binding_of(ranks)
    assert len(shares) == ranks
    assert all(len(share) == 1 for share in shares)
    assert {share[0] for share in shares} == os.sched_getaffinity(0)


def test_data_parallel_ranks_get_shares_of_their_own():
    shares = binding_of(more_ranks_than_nodes(), data_parallel_size=2, data_parallel_size_local=2)
    assert len(shares) == 2 * more_ranks_than_nodes()


def test_data_parallel_ranks_alone_get_shares_too():
    """vLLM's own binding gives the ranks of one node all the same CPUs."""
    ranks = more_ranks_than_nodes()
    shares = binding_of(1, data_parallel_size=ranks, data_parallel_size_local=ranks)
    assert len(shares) == more_ranks_than_nodes()
    if len(os.sched_getaffinity(0)) >= len(shares):
        assert len({cpu for share in shares for cpu in share}) == sum(map(len, shares))


def test_ranks_of_other_hosts_take_no_cpus():
    ranks = more_ranks_than_nodes()
    assert binding_of(1, data_parallel_size=4 * ranks, data_parallel_size_local=1) is None
    assert len(binding_of(1, data_parallel_size=4 * ranks, data_parallel_size_local=ranks)) == ranks


def test_enough_numa_nodes_are_left_to_vllm(two_nodes):
    assert binding_of(1) is None
    assert binding_of(2) is None


@pytest.fixture
def two_nodes(monkeypatch) -> dict[int, set[int]]:
    """Let vLLM read a machine of two NUMA nodes with four CPUs and 64 GiB each. Returns the CPUs of each node."""
    nodes = {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}
    cpus = [cpu_resource_utils.LogicalCPUInfo(cpu, cpu, node) for node in nodes for cpu in nodes[node]]
    memory = cpu_resource_utils.MemoryNodeInfo(64 << 30, 64 << 30)
    monkeypatch.setattr(cpu_resource_utils, "get_memory_affinity", lambda pid=0: list(nodes))
    monkeypatch.setattr(cpu_resource_utils, "get_allowed_cpu_list", lambda: cpus)
    monkeypatch.setattr(cpu_resource_utils, "get_memory_node_info", lambda node=0: memory)
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_limit", lambda: None)
    return nodes


def cpus_of_workers(config: VllmConfig, local_dp_rank: int | None) -> list[set[int]]:
    """The CPUs that vLLM gives to the workers of one data-parallel rank, which it starts with this configuration."""
    config.parallel_config.data_parallel_rank_local = local_dp_rank
    return [set(cpus) for cpus in OMPProcessManager(config).cpu_lists]


def parallel_of(launch: str, tp: int, dp: int, rank: int) -> ParallelConfig:
    """The configuration of the process that starts data-parallel rank `rank`."""
    variables, arguments = {}, {}
    match launch:
        case "one server":
            arguments = {"data_parallel_size": dp, "data_parallel_size_local": dp}
        case "by hand, offline":
            variables = {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank), "VLLM_DP_SIZE": str(dp)}
        case "--data-parallel-rank":
            arguments = {"data_parallel_size": dp, "data_parallel_rank": rank, "data_parallel_external_lb": True}
    os.environ.update(variables)
    parallel = ParallelConfig(tensor_parallel_size=tp, **arguments)
    for name in variables:
        del os.environ[name]
    return parallel


@pytest.mark.parametrize("launch", ["one server", "by hand, offline", "--data-parallel-rank"])
@pytest.mark.parametrize(
    ("tp", "nodes_of_ranks"),
    [
        (1, [[0], [1]]),
        (2, [[0, 0], [1, 1]]),
        (1, [[0], [0], [1], [1]]),
        (1, [[0], [0], [1]]),
    ],
)
def test_data_parallel_ranks_are_spread_over_numa_nodes(two_nodes, launch, tp, nodes_of_ranks):
    """Each gets CPUs of its own, and shares the memory of its node with the ranks of that node."""
    on_node = Counter(node for nodes in nodes_of_ranks for node in nodes)
    default = CacheConfig.gpu_memory_utilization
    taken: list[int] = []
    for rank, nodes in enumerate(nodes_of_ranks):
        config = VllmConfig(parallel_config=parallel_of(launch, tp, len(nodes_of_ranks), rank))
        workers = cpus_of_workers(config, 0 if launch == "--data-parallel-rank" else rank)  # as vLLM numbers them
        assert len(workers) == len(nodes)
        assert all(cpus <= two_nodes[node] for cpus, node in zip(workers, nodes, strict=True)), (workers, nodes)
        taken += [cpu for cpus in workers for cpu in cpus]
        # One configuration serves all ranks of a server.
        sharers = max(on_node.values()) if launch == "one server" else on_node[nodes[0]]
        expected = default if sharers == 1 else default / (sharers + 1)
        assert config.cache_config.gpu_memory_utilization == expected
    assert sorted(taken) == list(range(8))


@pytest.mark.parametrize(("binding", "sharers"), [("0-1|2-3", 2), ("0-3|4-7", 1), ("nobind", 2)])
def test_a_users_binding_decides_whose_memory_is_shared(two_nodes, environment, binding, sharers):
    environment.setenv(CPU_OMP_THREADS_BIND, binding)
    default = CacheConfig.gpu_memory_utilization
    assert memory_of(2) == (default if sharers == 1 else default / (sharers + 1))


def test_tensor_parallel_ranks_are_spread_over_numa_nodes(two_nodes):
    config = VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=4))
    assert [min(cpus) for cpus in cpus_of_workers(config, None)] == [0, 2, 4, 6]
    assert config.cache_config.gpu_memory_utilization == CacheConfig.gpu_memory_utilization / 3


def test_ranks_in_one_container_share_its_memory_also_across_nodes(two_nodes, monkeypatch):
    assert memory_of(2) == CacheConfig.gpu_memory_utilization
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_limit", lambda: 100 << 30)
    assert memory_of(2) == CacheConfig.gpu_memory_utilization / 3


def test_a_rank_behind_a_load_balancer_cannot_see_ranks_beside_it(two_nodes, environment):
    parallel = parallel_of("--data-parallel-rank", 1, 2, 1)
    parallel.data_parallel_master_ip = "10.0.0.1"
    config = VllmConfig(parallel_config=parallel)
    assert cpus_of_workers(config, 0)[0] <= two_nodes[0]


TORCHRUN_RANK = """
import os
from vllm.utils import cpu_resource_utils as readings
readings.get_memory_affinity = lambda pid=0: [0, 1]
readings._get_cpu_list = lambda: [readings.LogicalCPUInfo(cpu, cpu, node) for node, cpu in enumerate({cpus})]
from vllm.config import ParallelConfig, VllmConfig
for engine in range(2):
    VllmConfig(parallel_config=ParallelConfig(data_parallel_size=2, distributed_executor_backend="external_launcher"))
    threads = {{tuple(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}}
    assert threads == {{({cpus}[1],)}}, threads
    assert readings.get_allowed_cpu_list()[0].numa_node == 1  # the node of which vLLM's worker takes memory
"""


def test_torchruns_ranks_bind_themselves(environment):
    """vLLM binds only workers that it starts. So without us each rank of torchrun runs everywhere, with memory of node 0."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    variables = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 1}
    environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    for name, value in variables.items():
        environment.setenv(name, str(value))
    done = subprocess.run(
        [sys.executable, "-c", TORCHRUN_RANK.format(cpus=cpus)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("setting", ["0-1|0-1|0", "nobind"])
def test_a_users_binding_is_left_alone(environment, setting):
    environment.setenv(CPU_OMP_THREADS_BIND, setting)
    VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=more_ranks_than_nodes()))
    assert os.environ[CPU_OMP_THREADS_BIND] == setting


def test_the_next_engine_of_a_process_gets_a_binding_of_its_own():
    first, more = more_ranks_than_nodes(), more_ranks_than_nodes() + 2
    assert len(binding_of(first)) == first
    assert len(binding_of(more)) == more
    assert binding_of(1) is None
    assert len(binding_of(first)) == first


# ---------------------------------------------------------------------------------------------------------- memory


def memory_of(ranks: int, **arguments) -> float:
    """The share of a NUMA node's memory that each data-parallel rank of this host takes."""
    parallel = ParallelConfig(data_parallel_size=ranks, data_parallel_size_local=ranks)
    return VllmConfig(
        parallel_config=parallel, cache_config=CacheConfig(**arguments)
    ).cache_config.gpu_memory_utilization


def test_ranks_of_a_numa_node_share_its_memory_unless_the_user_says_how():
    ranks, default = more_ranks_than_nodes(), CacheConfig.gpu_memory_utilization
    assert memory_of(1) == default
    assert ranks * memory_of(ranks) < default * len(compat.current().cpus_of_nodes())
    assert memory_of(2 * ranks) < memory_of(ranks)
    assert memory_of(ranks, gpu_memory_utilization=0.4) == 0.4
    assert memory_of(ranks, kv_cache_memory_bytes=1 << 26) == default


# ----------------------------------------------------------------------------------------------- sequence parallelism


def test_sequence_parallelism_stays_with_the_worker_that_makes_it_right(model):
    """vLLM's DeepSeek layer is wrong for a step of one token (see compat). Our worker changes the built layers."""
    grid = {**EP2, "data_parallel_size": 2}
    parallel_config = engine_config(model, **grid).parallel_config
    assert parallel_config.use_sequence_parallel_moe
    assert parallel_config.worker_cls == WORKER
    parallel_config = engine_config(model, **grid, worker_cls="a.Worker").parallel_config
    assert not parallel_config.use_sequence_parallel_moe
    assert parallel_config.use_all2all
    assert parallel_config.worker_cls == "a.Worker"


def test_one_class_of_vllm_guesses_the_layout_of_its_rows():
    """Fails for a vLLM in which another layer compares row counts. keep_rows_whole must then know it too."""
    guesses = re.compile(r"hidden_states\.shape\[0\] [!=]= (full_num_tokens|positions\.shape\[0\])")
    root = Path(vllm.__file__).parent
    files = [*(root / "models").rglob("*.py"), *(root / "model_executor" / "models").rglob("*.py")]
    found = {file.name for file in files if guesses.search(file.read_text())}
    assert found == {"deepseek_v2.py"}


# ----------------------------------------------------------------------------------------------------- CUDA platform


def cuda_backend(model: str, section: dict, **arguments) -> str | None:
    """The all2all_backend that the CUDA platform sets.

    vLLM builds a configuration for GPUs only where there is a GPU. This one is built for the CPU, and gets the section later.
    """
    config = engine_config(model, **EP2, **arguments)
    config.additional_config = {"vllm_npu": section}
    return required_backend(config)


@pytest.mark.parametrize(
    ("section", "backend"),
    [
        ({}, None),
        ({"all2all": "naive"}, "allgather_reducescatter"),
        ({"all2all": "agrs"}, "allgather_reducescatter"),
        ({"moe_comm": "symmetric"}, "allgather_reducescatter"),
        ({"moe_comm": "auto"}, "allgather_reducescatter"),
    ],
)
def test_on_gpus_vllms_backend_follows_what_is_asked_for(model, section, backend):
    assert cuda_backend(model, section) == backend


@pytest.mark.parametrize(
    ("section", "named", "worker"),
    [
        ({"moe_comm": "symmetric"}, "auto", GPU_WORKER),
        ({"moe_comm": "auto"}, "auto", GPU_WORKER),
        ({"moe_comm": "allgather"}, "auto", GPU_WORKER),
        ({}, "auto", "auto"),
        ({"moe_comm": "symmetric"}, "their.Worker", "their.Worker"),
    ],
)
def test_on_gpus_our_worker_runs_with_every_exchange_of_ours(model, section, named, worker):
    config = engine_config(model, **EP2)
    config.additional_config, config.parallel_config.worker_cls = {"vllm_npu": section}, named
    set_worker(config)
    assert config.parallel_config.worker_cls == worker


def test_the_environment_asks_for_a_strategy_on_gpus_too(model, environment):
    config = engine_config(model, **EP2)
    environment.setenv("VLLM_NPU_MOE_COMM", "symmetric")
    assert required_backend(config) == "allgather_reducescatter"


@pytest.mark.parametrize(
    ("section", "arguments", "message"),
    [
        ({"all2all": "fast"}, {}, "unknown all2all 'fast'"),
        ({"all2all": 3}, {}, "all2all=3; it must be a string, one of naive"),
        ({"all2all": "deepep_low_latency"}, {}, "needs the Python module deep_ep, which is not installed"),
        ({"all2all": "flashinfer_one_sided"}, {}, "pip install flashinfer-python"),
        ({"flashinfer_all_reduce": True}, {}, "flashinfer_all_reduce needs the Python module flashinfer"),
        ({"all2all": "naive", "moe_comm": "symmetric"}, {}, "give one of them"),
        ({"moe_comm": "fast"}, {}, "unknown moe_comm 'fast'"),
    ],
)
def test_on_gpus_what_cannot_be_is_refused_before_a_process_starts(model, section, arguments, message):
    with pytest.raises(UnsupportedConfigError, match=message):
        cuda_backend(model, section, **arguments)


@pytest.mark.parametrize("section", [{"all2all": "agrs"}, {"moe_comm": "allgather"}, {}])
def test_on_gpus_only_vllms_own_backends_are_fault_tolerant(model, section):
    config = engine_config(model, {}, **EP2)
    config.additional_config = {"vllm_npu": section}
    config.parallel_config.enable_fault_tolerance = True  # now, since a CPU's own check refuses it
    with (
        pytest.raises(UnsupportedConfigError, match="Leave out --enable-fault-tolerance") if section else nullcontext()
    ):
        assert required_backend(config) is None


def test_the_backends_that_are_fault_tolerant_are_those_of_vllm():
    from vllm.v1.worker.sentinel.gpu_worker_sentinel import FT_BACKEND_SET

    from vllm_npu.plugin.compat.fault_tolerance import BACKENDS

    assert BACKENDS == FT_BACKEND_SET


@pytest.mark.parametrize("section", [{"all2all": "agrs"}, {"moe_comm": "allgather"}])
def test_on_gpus_exchanges_refuse_prefill_context_parallelism(model, section):
    config = engine_config(model, **EP2)
    config.additional_config = {"vllm_npu": section}
    config.parallel_config.prefill_context_parallel_size = 2  # now, since a CPU's own check refuses it
    with pytest.raises(UnsupportedConfigError, match="set --prefill-context-parallel-size 1"):
        required_backend(config)


def test_on_gpus_our_worker_counts_and_checks_steps_of_our_exchanges(model):
    for section, worker in (({}, "auto"), ({"all2all": "agrs"}, GPU_WORKER), ({"moe_comm": "allgather"}, GPU_WORKER)):
        config = engine_config(model, **EP2)
        config.additional_config = {"vllm_npu": section}
        config.parallel_config.worker_cls = "auto"
        set_worker(config)
        assert config.parallel_config.worker_cls == worker


DP2 = {"tensor_parallel_size": 1, "data_parallel_size": 2, "enable_expert_parallel": True}


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ({"all2all": "pplx"}, {"enable_dbo": True}, "leave out --enable-dbo"),
        ({"moe_comm": "symmetric"}, {"nnodes": 2}, "the ranks are on 2 hosts; choose allgather"),
        ({"moe_comm": "allgather"}, {"data_parallel_size": 3}, "8 experts do not divide over ep_size=3"),
        ({"all2all": "pplx"}, {"data_parallel_size": 3}, "8 experts do not divide over ep_size=3"),
        (
            {"flashinfer_all_reduce": True},
            {"tensor_parallel_size": 3},
            "takes 2, 4, 8 tensor-parallel ranks, not 3",
        ),
    ],
)
def test_on_gpus_what_ranks_would_refuse_is_refused_before_they_start(model, libraries, section, changes, message):
    config = gpu_config(model, section, changes)
    with pytest.raises(UnsupportedConfigError, match=message):
        required_backend(config)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ({"all2all": "agrs"}, {"enable_dbo": True}),
        ({"all2all": "agrs"}, {"data_parallel_size": 3}),  # vLLM's own experts take an uneven share
        ({"moe_comm": "auto"}, {"nnodes": 2}),
        ({"moe_comm": "allgather"}, {"data_parallel_size": 1, "tensor_parallel_size": 3}),  # no token moves
        ({"flashinfer_all_reduce": True}, {"tensor_parallel_size": 4}),
    ],
)
def test_on_gpus_the_checks_leave_alone_what_works(model, libraries, section, changes):
    required_backend(gpu_config(model, section, changes))


def test_on_gpus_pplx_refuses_rows_that_its_kernels_cannot_copy(model, libraries, tmp_path):
    narrow = shutil.copytree(model, tmp_path / "narrow") / "config.json"
    narrow.write_text(json.dumps(json.loads(narrow.read_text()) | {"hidden_size": 36}))
    config = gpu_config(str(narrow.parent), {"all2all": "pplx"}, {})
    config.model_config.dtype = torch.bfloat16
    with pytest.raises(UnsupportedConfigError, match="rows of a multiple of 16 bytes, not 72"):
        required_backend(config)


def test_on_gpus_symmetric_refuses_rows_that_its_kernels_cannot_move(model, tmp_path):
    odd = shutil.copytree(model, tmp_path / "odd") / "config.json"
    odd.write_text(json.dumps(json.loads(odd.read_text()) | {"hidden_size": 35}))
    for name, message in (("symmetric", "rows of a multiple of 4 bytes, not 70"), ("auto", None)):
        config = gpu_config(str(odd.parent), {"moe_comm": name}, {})
        config.model_config.dtype = torch.bfloat16
        with nullcontext() if message is None else pytest.raises(UnsupportedConfigError, match=message):
            required_backend(config)


def gpu_config(model: str, section: dict, changes: dict) -> VllmConfig:
    """A configuration with these changes of its ParallelConfig, made after the CPU's own checks."""
    config = engine_config(model, **DP2)
    config.additional_config = {"vllm_npu": section}
    for name, value in changes.items():
        setattr(config.parallel_config, name, value)
    return config


@pytest.fixture
def libraries(monkeypatch, tmp_path) -> None:
    """Empty modules with the names of the libraries: these checks look only whether they are installed."""
    for library in (PPLX, FLASHINFER):
        (tmp_path / "libraries" / library.module).mkdir(parents=True)
        (tmp_path / "libraries" / library.module / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "libraries")


@pytest.mark.parametrize("section", [{"all2all": "naive"}, {"flashinfer_all_reduce": True}])
def test_what_is_for_gpus_is_refused_on_a_cpu(model, section):
    with pytest.raises(ValueError, match="is for GPUs; leave it out here"):
        engine_config(model, section, **EP2)
