"""libhccl.so by ctypes: a table of its functions. A result code becomes a TransportError with a remedy.

The declarations follow hccl.h and hccl_types.h (CANN 8.5), which torch_npu ships.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch

from vllm_npu.errors import TransportError, UnsupportedConfigError

LIBRARY = "libhccl.so"
ROOT_INFO_BYTES = 4108


class RootInfo(ctypes.Structure):
    """HcclRootInfo. Rank 0 makes it; every rank of the communicator needs it."""

    _fields_ = [("internal", ctypes.c_char * ROOT_INFO_BYTES)]


class SendRecvItem(ctypes.Structure):
    """HcclSendRecvItem."""

    _fields_ = [
        ("type", c_int),  # SEND or RECV
        ("buffer", c_void_p),
        ("count", c_uint64),
        ("data_type", c_int),
        ("peer", c_uint32),
    ]


SEND, RECV = 0, 1  # HcclSendRecvType
SUM = 0  # HcclReduceOp
BYTES = 0  # HCCL_DATA_TYPE_INT8: the type of rows that are moved and not summed; every function takes it
DATA_TYPES = {  # HcclDataType of tensors that are summed; each chip takes some of them
    torch.int8: 0,
    torch.int16: 1,
    torch.int32: 2,
    torch.float16: 3,
    torch.float32: 4,
    torch.int64: 5,
    torch.uint8: 7,
    torch.float64: 10,
    torch.bfloat16: 11,
}

_COMM, _STREAM, _BUFFER, _COUNTS = c_void_p, c_void_p, c_void_p, POINTER(c_uint64)
FUNCTIONS: dict[str, list[Any]] = {
    "HcclGetRootInfo": [POINTER(RootInfo)],
    "HcclCommInitRootInfo": [c_uint32, POINTER(RootInfo), c_uint32, POINTER(_COMM)],
    "HcclCommDestroy": [_COMM],
    "HcclGetCommAsyncError": [_COMM, POINTER(c_int)],
    "HcclAllReduce": [_BUFFER, _BUFFER, c_uint64, c_int, c_int, _COMM, _STREAM],
    "HcclBroadcast": [_BUFFER, c_uint64, c_int, c_uint32, _COMM, _STREAM],
    "HcclAllGather": [_BUFFER, _BUFFER, c_uint64, c_int, _COMM, _STREAM],
    "HcclAllGatherV": [_BUFFER, c_uint64, _BUFFER, _COUNTS, _COUNTS, c_int, _COMM, _STREAM],
    "HcclReduceScatter": [_BUFFER, _BUFFER, c_uint64, c_int, c_int, _COMM, _STREAM],
    "HcclReduceScatterV": [_BUFFER, _COUNTS, _COUNTS, _BUFFER, c_uint64, c_int, c_int, _COMM, _STREAM],
    "HcclAlltoAll": [_BUFFER, c_uint64, c_int, _BUFFER, c_uint64, c_int, _COMM, _STREAM],
    "HcclAlltoAllV": [_BUFFER, _COUNTS, _COUNTS, c_int, _BUFFER, _COUNTS, _COUNTS, c_int, _COMM, _STREAM],
    "HcclSend": [_BUFFER, c_uint64, c_int, c_uint32, _COMM, _STREAM],
    "HcclRecv": [_BUFFER, c_uint64, c_int, c_uint32, _COMM, _STREAM],
    "HcclBatchSendRecv": [POINTER(SendRecvItem), c_uint32, _COMM, _STREAM],
    "HcclBarrier": [_COMM, _STREAM],
}
"""The argument types of each function. Each function returns an HcclResult."""


_BUFFER_MEMORY = "lower HCCL_BUFFSIZE or the memory that the engine may use"
_NETWORK = "check the devices' network (hccn_tool)"
REMEDIES = {
    1: "(parameter error); compare what each rank passed: counts and types must match between them",
    2: "(empty pointer); the communicator is closed, or a tensor has no memory",
    3: f"(memory error); {_BUFFER_MEMORY}",
    5: "(not supported); this chip or CANN lacks the function; go through torch.distributed (VLLM_NPU_HCCL_OPS=0)",
    9: "(time-out); look for the rank that is late or lost, or raise HCCL_EXEC_TIMEOUT or HCCL_CONNECT_TIMEOUT",
    11: "(connection failed); check the network between the ranks' hosts and HCCL_IF_IP",
    12: f"(connection failed); {_NETWORK}",
    15: "(runtime call failed); set the device of this rank first: torch.npu.set_device(rank)",
    19: f"(network error); {_NETWORK}",
    21: "(another rank failed); look at the other ranks' logs",
    22: "(the communicator is suspended); restart the group's ranks",
    24: f"(out of memory); {_BUFFER_MEMORY}",
}
"""The meaning of each result code, and what a user can do."""
OTHER = "(see HcclResult in hccl_types.h); look at the first error in the ranks' logs; restart the group's ranks"


class HcclLibrary:
    """The libhccl.so that torch_npu has loaded. Raises UnsupportedConfigError where there is none."""

    def __init__(self) -> None:
        import torch_npu  # noqa: F401  # loads CANN

        try:
            self._library = ctypes.CDLL(LIBRARY)
            self._runtime = ctypes.CDLL("libascendcl.so")
        except OSError as error:
            raise UnsupportedConfigError(
                f"HCCL cannot be loaded ({error}); install CANN and source its set_env.sh, or run under the emulated Ascend "
                "device: python -m vllm_npu.emulator run"
            ) from error
        self._runtime.aclGetRecentErrMsg.argtypes, self._runtime.aclGetRecentErrMsg.restype = [], c_char_p

    def call(self, function: str, *arguments: Any, operation: str, group: str, rank: int) -> None:
        """Call one of FUNCTIONS. Raises TransportError with HCCL's own text and a remedy where the call fails, and
        UnsupportedConfigError where this CANN lacks the function."""
        try:
            found = getattr(self._library, function)
        except AttributeError as error:
            raise UnsupportedConfigError(
                f"{LIBRARY} has no {function}, which {operation} needs; install the CANN that this torch_npu needs"
            ) from error
        found.argtypes, found.restype = FUNCTIONS[function], c_int
        code = found(*arguments)
        if code:
            text = self._runtime.aclGetRecentErrMsg()
            said = f". HCCL says: {text.decode(errors='replace')}" if text else ""
            raise TransportError(
                operation, group, rank, f"{function} returned {code} {REMEDIES.get(code, OTHER)}{said}"
            )


@cache
def load() -> HcclLibrary:
    """The library. The first call loads it."""
    return HcclLibrary()
