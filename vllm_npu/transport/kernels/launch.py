"""Launching the same kernel again for less host time than Triton's own call takes."""

from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 16  # bytes: what Triton specialises pointers for


class PreparedLaunch:
    """A kernel with its grid and all arguments fixed but some tensors, whose dtypes are fixed.

    Triton's call looks at each argument anew to find the compiled kernel: about 90 us for the 30 arguments of an exchange,
    measured on a server CPU. The first call goes that way; later ones launch what it compiled. A tensor that does not start at
    a multiple of 16 bytes always takes Triton's way.
    """

    def __init__(
        self,
        kernel: Any,  # a triton.jit function: tensors of each call, fixed tensors, numbers, constants
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
        self._run: Any = None  # how Triton launches what the first call compiled
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
            if not bits % ALIGNMENT:
                self._run = compiled.run
                # The three for profilers' hooks are left out.
                self._function = (compiled.function, compiled.packed_metadata, None, None, None)
            return
        self._run(self._num_programs, 1, 1, stream, *self._function, *addresses, *self._tail)
