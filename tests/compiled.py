"""Triton's kernels compiled as they are launched, for a GPU that need not be there. Without TRITON_INTERPRET alone: the
interpreter accepts what the compiler does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class NoGpu:
    """What Triton asks a driver for before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int = 90) -> Iterator[dict[str, Any]]:
    """Kernels that are launched on tensors of the CPU are compiled instead, which fills {name: compiled kernel};
    what they would have written stays as it was."""
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found[self.fn.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs)
        return found[self.fn.__name__]

    triton.runtime.driver.set_active(NoGpu(capability))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = None
