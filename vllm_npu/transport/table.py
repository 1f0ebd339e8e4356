"""Table of the transports. transport_class() imports a class at its first use."""

from importlib import import_module

from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.transport.base import Transport

TRANSPORTS = {
    "gloo": "vllm_npu.transport.gloo:GlooTransport",
    "hccl": "vllm_npu.transport.hccl:HcclTransport",
    "nccl": "vllm_npu.transport.nccl:NcclTransport",
    "threaded": "vllm_npu.transport.threaded:ThreadedTransport",
}


def transport_class(name: str) -> type[Transport]:
    """Import and return the class of a row of TRANSPORTS. Raises UnsupportedConfigError for an unknown name."""
    if name not in TRANSPORTS:
        raise UnsupportedConfigError(f"unknown transport {name!r}; there are: {', '.join(TRANSPORTS)}")
    module, _, attribute = TRANSPORTS[name].partition(":")
    found: type[Transport] = getattr(import_module(module), attribute)
    return found
