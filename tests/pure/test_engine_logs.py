"""What a failed engine's error shows of its log."""

from pathlib import Path

from vllm_npu.tools.engines.engine_processes import LOG_TAIL_LINES, end_of


def test_the_first_error_is_shown_however_much_follows(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    cause = "(Worker_DP1 pid=7) ERROR ... RuntimeError: no memory"
    later = [f"line {number}" for number in range(LOG_TAIL_LINES)]
    log.write_text("\n".join(["starting", cause, "waiting", *later]))
    assert end_of(log).splitlines() == [
        "--- first errors in server.log ---",
        cause,
        "--- end of server.log ---",
        *later,
    ]


def test_an_error_among_the_last_lines_is_shown_once(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("starting\nValueError: wrong\n")
    assert end_of(log) == "--- end of server.log ---\nstarting\nValueError: wrong"
