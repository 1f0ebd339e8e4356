"""A build of the C++ parts that is killed: no ninja and no compiler goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import wait_until

pytestmark = pytest.mark.emulated

SLOW = """
cmake_minimum_required(VERSION 3.20)
project(slow NONE)
add_custom_target(slow ALL COMMAND sh -c "echo $$ > {started}.new && mv {started}.new {started} && exec sleep 3600" VERBATIM)
"""
BUILD = """
import sys
from pathlib import Path
from vllm_npu.emulator.build import DEVICE
from vllm_npu.native_build import Component
Component.source_folder = lambda self: Path(sys.argv[1])
Component.cache_key = lambda self: "slow"
DEVICE.build()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_leaves_no_process_behind(tmp_path, how):
    started = tmp_path / "started"
    (tmp_path / "CMakeLists.txt").write_text(SLOW.format(started=started))
    environment = os.environ | {"VLLM_NPU_ENV_HOME": str(tmp_path / "home"), "VLLM_NPU_EMULATOR": "0"}
    with subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], env=environment) as build:
        wait_until(started.is_file, "the build's first command starts")
        command = Path("/proc", started.read_text().strip())
        assert command.exists()
        build.send_signal(how)
    wait_until(lambda: not command.exists(), f"{command} ends")
