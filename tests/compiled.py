"""Kernels compiled for a Hopper GPU where there is none: the interpreter accepts what the compiler rejects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Compiled(NamedTuple):
    name: str
    shared: int  # bytes of shared memory
    tensor_cores: bool  # takes Hopper's


def compiled(program: str) -> list[Compiled]:
    """Runs Python in a process of its own, in which every launch of a kernel compiles it for just these arguments, down
    to machine code, and then does nothing. -> the different kernels that came of it.

    Raises AssertionError with the compiler's own words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = f"from tests.compiled import pretend\nshow = pretend()\n{program}\nshow()"
    found = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return [Compiled(*kernel) for kernel in json.loads(found.stdout.splitlines()[-1])]


def pretend() -> Any:
    """Takes the place of the driver in this process; returns what prints the kernels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from models.fused import kernels

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    made: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        shared = kernel.metadata.shared
        assert shared <= 227 * 1024, f"{self.__name__}: {shared} bytes of shared memory, Hopper has 232448"
        made[kernel.hash] = Compiled(self.__name__, shared, "wgmma" in kernel.asm["ptx"])

    triton.runtime.driver.set_active(Driver())
    kernels.triton = lambda part, x: getattr(kernels._used, part) == "triton"  # as if x were on it
    JITFunction.run = compile_only

    def show() -> None:
        print(json.dumps(list(made.values())))

    return show
