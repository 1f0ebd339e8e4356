"""Import of matplotlib, which only --plot needs."""

from typing import Any

from vllm_npu.errors import UnsupportedConfigError


def import_pyplot() -> Any:
    """matplotlib's pyplot, set up to draw without a display. Raises UnsupportedConfigError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UnsupportedConfigError(f"--plot needs matplotlib ({error}); pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
