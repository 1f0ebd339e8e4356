"""The emulated runtime: through torch_npu, and by its own C interface."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch_npu

from vllm_npu.emulator import build, soc

pytestmark = pytest.mark.emulated

GB = 1 << 30
CONTEXT_NULL = 107002
PARAM_INVALID = 107000
INVALID_DEVICE = 107001
OUT_OF_MEMORY = 207001
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


def acl() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.library_folder() / "libascendcl.so"))
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library


def error_text() -> str:
    return acl().aclGetRecentErrMsg().decode()


def run_python(text: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh interpreter that has the emulated device but not torch."""
    prelude = "import ctypes, os, time; from vllm_npu import emulator; emulator.enable()\n"
    prelude += "from vllm_npu.emulator import build\n"
    prelude += "acl = ctypes.CDLL(str(build.library_folder() / 'libascendcl.so'))\n"
    prelude += "acl.aclGetRecentErrMsg.restype = ctypes.c_char_p\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + text],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- Devices ---


def test_devices_of_the_chip():
    assert torch.npu.is_available()
    assert torch.npu.device_count() == 16
    torch.npu.set_device(0)
    properties = torch.npu.get_device_properties(0)
    assert properties.name == torch.npu.get_device_name(0) == os.environ["VLLM_NPU_EMULATOR_SOC"]
    assert properties.total_memory == 64 * GB
    assert properties.cube_core_num > 0


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(RuntimeError, match="there is no emulated device 99, only 0 to 15"):
        torch.empty(1, device="npu:99")


def test_a_thread_has_no_device_until_it_sets_one():
    codes = []

    def ask() -> None:
        device = ctypes.c_int32()
        codes.append(acl().aclrtGetDevice(ctypes.byref(device)))
        codes.append(acl().aclrtSetDevice(99))
        codes.append(acl().aclrtSetDevice(3))
        codes.append(acl().aclrtGetDevice(ctypes.byref(device)))
        codes.append(device.value)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert codes == [CONTEXT_NULL, INVALID_DEVICE, 0, 0, 3]


DEFAULT_DEVICE = """
import pathlib, tempfile
configuration = tempfile.NamedTemporaryFile("w", suffix=".json")
configuration.write('{"dump": {}, "defaultDevice": {"default_device" : "1"}}')
configuration.flush()
free, total, active = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_int32()
before = acl.aclrtGetMemInfo(0, ctypes.byref(free), ctypes.byref(total))
print(acl.aclInit(configuration.name.encode()), before)
for device in (0, 1):
    acl.aclrtGetPrimaryCtxState(device, None, ctypes.byref(active))
    print(device, active.value)
print(acl.aclrtGetMemInfo(0, ctypes.byref(free), ctypes.byref(total)), total.value > 0)
for device in (0, 1):
    acl.aclrtGetPrimaryCtxState(device, None, ctypes.byref(active))
    print(device, active.value)
acl.aclrtResetDevice(1)
acl.aclrtGetPrimaryCtxState(1, None, ctypes.byref(active))
print(active.value)
"""


def test_a_thread_that_sets_no_device_uses_the_configured_default():
    done = run_python(DEFAULT_DEVICE)
    assert done.stdout.splitlines() == [f"0 {CONTEXT_NULL}", "0 0", "1 0", "0 True", "0 0", "1 1", "0"], done.stderr


def test_the_first_call_of_a_process_may_be_about_the_device():
    done = run_python("import torch, torch_npu; print(torch.npu.get_device_properties(0).name)")
    assert done.stdout.split()[-1] == os.environ["VLLM_NPU_EMULATOR_SOC"], done.stderr


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({"VLLM_NPU_EMULATOR_DEVICES": "3"}, 3),
        ({"VLLM_NPU_EMULATOR_DEVICES": "8", "ASCEND_RT_VISIBLE_DEVICES": "4,5"}, 2),
        ({"VLLM_NPU_EMULATOR_DEVICES": "8", "ASCEND_RT_VISIBLE_DEVICES": "4,9,5"}, 1),
        ({"LOCAL_WORLD_SIZE": "20"}, 20),
    ],
)
def test_number_of_devices(env, count):
    script = "n = ctypes.c_uint32(); acl.aclrtGetDeviceCount(ctypes.byref(n)); print(n.value)"
    assert run_python(script, **env).stdout == f"{count}\n"


def test_devices_may_be_hidden_until_the_device_starts():
    count = "acl.aclrtGetDeviceCount(ctypes.byref(n)); print(n.value)"
    hide = "os.environ['ASCEND_RT_VISIBLE_DEVICES'] = "
    script = f"import os; n = ctypes.c_uint32(); {count}; {hide}'3,4'; {count}; acl.aclInit(None); {hide}'3'; {count}"
    assert run_python(script, VLLM_NPU_EMULATOR_DEVICES="8").stdout.split() == ["8", "2", "2"]


def test_bad_settings_are_refused_by_name():
    done = run_python("print(acl.aclInit(None))", VLLM_NPU_EMULATOR_MEMORY_GB="lots")
    assert done.stdout == "100000\n"
    assert "VLLM_NPU_EMULATOR_MEMORY_GB=lots: set it to a whole number" in done.stderr
    done = run_python("print(acl.aclInit(None))", VLLM_NPU_EMULATOR_LOG="error")
    assert "VLLM_NPU_EMULATOR_LOG=error: set it to a whole number from 0 to 3" in done.stderr
    done = run_python("print(acl.aclInit(None))", VLLM_NPU_EMULATOR_LIMITS="some")
    assert "VLLM_NPU_EMULATOR_LIMITS=some: set it to device or none" in done.stderr


def test_the_runtime_and_the_launcher_know_the_same_chips():
    refused = run_python("print(acl.aclInit(None))", VLLM_NPU_EMULATOR_SOC="Ascend910_95")
    assert refused.stdout == "", "the launcher's side refuses it first"
    load = "import ctypes; from vllm_npu.emulator import build; ctypes.CDLL(build.library_folder() / 'libascendcl.so')"
    by_itself = subprocess.run(
        [sys.executable, "-c", f"{load}.aclInit(None)"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "VLLM_NPU_EMULATOR_SOC": "Ascend910_95"},
        capture_output=True,
        text=True,
        check=True,
    )
    _, _, listed = by_itself.stderr.strip().partition("is not emulated; use a name that starts with one of ")
    assert listed.split(", ") == [prefix for family in soc.FAMILIES for prefix in family.prefixes]
    for family in soc.FAMILIES:
        assert family.default_soc.startswith(family.prefixes)


# --- Memory ---


def test_memory_is_accounted_for():
    torch.npu.set_device(1)
    torch.npu.empty_cache()  # of earlier tests
    free_before, total = torch.npu.mem_get_info(1)
    x = torch.empty(100 << 20, dtype=torch.uint8, device="npu:1")
    free_with, _ = torch.npu.mem_get_info(1)
    assert 100 << 20 <= free_before - free_with <= 128 << 20
    assert torch.npu.memory_allocated(1) >= x.numel()
    del x
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info(1) == (free_before, total)
    torch.npu.set_device(0)


def test_out_of_memory():
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 80"):
        torch.empty(80 * GB, dtype=torch.uint8, device="npu")
    assert torch.ones(1, device="npu").item() == 1


def test_capacity_is_a_setting():
    script = (
        "acl.aclrtSetDevice(0); p = ctypes.c_void_p()\n"
        "print(acl.aclrtMalloc(ctypes.byref(p), ctypes.c_size_t(2 << 30), 0), "
        "acl.aclrtMalloc(ctypes.byref(p), ctypes.c_size_t(2 << 30), 0), acl.aclGetRecentErrMsg().decode())"
    )
    done = run_python(script, VLLM_NPU_EMULATOR_MEMORY_GB="3")
    assert done.stdout.startswith(f"0 {OUT_OF_MEMORY} aclrtMalloc: out of memory on emulated device 0")


def test_copies_stay_within_their_allocation():
    acl().aclrtSetDevice(0)
    # Several, because the host's kernel likes to place an allocation right below the one before it.
    allocations = [ctypes.c_void_p() for _ in range(8)]
    for device in allocations:
        assert acl().aclrtMalloc(ctypes.byref(device), ctypes.c_size_t(4096), 0) == 0
    for device in allocations:
        check_copies_of_4096_bytes(device)


def check_copies_of_4096_bytes(device: ctypes.c_void_p) -> None:
    host = ctypes.create_string_buffer(b"x" * 8192, 8192)
    size = ctypes.c_size_t
    assert acl().aclrtMemcpy(device, size(4096), host, size(8192), HOST_TO_DEVICE) == PARAM_INVALID
    assert "copies 8192 bytes to a destination of 4096" in error_text()
    assert acl().aclrtMemcpy(device, size(8192), host, size(8192), HOST_TO_DEVICE) == PARAM_INVALID
    assert "has 4096 bytes to the end of its allocation" in error_text()
    assert acl().aclrtMemcpy(host, size(4096), host, size(1), DEVICE_TO_HOST) == PARAM_INVALID
    assert "is not device memory" in error_text()
    assert acl().aclrtMemcpy(device, size(4096), host, size(4096), HOST_TO_DEVICE) == 0
    assert acl().aclrtFree(device) == 0
    assert acl().aclrtFree(device) == PARAM_INVALID


def test_expandable_segments():
    script = (
        "import torch, torch_npu; x = torch.ones(3 << 20, device='npu'); y = torch.ones(9 << 20, device='npu')\n"
        "del x; x = torch.zeros(20 << 20, device='npu'); print(x.sum().item(), y.sum().item())"
    )
    done = run_python(script, PYTORCH_NPU_ALLOC_CONF="expandable_segments:True")
    assert done.stdout.splitlines()[-1] == f"0.0 {float(9 << 20)}", done.stderr


ZEROS = """
import torch, torch_npu
torch.npu.set_device(0)
torch.zeros(1, device="npu")  # the device starts

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = resident()
cache = torch.zeros(1 << 30, dtype=torch.uint8, device="npu")
torch.npu.synchronize()
print(resident() - before < 1 << 26)

cache[1000:1 << 25] = 7
edges = cache[:1 << 26]
edges[5000:(1 << 25) - 3].zero_()
torch.npu.synchronize()
print(edges.cpu().nonzero().flatten().tolist() == [*range(1000, 5000), *range((1 << 25) - 3, 1 << 25)])
cache.zero_()
print(int(cache[:1 << 26].count_nonzero()))
"""


@pytest.mark.parametrize("expandable", ["True", "False"])
def test_zeros_take_no_memory_of_the_host_before_they_are_used(expandable):
    done = run_python(ZEROS, PYTORCH_NPU_ALLOC_CONF=f"expandable_segments:{expandable}")
    assert done.stdout.split() == ["True", "True", "0"], done.stderr


# --- Streams and events ---


def test_events_have_times_in_order():
    first, second = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    first.record()
    (torch.ones(200, 200).npu() @ torch.ones(200, 200).npu()).sum().item()
    second.record()
    second.synchronize()
    assert first.query()
    assert first.elapsed_time(second) > 0


def test_pinned_memory_and_copies_on_a_stream():
    stream = torch.npu.Stream()
    host = torch.arange(1000.0).pin_memory()
    assert host.is_pinned()
    with torch.npu.stream(stream):
        x = host.to("npu", non_blocking=True)
    stream.synchronize()
    assert torch.equal(x.cpu(), host)


ASYNCHRONOUS = """
acl.aclrtSetDevice(0)
stream, other, event = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
device, host, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t
acl.aclrtCreateStream(ctypes.byref(stream)); acl.aclrtCreateStream(ctypes.byref(other))
acl.aclrtCreateEventExWithFlag(ctypes.byref(event), 0)
acl.aclrtMalloc(ctypes.byref(device), size(4096), 0); acl.aclrtMallocHost(ctypes.byref(host), size(4096))
def first_byte(): return ctypes.string_at(host, 1)[0]
ctypes.memset(host, 9, 4096)
acl.aclrtMemsetAsync(device, size(4096), 5, size(4096), stream)
acl.aclrtMemcpyAsync(host, size(4096), device, size(4096), 2, stream)
early = first_byte()
acl.aclrtRecordEvent(event, stream)
status = ctypes.c_int(); acl.aclrtQueryEventStatus(event, ctypes.byref(status)); pending = status.value
acl.aclrtSynchronizeEvent(event)
late = first_byte()
# another stream that waits for the event sees what was before it
acl.aclrtMemsetAsync(device, size(4096), 6, size(4096), stream)
acl.aclrtRecordEvent(event, stream); acl.aclrtStreamWaitEvent(other, event)
acl.aclrtMemcpyAsync(host, size(4096), device, size(4096), 2, other)
acl.aclrtSynchronizeStream(other)
print(early, pending, late, first_byte(), acl.aclrtDestroyStream(stream), acl.aclrtSynchronizeStream(stream) != 0)
"""


@pytest.mark.skipif(not hasattr(torch_npu.npu, "npurt"), reason="needs torch_npu 2.13, which has npu.npurt")
def test_registering_no_host_memory_fails():
    runtime, host = torch_npu.npu.npurt(), torch.empty(4096, dtype=torch.uint8)
    pinned = 0x10000000
    assert int(runtime.npuHostRegister(host.data_ptr(), 0, pinned)) != 0
    assert int(runtime.npuHostRegister(0, 4096, pinned)) != 0
    assert int(runtime.npuHostRegister(host.data_ptr(), 4096, pinned)) == 0
    assert int(runtime.npuHostUnregister(host.data_ptr())) == 0


def test_synchronous_streams_are_done_at_once():
    assert run_python(ASYNCHRONOUS).stdout == "5 1 5 6 0 True\n"


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_asynchronous_streams_are_ordered_by_events(seed):
    done = run_python(ASYNCHRONOUS, VLLM_NPU_EMULATOR_ASYNC=seed)
    assert done.stdout == "9 0 5 6 0 True\n", done.stderr


# --- What is not emulated ---


def test_stubs_fail_by_their_name():
    assert acl().aclmdlInitDump() != 0
    assert "aclmdlInitDump is not emulated" in error_text()


def test_a_graph_operator_is_refused_by_its_name():
    assert acl().aclopCompileAndExecute(b"FancyOp", 0, None, None, 0, None, None, None, 0, 0, None, None) != 0
    assert "operator FancyOp has no aclnn kernel in the emulator" in error_text()
