"""Repeated launches of one Triton kernel, with less host time than Triton's own call."""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton

logger = logging.getLogger("vllm.npu.transport.kernels.launch")  # vLLM shows messages of loggers under "vllm"

DIRECT_LAUNCH = ((3, 5), (3, 6), (3, 7), (3, 8), (3, 9))
"""The releases of Triton whose JITFunction.run launches a compiled kernel as PreparedLaunch does. The launch is no public
interface of Triton: compare its source before you add a release (tests/ranks/test_symmetric_kernels.py)."""

ALIGNMENT = 16  # bytes; Triton compiles a special kernel for pointers of this alignment


class PreparedLaunch:
    """A kernel with a fixed grid and fixed arguments, except for some tensors of fixed dtypes.

    Triton's call inspects each argument to find the compiled kernel: about 90 us for the 30 arguments of an exchange, measured
    on a server CPU. The first call uses Triton's call; later calls launch the kernel that it compiled. A call with a tensor
    whose address is no multiple of 16 bytes always uses Triton's call. So does each call in a release of Triton that is not in
    DIRECT_LAUNCH.

    The kernel gets addresses alone, so the caller checks the tensors: contiguous, on one GPU, of the dtypes of the first call.
    """

    def __init__(
        self,
        kernel: Any,  # a triton.jit function; its arguments are, in order, tensors of a call, `fixed`, `numbers`, `constants`
        num_programs: int,
        fixed: Sequence[torch.Tensor],
        numbers: Sequence[int],
        constants: dict[str, int | bool],  # tl.constexpr arguments, in the kernel's order
        **options: int | bool,  # num_warps and the like
    ) -> None:
        self._kernel = kernel
        self._num_programs = num_programs
        self._fixed = (*fixed, *numbers)
        self._constants = constants
        self._options = options
        self._run: Any = None  # launch function of the kernel that the first call compiled
        self._function: tuple[Any, ...] = ()
        self._tail = (*(tensor.data_ptr() for tensor in fixed), *numbers, *constants.values())

    def __call__(self, tensors: Sequence[torch.Tensor | None], stream: int) -> None:
        """Launch on the current stream, whose raw handle is `stream`. No host sync; legal under graph capture."""
        addresses, bits = [], 0
        for tensor in tensors:
            address = 0 if tensor is None else tensor.data_ptr()
            addresses.append(address)
            bits |= address
        if bits % ALIGNMENT or self._run is None:
            compiled = self._kernel[(self._num_programs,)](*tensors, *self._fixed, **self._constants, **self._options)
            if not bits % ALIGNMENT and _launches_directly(triton.__version__):
                self._run = compiled.run
                # The three arguments for profilers' hooks are None.
                self._function = (compiled.function, compiled.packed_metadata, None, None, None)
            return
        self._run(self._num_programs, 1, 1, stream, *self._function, *addresses, *self._tail)


@cache
def _launches_directly(version: str) -> bool:
    """Whether this release of Triton is in DIRECT_LAUNCH. The first call with another release logs a warning."""
    major, minor, *_ = version.split(".")
    known = (int(major), int(minor)) in DIRECT_LAUNCH
    if not known:
        logger.warning(
            "Triton %s is no release whose private launch vllm_npu knows (%s): each exchange of the symmetric strategy outside "
            "of a CUDA graph takes about 90 us more of host time, through Triton's own launch.",
            version,
            ", ".join(f"{major}.{minor}" for major, minor in DIRECT_LAUNCH),
        )
    return known
