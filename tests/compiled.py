"""Kernels compiled for a Hopper GPU where there is none: the interpreter accepts what the compiler rejects."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def compiled(program: str) -> list[str]:
    """Runs Python in a process of its own, in which every launch of a kernel compiles it for just these arguments, down
    to machine code, and then does nothing. -> one line for each kernel compiled: its name and registers spilled.

    Raises AssertionError with the compiler's own words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = f"from tests.compiled import pretend\nshow = pretend()\n{program}\nshow()"
    found = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def pretend() -> Any:
    """Takes the place of the driver in this process; returns what prints the kernels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    made: dict[str, None] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        shared = kernel.metadata.shared
        assert shared <= 227 * 1024, f"{self.__name__}: {shared} bytes of shared memory, Hopper has 232448"
        made[f"{self.__name__} {kernel.hash}"] = None

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only

    def show() -> None:
        print("\n".join(name.split()[0] for name in made))

    return show
