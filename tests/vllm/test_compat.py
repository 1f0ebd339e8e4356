"""The vLLM releases that the plugin supports, and the parts of vLLM that it relies on. A moved part fails with a diff."""

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from vllm.model_executor.custom_op import CustomOp, PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform
from vllm.plugins import load_general_plugins

from tests.time_limits import PATIENCE_SECONDS
from tests.vllm.vllm_ranks import (
    NUM_RANKS,
    TP2,
    Grid,
    VllmRanks,
    build_layer,
    make_config,
    ranks,  # noqa: F401 - fixture
    vllm_step,
)
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import compat, release_lines
from vllm_npu.plugin.cpu.experts import CpuUnquantizedFusedMoEMethod
from vllm_npu.plugin.cpu.moe_runner import CpuMoERunner
from vllm_npu.plugin.cpu.platform import CpuMoEPlatform
from vllm_npu.plugin.forward_context import current_step


@pytest.fixture(scope="module", autouse=True)
def plugins_loaded():
    load_general_plugins()


# ------------------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize("line", release_lines.SUPPORTED)
@pytest.mark.parametrize("rest", [".0", ".7", ".0+cpu", ".1rc1", ".1.dev5+g1234567"])
def test_every_release_of_a_supported_line_is_accepted(line, rest):
    assert release_lines.release_line(line + rest) == line
    release_lines.check_version(line + rest)


@pytest.mark.parametrize("version", ["0.3.2", "0.31.9", "0.33.0", "0.320.0", "1.32.0", "32.0", "dev", ""])
def test_any_other_version_is_refused_with_those_that_are_not(version):
    with pytest.raises(UnsupportedConfigError) as error:
        release_lines.check_version(version)
    assert f"vLLM {version} is not supported" in str(error.value)
    assert all(line in str(error.value).partition("lines:")[2] for line in release_lines.SUPPORTED)
    assert ("and 0.33 on GPUs only" in str(error.value)) == (version == "0.33.0")


def test_the_cuda_platform_takes_its_own_lines():
    for line in release_lines.CUDA_LINES:
        release_lines.check_version(f"{line}.0+cu130", on_gpus=True)
    with pytest.raises(UnsupportedConfigError, match=r"on GPUs; supported release lines: 0\.23, 0\.32, 0\.33"):
        release_lines.check_version("0.24.0", on_gpus=True)


def test_the_installed_vllm_has_a_module_of_its_own():
    import vllm

    assert compat.current().__name__ == release_lines.SUPPORTED[release_lines.release_line(vllm.__version__)]


OF_CLASSES = {"MoEPrepareOutput"}  # of vllm-ascend's, which each line imports

# Files of the plugin that run with every line.
SHARED = ("fused_moe.py", "groups.py", "step_planner.py", "worker_extension.py")


def test_every_line_has_the_functions_that_the_plugin_calls_there():
    def signatures(line: str) -> dict[str, str]:
        source = Path(util.find_spec(release_lines.SUPPORTED[line]).origin)  # not imported: it needs its vLLM
        text = source.read_text("utf-8")
        if line in release_lines.BESIDE_VLLM_ASCEND:
            text += (source.parent / "ascend_lines.py").read_text("utf-8")
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        return {node.name: ast.unparse(node.args) for node in functions if not node.name.startswith("_")}

    plugin = Path(compat.__file__).parents[1]

    def called(*files: Path) -> set[str]:
        return {
            name
            for file in files
            for name in re.findall(r"(?:compat\.current\(\)|release|RELEASE)\.(\w+)\(", file.read_text("utf-8"))
        }

    shared = called(*(plugin / name for name in SHARED))
    assert {"moe_layers", "transports", "device_limits", "micro_batch", "eplb_report"} <= shared
    on_cpu = called(*plugin.glob("*.py"), *plugin.glob("cpu/*.py"))
    assert {"register_out_of_tree", "set_worker", "start_eplb"} <= on_cpu
    on_ascend = called(*plugin.glob("ascend/*.py")) - OF_CLASSES
    assert "replace_choice" in on_ascend
    tables = {line: signatures(line) for line in release_lines.SUPPORTED}
    on_each = [tables[line] for line in release_lines.BESIDE_VLLM_ASCEND]
    assert all(
        {name: each[name] for name in on_ascend} == {name: on_each[0][name] for name in on_ascend} for each in on_each
    )
    for line, table in tables.items():
        needed = shared | (on_ascend if line in release_lines.BESIDE_VLLM_ASCEND else on_cpu)
        assert needed <= set(table), line
        assert {name: table[name] for name in shared} == {name: tables["0.32"][name] for name in shared}, line


def start_vllm(**environment: str) -> subprocess.CompletedProcess:
    """Start a process that pretends to have an unsupported vLLM. It loads vLLM's plugins as every process of vLLM does."""
    script = (
        "import vllm\n"
        "vllm.__version__ = '0.99.1'\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.platforms import current_platform\n"
        "from vllm.model_executor.custom_op import op_registry_oot\n"
        "print('started on', type(current_platform).__name__, 'with', dict(op_registry_oot))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_a_process_with_an_unsupported_vllm_ends_and_says_why():
    process = start_vllm()
    assert process.returncode != 0
    assert "started" not in process.stdout
    assert "UnsupportedConfigError: vLLM 0.99.1 is not supported by vllm_npu" in process.stderr
    assert all(line in process.stderr for line in release_lines.SUPPORTED)
    assert 'VLLM_PLUGINS=""' in process.stderr


def test_without_plugins_vllm_runs_as_if_we_were_not_installed():
    process = start_vllm(VLLM_PLUGINS="")
    assert process.returncode == 0, process.stderr
    assert process.stdout == "started on CpuPlatform with {}\n"


# ---------------------------------------------------------------------------------------------------- installed


def test_our_platform_is_the_active_one_and_stays_a_cpu():
    assert type(current_platform) is CpuMoEPlatform
    assert current_platform.is_cpu()
    assert not current_platform.is_out_of_tree()
    assert current_platform.get_device_communicator_cls() == "vllm_npu.plugin.cpu.communicator.CpuMoECommunicator"


def test_both_layers_and_both_ops_are_registered():
    assert op_registry_oot["MoERunner"] is CpuMoERunner
    assert op_registry_oot["UnquantizedFusedMoEMethod"] is CpuUnquantizedFusedMoEMethod
    assert torch.ops.vllm.maybe_all_gather_and_maybe_unpad.default
    assert torch.ops.vllm.maybe_pad_and_reduce.default


def test_registering_twice_changes_nothing():
    from vllm_npu.plugin import register_layers

    before = dict(op_registry_oot)
    register_layers()
    register_layers()
    assert dict(op_registry_oot) == before


@pytest.mark.parametrize(
    ("base", "ours"), [(MoERunner, CpuMoERunner), (UnquantizedFusedMoEMethod, CpuUnquantizedFusedMoEMethod)]
)
def test_the_place_of_another_plugins_class_is_not_taken(base, ours):
    other = type("OtherPlugins" + base.__name__, (base,), {})
    with pytest.raises(ValueError) as error:
        compat.current().register_out_of_tree(base, other)
    assert f"{ours.__module__}.{ours.__name__} already replaces vLLM's {base.__name__}" in str(error.value)
    assert "VLLM_PLUGINS" in str(error.value)
    assert op_registry_oot[base.__name__] is ours


# ------------------------------------------------------------------------------------- what we rely on in vLLM 0.32


def parameters(function) -> str:
    """A signature without annotations. An override depends on names, order, kinds and defaults."""
    signature = inspect.signature(function)
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


OVERRIDDEN = [
    (MoERunner._forward_impl, "(self, hidden_states, router_logits, shared_experts_input, input_ids=None)"),
    (MoERunner._select_forward, "(self)"),
    (MoERunner._maybe_reduce_shared_expert_output, "(self, shared_output, fused_output_is_reduced=None)"),
    (UnquantizedFusedMoEMethod.__init__, "(self, moe)"),
    (UnquantizedFusedMoEMethod.process_weights_after_loading, "(self, layer)"),
    (Platform.check_and_update_config, "(vllm_config)"),
    (Platform.get_device_communicator_cls, "()"),
    (Platform.set_additional_forward_context, "(*args, **kwargs)"),
]


@pytest.mark.parametrize(("method", "expected"), OVERRIDDEN, ids=[method.__qualname__ for method, _ in OVERRIDDEN])
def test_what_we_override_has_the_signature_that_we_override(method, expected):
    assert parameters(method) == expected


@pytest.mark.parametrize("ours", [CpuMoERunner, CpuUnquantizedFusedMoEMethod, CpuMoEPlatform])
def test_our_overrides_can_be_called_as_vllms_are(ours):
    base = ours.__mro__[1]
    overridden = [
        name
        for name, member in vars(ours).items()
        if callable(getattr(ours, name)) and hasattr(base, name) and not name.startswith("__") and name != "name"
    ]
    assert overridden
    for name in overridden:
        assert parameters(getattr(ours, name)) == parameters(getattr(base, name)), name


def test_the_runner_and_the_method_are_replaced_by_name():
    assert issubclass(MoERunner, PluggableLayer)
    assert issubclass(UnquantizedFusedMoEMethod, CustomOp)
    assert isinstance(inspect.getattr_static(MoERunner, "_fused_output_is_reduced"), property)


@pytest.mark.parametrize(
    ("op", "schema"),
    [
        (
            "moe_forward",
            "(Tensor(a0!) hidden_states, Tensor router_logits, Tensor? shared_experts_input, Tensor? input_ids, "
            "{name} layer_name, SymInt hidden_dim_unpadded) -> Tensor",
        ),
        (
            "moe_forward_shared",
            "(Tensor hidden_states, Tensor router_logits, Tensor? shared_experts_input, Tensor? input_ids, "
            "{name} layer_name, SymInt hidden_dim_unpadded) -> (Tensor, Tensor)",
        ),
    ],
)
def test_the_opaque_ops_around_the_layer_are_there(op, schema):
    found = str(getattr(torch.ops.vllm, op).default._schema).removeprefix(f"vllm::{op}")
    before, _, after = schema.partition("{name}")
    assert found.startswith(before)
    assert found.endswith(after)


def run_step(grid: Grid) -> list[tuple[int, list[str]]]:
    """The arguments that vLLM gives the platform's hook in a step of MoE layers. The hook's result is in the step's context."""
    platform = type(current_platform)
    hook = platform.set_additional_forward_context
    given = []

    def noted(*args, **kwargs):
        given.append((len(args), sorted(kwargs)))
        return hook(*args, **kwargs)

    config = make_config(grid)
    build_layer(grid, config)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(platform, "set_additional_forward_context", staticmethod(noted))
        with vllm_step(grid, config, (3,)):
            assert current_step().plan.num_tokens_across_dp == (3,)
    return given


def test_the_step_reaches_the_platform_with_these_arguments(ranks: VllmRanks):  # noqa: F811
    keywords = [
        "attn_metadata",
        "batch_descriptor",
        "cudagraph_runtime_mode",
        "dp_metadata",
        "num_tokens",
        "num_tokens_across_dp",
        "ubatch_slices",
        "vllm_config",
    ]
    assert ranks.run(run_step, TP2) == [[(0, keywords)]] * NUM_RANKS


def test_the_frame_of_fault_tolerance_is_the_one_that_retries_take_hold_of():
    """Methods that are replaced take the same arguments, and vLLM calls them by the names that are replaced."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import core
    from vllm.v1.fault_tolerance import EngineCoreSentinel, engine_core_sentinel
    from vllm.v1.request import Request
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.sentinel.gpu_worker_sentinel import WorkerSentinel

    from vllm_npu.plugin.cpu import engine_retry
    from vllm_npu.plugin.cpu.worker_retry import RetryingWorkerSentinel

    theirs = ast.parse(inspect.getsource(engine_core_sentinel))
    arguments = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.walk(theirs)
        if isinstance(node, ast.FunctionDef)
    }
    for name, ours in (("on_fault", engine_retry.on_fault), ("retry", engine_retry.refuse_instruction)):
        assert len(inspect.signature(ours).parameters) == len(arguments[name]), name
    assert core.EngineCoreSentinel is EngineCoreSentinel
    assert "self.ft_sentinel.on_fault(exc)" in inspect.getsource(engine_core_sentinel.fault_tolerant_wrapper)
    assert "WorkerSentinel(worker=self)" in inspect.getsource(gpu_worker.Worker.__init__)
    assert "self.worker_sentinel.handle_command" in inspect.getsource(gpu_worker.Worker.handle_ft_command)
    assert issubclass(RetryingWorkerSentinel, WorkerSentinel)
    parameters = inspect.signature(RetryingWorkerSentinel.retry).parameters
    assert list(parameters) == list(inspect.signature(WorkerSentinel.retry).parameters)
    assert "reset_running_requests" in inspect.signature(Scheduler.reset_prefix_cache).parameters
    fields = inspect.getsource(Request.__init__)
    for name in ("num_in_flight_tokens", "num_stale_output_tokens", "drop_stale_output"):
        assert f"self.{name} = " in fields
