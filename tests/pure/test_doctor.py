"""`vllm-npu doctor`: findings, remedies, exit status, and that it works where torch cannot be imported."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vllm_npu import envs
from vllm_npu.cli.doctor import parse, planned_engine
from vllm_npu.emulator import shared_memory
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.plugin import release_lines
from vllm_npu.tools.doctor import engine_findings, examination, machine_checks, variable_checks, version_checks
from vllm_npu.tools.doctor.findings import Finding

BROKEN_TORCH = "raise ImportError('libtorch_cpu.so: this torch is broken')\n"
# What torch does with torch_npu in its environment and CANN absent.
TORCH_THAT_LOADS_TORCH_NPU = """
import os
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
    import torch_npu
__version__ = "2.13.0"
"""
TORCH_NPU_WITHOUT_CANN = "raise ImportError('libhccl.so: cannot open shared object file')\n"
CLEAN = {"VLLM_TARGET_DEVICE", "VLLM_PLUGINS", "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH"}


def run_doctor(
    folder: Path, *options: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, str]]]:
    """Runs the command in the folder; nothing of pytest's environment that it looks at reaches it."""
    kept = {name: text for name, text in os.environ.items() if name not in CLEAN and not name.startswith("VLLM_NPU_")}
    written = folder / "findings.json"
    done = subprocess.run(
        [sys.executable, "-m", "vllm_npu.cli", "doctor", "--json", str(written), *options],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert written.exists(), done.stderr
    return done, json.loads(written.read_text())["findings"]


def write_packages(folder: Path, **sources: str) -> str:
    """Packages by their name, in a folder for PYTHONPATH."""
    for name, source in sources.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(source)
    return str(folder)


def of_check(findings: list[dict[str, str]], check: str) -> list[dict[str, str]]:
    return [finding for finding in findings if finding["check"] == check]


def test_a_sound_environment_has_no_problem(tmp_path):
    done, findings = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout
    assert {finding["status"] for finding in findings} <= {"ok", "warning"}
    assert of_check(findings, "torch")[0]["what"].startswith(metadata.version("torch"))
    assert of_check(findings, "import torch")[0]["status"] == "ok"
    assert of_check(findings, "plugins")[0]["status"] == "ok"
    assert done.stdout.splitlines()[-1].endswith(", 0 problems")


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], list[dict[str, str]]]:
    """A run in which much is wrong at once."""
    folder = tmp_path_factory.mktemp("broken")
    packages = write_packages(folder / "packages", torch=BROKEN_TORCH)
    info = folder / "packages" / "other_platform-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-platform\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nother = other_platform:register\n")
    return run_doctor(
        folder,
        PYTHONPATH=packages,
        VLLM_TARGET_DEVICE="CPU",
        VLLM_NPU_MOE_COM="mc2",
        VLLM_NPU_MOE_COMM="mc3",
        VLLM_NPU_EMULATOR_SOC="A3",
        VLLM_NPU_EMULATOR_DEVICES="4k",
        VLLM_NPU_TRANSPORT_TIMEOUT="",
        OMP_NUM_THREADS="100000",
    )


def test_it_works_where_torch_cannot_be_imported(broken):
    done, findings = broken
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [finding] = of_check(findings, "import torch")
    assert finding["status"] == "problem"
    assert "libtorch_cpu.so: this torch is broken" in finding["what"]
    assert "packages/torch/__init__.py" in finding["what"]
    assert "PYTHONPATH" in finding["remedy"]


def test_leftovers_are_named_with_the_command_that_removes_them(tmp_path, monkeypatch):
    # A folder of its own: each launch of an emulated device removes leftovers from the machine's folder.
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    left, in_use = (tmp_path / f"{shared_memory.PREFIX}0.{pid}.0.1" for pid in (ended.pid, os.getpid()))
    left.touch()
    in_use.touch()
    [finding] = [each for each in machine_checks.check_shared_memory(tmp_path) if "left behind" in each.what]
    assert (finding.status, left.name in finding.what) == ("warning", True)
    assert in_use.name not in finding.what, "a file in use is none"
    assert finding.remedy is not None
    assert finding.remedy.endswith("-m vllm_npu.emulator clean")
    assert left.exists(), "doctor looks, and removes nothing"


@pytest.mark.parametrize(
    ("name", "status", "what", "remedy"),
    [
        ("VLLM_NPU_MOE_COM", "warning", "nothing reads it", "did you mean VLLM_NPU_MOE_COMM?"),
        ("VLLM_NPU_MOE_COMM", "problem", "'mc3'", "set it to auto, mc2, all2all, allgather or naive"),
        ("VLLM_NPU_EMULATOR_SOC", "ok", "'A3'", ""),
        ("VLLM_NPU_EMULATOR_DEVICES", "problem", "'4k'", "set it to a whole number from 0 to 1024"),
        ("VLLM_NPU_TRANSPORT_TIMEOUT", "ok", "''", ""),  # empty stands for the default
        ("VLLM_TARGET_DEVICE", "problem", "ignores platforms that are not its own", "unset VLLM_TARGET_DEVICE"),
        ("plugins", "warning", "other = other_platform:register", "VLLM_PLUGINS=vllm_npu"),
        ("cores", "warning", "OMP_NUM_THREADS=100000 is more than", "divided by the number of ranks"),
    ],
)
def test_a_finding_and_its_remedy(broken, name, status, what, remedy):
    [finding] = of_check(broken[1], name)
    assert finding["status"] == status
    assert what in finding["what"]
    assert remedy in finding["remedy"]


def test_every_problem_and_warning_has_a_remedy_and_all_is_printed(broken):
    done, findings = broken
    for finding in findings:
        assert finding["status"] == "ok" or finding["remedy"], finding
        assert f"{finding['status']:<8} {finding['check']}: {finding['what']}\n" in done.stdout
        assert f"-> {finding['remedy']}\n" in done.stdout or not finding["remedy"]
    count = [sum(finding["status"] == status for finding in findings) for status in ("warning", "problem")]
    assert done.stdout.endswith(f"{len(findings)} findings, {count[0]} warnings, {count[1]} problems\n")


def test_torch_that_loads_torch_npu_without_cann_gets_the_hook_as_remedy(tmp_path):
    packages = write_packages(tmp_path / "packages", torch=TORCH_THAT_LOADS_TORCH_NPU, torch_npu=TORCH_NPU_WITHOUT_CANN)
    done, findings = run_doctor(tmp_path, PYTHONPATH=packages, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert done.returncode == 1
    [finding] = of_check(findings, "import torch")
    assert "torch loads torch_npu by itself, which fails without CANN: ImportError: libhccl.so" in finding["what"]
    assert " -m vllm_npu.emulator hook > " in finding["remedy"]
    assert ".pth" in finding["remedy"]


def test_the_emulated_device_beside_cann_is_a_problem(tmp_path):
    home = {"ASCEND_HOME_PATH": "/somewhere"}
    _, findings = run_doctor(tmp_path, **home)
    assert of_check(findings, "CANN") == [
        {"check": "CANN", "status": "ok", "what": "ASCEND_HOME_PATH=/somewhere", "remedy": ""}
    ]
    [hccl] = of_check(findings, "libhccl")
    assert (hccl["status"], "does not load: " in hccl["what"]) == ("problem", True)
    assert "source set_env.sh of CANN" in hccl["remedy"]
    enabled = (
        "import os; os.environ['VLLM_NPU_EMULATOR'] = '1'; from vllm_npu.tools.doctor import machine_checks as d; "
    )
    command = [sys.executable, "-c", enabled + "print(next(d.check_cann()).status)"]
    alone = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, check=True)
    assert alone.stdout == "problem\n"


def test_plugins_that_vllm_is_told_to_leave_out(tmp_path):
    _, findings = run_doctor(tmp_path, VLLM_PLUGINS="other")
    [finding] = of_check(findings, "plugins")
    assert (finding["status"], finding["what"]) == ("warning", "VLLM_PLUGINS=other keeps vllm_npu out")


def test_it_imports_the_standard_library_only():
    code = "import sys; before = set(sys.modules); import vllm_npu.cli, vllm_npu.cli.doctor; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert packages - sys.stdlib_module_names == {"vllm_npu"}


@pytest.mark.parametrize("entry", [["-m", "vllm_npu"], ["-c", "from vllm_npu.cli import main; main()"]])
def test_it_runs_where_no_dependency_can_be_imported(entry, tmp_path):
    broken = "raise ImportError('this package is broken')\n"
    packages = write_packages(tmp_path, torch=broken, typer=broken, rich=broken, numpy=broken, vllm=broken)
    done = subprocess.run(
        [sys.executable, *entry, "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    [finding] = of_check(json.loads(done.stdout)["findings"], "import torch")
    assert "this package is broken" in finding["what"]


def test_a_check_that_raises_becomes_a_finding_and_the_others_still_run():
    def vanishes():
        yield Finding("disk", "ok", "seen")
        raise FileNotFoundError("/dev/shm/gone")

    def follows():
        yield Finding("next", "ok", "seen too")

    first, failed, last = examination.examine(checks={"disk": vanishes, "next": follows})
    assert (first.check, last.check) == ("disk", "next")
    assert (failed.check, failed.status) == ("disk", "problem")
    assert failed.what == "this check failed: FileNotFoundError: /dev/shm/gone"
    assert failed.remedy


def test_every_variable_has_a_rule_that_takes_its_default(monkeypatch):
    assert set(variable_checks.RULES) == set(envs.VARIABLES)
    for variable in variable_checks.RULES:
        monkeypatch.setenv(variable.name, variable.default)
        assert variable.default == "" or variable_checks.fault_of(variable) is None


@pytest.mark.parametrize("text", ["0", "1", "2", "true", "0.5", "nan", "60", "-1", "soon", "1e3"])
def test_switches_and_seconds_are_judged_as_they_are_read(text, monkeypatch):
    for variable, read in (
        (envs.CUDA_PLATFORM, envs.Variable.read_flag),
        (envs.COUNT_COLLECTIVES, envs.Variable.read_flag),
        (envs.TRANSPORT_TIMEOUT, envs.Variable.read_seconds),
    ):
        monkeypatch.setenv(variable.name, text)
        try:
            read(variable)
            is_read = True
        except UnsupportedConfigError:
            is_read = False
        assert (variable_checks.fault_of(variable) is None) == is_read


@pytest.mark.parametrize(
    ("distribution", "version", "status"),
    [
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.10.0", "ok"),  # the extra ascend
        ("torch", "2.11.0+cu130", "ok"),  # the extra cuda
        ("torch", "2.12.1", "warning"),
        ("torch", "2.15.0", "warning"),
        ("torch", "2.9.1+cpu", "problem"),
        ("vllm-ascend", "0.23.0.post1", "ok"),
        ("vllm-ascend", "0.30.0rc2", "ok"),
        ("vllm-ascend", "0.23.0", "warning"),
        ("vllm-ascend", "0.27.1rc1", "warning"),
    ],
)
def test_versions_are_judged_by_the_ranges_of_the_extras(distribution, version, status):
    finding = version_checks.judged_version(distribution, version)
    assert finding.status == status
    assert (finding.remedy == "") == (status == "ok")


def test_a_vllm_that_the_plugin_refuses_is_a_problem_with_the_plugins_words():
    def of_vllm(version: str) -> list[Finding]:
        return [finding for finding in version_checks.check_pairs([version]) if finding.check == "vllm"]

    [unsupported] = of_vllm("0.31.2")
    lines = ", ".join(release_lines.SUPPORTED)
    pairs = "vLLM 0.23 with vllm-ascend 0.23.0.post1, or vLLM 0.30 with vllm-ascend 0.30.0rc2"
    assert unsupported.what == (
        f"vLLM 0.31.2 is not supported by vllm_npu; supported release lines: {lines} ({pairs}; the others on CPUs)"
    )
    assert unsupported.remedy.startswith("Install one of them, or keep vllm_npu out")
    [without_ascend] = of_vllm("0.23.0")
    assert "supported on NPUs only, beside vllm-ascend" in without_ascend.what
    assert without_ascend.remedy.startswith("install both, or on CPUs another release line of vLLM: 0.32")
    assert of_vllm("0.32.1+cpu") == []


@pytest.mark.parametrize(
    ("vllm", "vllm_ascend", "fits"),
    [
        ("0.23.0+empty", "0.23.0.post1", True),
        ("0.30.0", "0.30.0rc2", True),
        ("0.30.0", "0.23.0.post1", False),
        ("0.30.0", "0.27.1rc1", False),
        ("0.23.0", "0.30.0rc2", False),
        ("0.32.0+cpu", "0.30.0rc2", False),
        ("0.32.0+cpu", None, True),
    ],
)
def test_a_pair_of_vllm_and_vllm_ascend_is_judged_with_those_that_are_supported(vllm, vllm_ascend, fits):
    release_lines.check_version(vllm)
    if fits:
        release_lines.check_base(vllm, vllm_ascend=vllm_ascend)
        return
    with pytest.raises(UnsupportedConfigError) as error:
        release_lines.check_base(vllm, vllm_ascend=vllm_ascend)
    assert f"vllm-ascend {vllm_ascend} is installed beside vLLM {vllm}" in str(error.value)
    assert "vLLM 0.23 with vllm-ascend 0.23.0.post1, or vLLM 0.30 with vllm-ascend 0.30.0rc2" in str(error.value)


@pytest.mark.parametrize("minor", range(24, 30))
def test_a_line_between_those_of_vllm_ascend_is_refused_with_both(minor):
    with pytest.raises(UnsupportedConfigError) as error:
        release_lines.check_version(f"0.{minor}.0")
    assert f"vLLM 0.{minor}.0 is not supported" in str(error.value)
    assert release_lines.ascend_pairs() in str(error.value)


@pytest.mark.parametrize(
    ("version", "status"), [("8.5.0", "ok"), ("8.10.RC1", "ok"), ("8.3.RC1", "warning"), ("unknown", "warning")]
)
def test_a_cann_older_than_the_limits_is_warned_about(version, status):
    finding = version_checks.judged_cann(version)
    assert (finding.status, bool(finding.remedy)) == (status, status == "warning")


# --- the machine, by folders laid out as the kernel does ---


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({}, None),
    ],
)
def test_what_the_control_group_grants(files, granted, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine_checks.granted_cores(tmp_path) == granted


def test_more_threads_than_the_control_group_grants_are_warned_about(tmp_path, monkeypatch):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores: less than one is granted to nobody")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    for threads, status in ((None, "warning"), ("2", "warning"), ("1", "ok"), ("one", "problem")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if threads is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
        [finding] = machine_checks.check_cores(tmp_path)
        assert finding.status == status, finding
        if status == "warning":
            assert "grants the time of 1" in finding.what
            assert finding.remedy == "set it to 1 divided by the number of ranks"


def test_nodes_and_bindings_of_ranks(tmp_path, monkeypatch):
    mine = sorted(os.sched_getaffinity(0))
    for node, cores in enumerate((mine[:1], mine[1:], [max(mine) + 1])):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}/cpulist").write_text(",".join(map(str, cores)) + "\n")
    monkeypatch.delenv(envs.CPU_OMP_THREADS_BIND, raising=False)
    [finding] = machine_checks.check_numa(tmp_path)
    assert (finding.status, "node 0: 1 cores" in finding.what, "node 2" in finding.what) == ("ok", True, False)
    for binding, status, said in (
        ("auto", None, ""),
        (f"{mine[0]}|{mine[-1]}", "ok", "2 ranks"),
        (f"{mine[0]}-{max(mine) + 1}", "problem", f"names cores that this process may not use: {max(mine) + 1}"),
        ("0:3", "problem", "no list of cores"),
    ):
        monkeypatch.setenv(envs.CPU_OMP_THREADS_BIND, binding)
        findings = [each for each in machine_checks.check_numa(tmp_path) if each.check == envs.CPU_OMP_THREADS_BIND]
        assert [each.status for each in findings] == ([status] if status else [])
        assert all(said in each.what for each in findings)


def test_a_numa_node_that_vanishes_before_it_is_read_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0/cpulist").write_text(f"{min(os.sched_getaffinity(0))}\n")
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1/cpulist").mkdir()  # listed, and no file that can be read
    monkeypatch.delenv(envs.CPU_OMP_THREADS_BIND, raising=False)
    [finding] = machine_checks.check_numa(tmp_path)
    assert finding.what == "node 0: 1 cores"


def test_files_of_shared_memory_come_and_go_while_doctor_looks(tmp_path, monkeypatch):
    """Another process makes and removes files all the time. No look at the folder may fail."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    names = [f"{shared_memory.PREFIX}0.999999999.{count}.1" for count in range(50)]
    churn = (
        "import os, sys\nwhile True:\n"
        "    for name in sys.argv[1:]: open(name, 'w').close()\n"
        "    for name in sys.argv[1:]:\n"
        "        try: os.unlink(name)\n"
        "        except FileNotFoundError: pass\n"
    )
    other = subprocess.Popen([sys.executable, "-S", "-c", churn, *(str(tmp_path / name) for name in names)])
    try:
        seen = removed = looks = 0
        while min(seen, removed) < 200 and looks < 20_000:
            findings = list(machine_checks.check_shared_memory(tmp_path))
            assert findings[0].check == str(tmp_path)
            seen += len(findings) > 1
            removed += len(shared_memory.clean_leftovers())
            looks += 1
    finally:
        other.kill()
        other.wait()
    assert min(seen, removed) > 0, "the other process made files"


@pytest.mark.parametrize("name", ["0.²", "0", "", "0.99999999999999999999999.0.1", "x.y.z"])
def test_a_name_that_no_process_made_is_left_over(name, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    (tmp_path / f"{shared_memory.PREFIX}{name}").touch()
    assert shared_memory.leftovers() == [tmp_path / f"{shared_memory.PREFIX}{name}"]


def test_devices_that_a_container_does_not_let_in_are_named(tmp_path):
    [finding] = machine_checks.check_npu_devices(tmp_path)
    assert (finding.status, "--device /dev/davinci0" in finding.remedy) == ("warning", True)
    for name in ("davinci10", "davinci2", "davinci_manager"):
        (tmp_path / name).touch()
    [finding] = machine_checks.check_npu_devices(tmp_path)
    assert (finding.status, finding.what) == ("ok", "2: 2, 10")


@pytest.mark.parametrize(
    ("message", "what", "remedy"),
    [
        ("mc2 takes 8 ranks, not 9; use all2all", "mc2 takes 8 ranks, not 9", "use all2all"),
        ("lines: 0.23, 0.32; or so. Install one", "lines: 0.23, 0.32; or so", "Install one"),
        ("nothing to be done", "nothing to be done", ""),
    ],
)
def test_an_error_becomes_what_and_remedy(message, what, remedy):
    assert Finding.refusal("it", message) == Finding("it", "problem", what, remedy)


# --- an engine to be started ---

DEEPSEEK_V3 = {"n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 7168, "torch_dtype": "bfloat16"}


def find_in_engine(model: Path, **given) -> Finding:
    engine = {"soc": "A3", "ep": 16, "tp": 1, "max_num_seqs": 32, "moe_comm": "auto", **given}
    [finding] = engine_findings.findings_of(examination.PlannedEngine(model=str(model), **engine))
    return finding


def test_a_recipe_is_read_option_by_option(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    recipe = {
        "multistream_overlap_shared_expert": True,
        "enable_fused_mc2": 1,
        "enable_mc2_hierarchy_comm": True,
        "combine_quant_mode": 0,
        "weight_prefetch_config": {"enabled": True},
    }
    engine = {"soc": "A3", "ep": 16, "tp": 1, "max_num_seqs": 32, "moe_comm": "allgather"}

    def found(additional_config):
        planned = examination.PlannedEngine(model=str(tmp_path), additional_config=additional_config, **engine)
        return [(each.check, each.status, each.what) for each in engine_findings.findings_of(planned)]

    *rows, last = found(recipe)
    assert last[:2] == ("engine", "ok")
    assert [row[:2] for row in rows] == [("recipe", "ok"), ("recipe", "problem"), ("recipe", "ok"), ("recipe", "ok")]
    assert [row[2].partition(":")[0] for row in rows] == [
        "multistream_overlap_shared_expert",
        "enable_fused_mc2",
        "enable_mc2_hierarchy_comm",
        "weight_prefetch_config",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "moe_comm=auto may start"),
        (["--additional-config", '{"vllm_npu": {"moe_comm": "allgather"}}'], "moe_comm=allgather may start"),
        (
            ["--additional-config", '{"vllm_npu": {"moe_comm": "mc2"}}', "--moe-comm", "naive"],
            "moe_comm=naive may start",
        ),
        (["--additional-config", '{"vllm_npu": {"moe_comm": "off"}}'], "moe_comm=off: vllm-ascend alone"),
        (["--moe-comm", "compare:all2all"], "moe_comm=compare:all2all may start"),
    ],
)
def test_the_strategy_of_a_recipe_is_the_one_that_is_checked(tmp_path, monkeypatch, options, says):
    monkeypatch.setenv("HCCL_BUFFSIZE", "300")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    engine = planned_engine(
        parse(["--model", str(tmp_path), "--soc", "A3", "--ep", "16", "--max-num-seqs", "32", *options])
    )
    assert engine is not None
    last = engine_findings.findings_of(engine)[-1]
    assert (last.status, last.what.startswith(says)) == ("ok", True), last


RECIPE = """#!/bin/sh
# a decode node
export HCCL_OP_EXPANSION_MODE=AIV HCCL_BUFFSIZE=300
export VLLM_ASCEND_ENABLE_FLASHCOMM1=1
export VLLM_ASCEND_BALANCE_SCHEDULING=1
VLLM_USE_V1=1 /opt/bin/vllm serve some/model \\
  --host 0.0.0.0 --port $PORT \\
  --data_parallel_size=4 -tp 4 --max-num-seqs 32 \\
  --enable-expert-parallel --no-enable-prefix-caching \\
  --kv-transfer-config \\
    '{"kv_connector": "C",
    "kv_role": "kv_consumer"
  }' \\
  --additional-config '{"enable_fused_mc2": 2}'
"""


def doctor_of_recipe(tmp_path: Path, script: str, *options: str) -> list[Finding]:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    (tmp_path / "run.sh").write_text(script)
    given = parse(["--recipe", str(tmp_path / "run.sh"), "--model", str(tmp_path), "--soc", "A3", *options])
    return engine_findings.findings_of(planned_engine(given))


def test_a_script_of_a_tutorial_is_read_option_by_option(tmp_path, monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "1")  # the recipe's own counts
    *rows, last = doctor_of_recipe(tmp_path, RECIPE)
    assert (last.status, last.what.partition(";")[0]) == ("ok", "moe_comm=auto may start on A3, TP4xDP4xEP")
    found = {row.what.partition(":")[0]: row.status for row in rows}
    assert found == {
        "enable_flashcomm1": "ok",
        "enable_fused_mc2": "ok",
        "--enable-expert-parallel": "ok",
        "--kv-transfer-config": "ok",
        "--kv-transfer-config with kv_consumer": "ok",
        "VLLM_ASCEND_BALANCE_SCHEDULING=1": "ok",
    }


@pytest.mark.parametrize(
    ("options", "config", "starts"),
    [("--quantization ascend", {}, True), ("", {"quantize": "w8a8_dynamic"}, True), ("", {}, False)],
)
def test_the_fused_operator_for_decode_steps_is_for_experts_in_w8a8(tmp_path, monkeypatch, options, config, starts):
    monkeypatch.setenv("HCCL_BUFFSIZE", "1")
    monkeypatch.setitem(DEEPSEEK_V3, "quantize", config.get("quantize", "float"))
    script = RECIPE.replace('"enable_fused_mc2": 2', '"enable_fused_mc2": 2, "vllm_npu": {"moe_comm": "fused_mc2"}')
    last = doctor_of_recipe(tmp_path, script.replace("--no-enable", f"{options} --no-enable"))[-1]
    assert (last.status == "ok") == starts
    assert ("fused_mc2 takes up to 42 tokens a rank" if starts else "takes no layers of quantisation none") in last.what


@pytest.mark.parametrize(
    ("option", "more"),
    [("--enable-lora", "--lora-target-modules q_proj o_proj"), ("--enable-dbo", "")],
    ids=["adapters beside the experts", "dual batch overlap, which vllm-ascend turns off"],
)
def test_what_a_script_may_have_is_taken(tmp_path, monkeypatch, option, more):
    monkeypatch.setenv("HCCL_BUFFSIZE", "1")
    script = RECIPE.replace("--no-enable", f"{option} {more} --no-enable")
    [row] = [row for row in doctor_of_recipe(tmp_path, script) if row.what.startswith(f"{option}:")]
    assert row.status == "ok"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("HCCL_BUFFSIZE=300", "HCCL_BUFFSIZE=1"), "HcclBufferError"),
        (("--no-enable", "--enable-fault-tolerance --no-enable"), "--enable-fault-tolerance True: vLLM has no hook"),
        (("--no-enable", "--enable-lora --no-enable"), "--enable-lora True: with data parallelism"),
        (("--no-enable", "--prefill-context-parallel-size 2 --no-enable"), "--prefill-context-parallel-size 2: "),
        (("VLLM_USE_V1", "VLLM_USE_V2_MODEL_RUNNER"), "VLLM_USE_V2_MODEL_RUNNER=1: model runner V2"),
        (("export VLLM", "export VLLM_NPU_MOE_COMM=fastest VLLM"), "unknown moe_comm 'fastest'"),
    ],
)
def test_what_a_script_cannot_have_is_a_problem(tmp_path, monkeypatch, change, what):
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    problems = []
    try:
        problems = [row.what for row in doctor_of_recipe(tmp_path, RECIPE.replace(*change)) if row.status == "problem"]
    except UnsupportedConfigError as error:
        problems = [str(error)]
    assert any(what in each for each in problems), problems


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("export HCCL_BUFFSIZE=300", "the recipe has 0 commands that start vLLM"),
        ("vllm serve a\nvllm serve b", "the recipe has 2 commands"),
        ("vllm serve a -tp $TP", "invalid int value: '$TP'; write the value into the recipe"),
        ("vllm serve a --additional-config '[1]'", "is no JSON object"),
        ("VLLM_ASCEND_ENABLE_FUSED_MC2=yes vllm serve a", "VLLM_ASCEND_ENABLE_FUSED_MC2=yes is no number"),
        ("vllm serve 'a", "the recipe has a quotation that does not end, in the command: vllm serve 'a"),
    ],
)
def test_a_script_that_cannot_be_read_is_refused(tmp_path, capsys, script, message):
    with pytest.raises(SystemExit, match="2"):
        doctor_of_recipe(tmp_path, script)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--additional-config", "[]"], ["--additional-config", "{"]])
def test_a_recipe_that_is_no_json_object_is_refused(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--model", "config.json", "--ep", "2", *options])
    assert "--additional-config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "what", "remedy"),
    [
        ({}, "HcclBufferError: mc2 on A3, full mesh needs HCCL_BUFFSIZE=239", "export HCCL_BUFFSIZE=239 on every rank"),
        ({"soc": "310P"}, "UnsupportedDeviceError: vllm_npu moves no tokens between chips of 310P", '"moe_comm": "off"'),
        ({"moe_comm": "mc2", "soc": "A2", "ep": 4}, "DeviceLimitError: mc2 on A2, full mesh takes at most 24", "use all2all"),
        ({"ep": 24, "soc": "A3"}, "256 experts do not divide over ep_size=24", "choose tp_size * dp_size = 16 or 32, or add 8"),
        ({"tp": 3}, "--ep 16 is no multiple of --tp 3", "choose ep = tp * dp"),
        ({"soc": "A9"}, "there is no --soc A9", "name one of A2, A3, 310P, A5"),
        ({"moe_comm": "fastest"}, "unknown moe_comm 'fastest'", "there are: auto"),
    ],
    ids=str,
)  # fmt: skip
def test_an_engine_that_the_plugin_would_refuse_is_a_problem(given, what, remedy, tmp_path, monkeypatch):
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    finding = find_in_engine(tmp_path, **given)
    assert finding.status == "problem"
    assert what in finding.what
    assert remedy in finding.remedy


def test_an_engine_that_may_start_is_told_what_it_may_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "1000")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    assert find_in_engine(tmp_path) == Finding(
        "engine", "ok", "moe_comm=auto may start on A3, TP1xDP16xEP; mc2 takes up to 133 tokens a rank"
    )
    assert find_in_engine(tmp_path, soc=None).what.startswith("moe_comm=auto may start on no NPU, TP1xDP16xEP")


def test_the_command_looks_at_an_engine(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    options = ("--model", str(tmp_path), "--soc", "A3", "--ep", "16", "--max-num-seqs", "32")
    done, findings = run_doctor(tmp_path, *options, HCCL_BUFFSIZE="100")
    assert done.returncode == 1
    [finding] = of_check(findings, "engine")
    assert "needs HCCL_BUFFSIZE=239" in finding["what"]
    assert of_check(findings, "HCCL_BUFFSIZE")[0]["what"].startswith("is set to '100'")
    command = [sys.executable, "-m", "vllm_npu", "doctor", "--ep", "16"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2
