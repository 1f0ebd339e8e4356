"""Calls a function of the emulated aclnn library with torch tensors, as vllm-ascend's compiled operators do (EXEC_NPU_CMD)."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache

import torch

ACL_FORMAT_ND = 2
ACL_TYPES = {  # aclDataType
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.int64: 9,
    torch.bool: 12,
    torch.bfloat16: 27,
}
Argument = torch.Tensor | Sequence[torch.Tensor] | str | int | float | None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libopapi.so")
    library.aclCreateTensor.restype = ctypes.c_void_p
    library.aclCreateTensorList.restype = ctypes.c_void_p
    return library


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL("libascendcl.so")
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library


def call(name: str, *arguments: Argument) -> None:
    """Plan the function `name` with these arguments, and run it on the current stream. A tensor may be None.

    Raises RuntimeError with the text of a refusal. On an asynchronous stream, the run's refusal comes at the next sync.
    """
    import torch_npu

    library = _library()
    workspace, executor = ctypes.c_uint64(), ctypes.c_void_p()
    with ExitStack() as handles:
        values = [handles.enter_context(_as_c(argument)) for argument in arguments]
        _check(name, library[f"{name}GetWorkspaceSize"](*values, ctypes.byref(workspace), ctypes.byref(executor)))
    stream = ctypes.c_void_p(torch_npu.npu.current_stream().npu_stream)  # waits until torch_npu's queue is empty
    _check(name, library[name](None, ctypes.c_uint64(0), executor, stream))


def _check(name: str, code: int) -> None:
    if code:
        text = _runtime().aclGetRecentErrMsg() or b""
        raise RuntimeError(f"{name} failed with {code}: {text.decode(errors='replace')}")


@contextmanager
def _as_c(argument: Argument) -> Iterator[ctypes._SimpleCData | bytes | None]:  # type: ignore[type-arg]
    """The C parameter of an argument. Handles live until the function is planned."""
    library = _library()
    if argument is None:
        yield None
    elif isinstance(argument, torch.Tensor):
        handle = _tensor(argument)
        yield handle
        library.aclDestroyTensor(handle)
    elif isinstance(argument, str):
        yield argument.encode()
    elif isinstance(argument, float):
        yield ctypes.c_double(argument)
    elif isinstance(argument, int):
        yield ctypes.c_int64(argument)
    else:
        tensors = [_tensor(each) for each in argument]
        handle = ctypes.c_void_p(
            library.aclCreateTensorList((ctypes.c_void_p * len(tensors))(*tensors), ctypes.c_uint64(len(tensors)))
        )
        yield handle
        library.aclDestroyTensorList(handle)  # with its tensors


def _tensor(tensor: torch.Tensor) -> ctypes.c_void_p:
    sizes = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
    strides = (ctypes.c_int64 * tensor.dim())(*tensor.stride())
    dimensions = ctypes.c_uint64(tensor.dim())
    return ctypes.c_void_p(
        _library().aclCreateTensor(
            sizes,
            dimensions,
            ACL_TYPES[tensor.dtype],
            strides,
            ctypes.c_int64(0),
            ACL_FORMAT_ND,
            sizes,
            dimensions,
            ctypes.c_void_p(tensor.data_ptr()),
        )
    )
