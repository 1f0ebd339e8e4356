"""Two servers that start at the same time: the end of one is noticed while the other one is waited for."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.time_limits import PATIENCE_SECONDS
from vllm_npu.tools.engines.engine_processes import EngineFailedError, Parallelism
from vllm_npu.tools.engines.http_engine import START_SECONDS, HttpEngine
from vllm_npu.tools.engines.stop_signals import StopSignals

SERVES = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
NEVER_READY = "import time; time.sleep(600)"
ENDS = "import sys; sys.exit('SomeError: no room')"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def start(stack: ExitStack, folder: Path, program: str) -> HttpEngine:
    """A server that is this program, in place of vLLM's."""
    engine = HttpEngine(
        Path(folder.name),
        Parallelism(tensor_parallel_size=1, data_parallel_size=1, expert_parallel=False),
        plugins="",
        environment={},
        moe_comm="auto",
        dtype="float16",
        folder=folder,
        caches=folder,
        stop_signals=StopSignals(),
    )
    engine._command = [sys.executable, "-c", program, str(engine.port)]
    return stack.enter_context(engine)


def test_a_server_that_ends_is_noticed_while_another_one_is_waited_for(stack, tmp_path):
    assert START_SECONDS > PATIENCE_SECONDS, "so the wait for the first server would be longer"
    waited_for, failed = (start(stack, tmp_path / name, text) for name, text in (("a", NEVER_READY), ("b", ENDS)))
    began = time.monotonic()
    with pytest.raises(EngineFailedError, match=r"^b .* the server ended with exit status 1 while starting") as error:
        waited_for.wait_until_ready(beside=[failed])
    assert "SomeError: no room" in str(error.value)
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_servers_that_become_ready_are_no_fault(stack, tmp_path):
    both = [start(stack, tmp_path / name, SERVES) for name in ("a", "b")]
    both[0].wait_until_ready(beside=both[1:])
    both[1].wait_until_ready()
