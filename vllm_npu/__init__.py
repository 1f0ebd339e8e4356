"""Expert-parallel communication layer of vLLM for Ascend NPUs, as a vLLM platform plugin."""

__version__ = "0.1.0"
