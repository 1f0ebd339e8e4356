"""The transports: one row each. A class is imported when it is first asked for."""

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
    """The class behind a row of TRANSPORTS. Raises UnsupportedConfigError for an unknown name."""
    if name not in TRANSPORTS:
        raise UnsupportedConfigError(f"unknown transport {name!r}; there are: {', '.join(TRANSPORTS)}")
    module, _, attribute = TRANSPORTS[name].partition(":")
    found: type[Transport] = getattr(import_module(module), attribute)
    return found
