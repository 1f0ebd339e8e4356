"""matplotlib, which is needed for --plot only."""

from typing import Any

from vllm_npu.errors import UnsupportedConfigError


def import_pyplot() -> Any:
    """Without a display. Raises UnsupportedConfigError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UnsupportedConfigError(f"--plot needs matplotlib ({error}); pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
