"""Run by test_fused_objective.py: compiles kernels for a GPU that need not be there, and prints how many."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.fused import lerp, loss, rows, targets

HOPPER = GPUTarget("cuda", 90, 32)


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4) -> int:
    """`types` of what is neither an int nor one of the `constants`. How many bytes of a program there are."""
    if unknown := (types.keys() | constants.keys()) - set(kernel.arg_names):
        raise ValueError(f"{kernel.__name__} takes no {', '.join(unknown)}")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    out = triton.compile(ASTSource(kernel, signature, places), target=HOPPER, options={"num_warps": warps})
    return len(out.asm["cubin"])


def programs() -> list[int]:
    full, low, ids = "*fp32", "*bf16", "*i64"
    pair = {"prediction": low, "targets": full, "ids": ids, "beta": "fp32"}
    forward = pair | {"losses": full, "moments": full}
    backward = pair | {"upstream": full, "out": low, "scale": "fp32"}
    tile = {"ROWS": loss.ROWS, "CHANNELS": loss.CHANNELS}
    put = {"kept": low, "places": "*i32", "seeds": ids, "out": low, "std": "fp32"}
    move = {"average": full, "master": full, "weight": "fp32"}
    add = {"total": full, "mean": full, "rstd": full}
    norms = {"OVER_TIME": True, "OVER_CHANNELS": True, "BEGUN": True, "COUNT": 1, "ROWS": 4, "BLOCK": 1024}
    last = norms | {"OVER_TIME": False, "BEGUN": False, "COUNT": 10}
    return [
        compiled(targets.time_moments, {"x": low, "mean": full, "rstd": full}, {"STEPS": 64, "CHANNELS": 64}),
        compiled(targets.add_rows, add | {"x": low}, norms, warps=8),
        compiled(targets.add_rows, add | {"x": full}, last, warps=8),
        compiled(loss.forward_chunk, forward, tile | {"SMOOTH": False, "CHUNK": loss.CHUNK}),
        compiled(loss.forward_chunk, forward, tile | {"SMOOTH": True, "CHUNK": loss.CHUNK}),
        compiled(loss.backward_tile, backward, tile | {"SMOOTH": True}),
        compiled(rows.take, {"x": low, "ids": ids, "out": low}, {"ROWS": 2, "BLOCK": 1024}),
        compiled(rows.add_up, {"grad": low, "places": "*i32", "out": low}, {"BLOCK": 1024}),
        compiled(rows.add_up, {"grad": low, "places": "*i32", "out": low}, {"BLOCK": 1024, "masks": 1}),  # as 1 is
        compiled(rows.put, put, {"NOISE": True, "BLOCK": 256}),
        compiled(rows.put, put, {"NOISE": False, "BLOCK": 256, "masks": 1}),
        compiled(lerp.move, move | {"copy": low}, {"NEAR": True, "BLOCK": lerp.BLOCK}),
        compiled(lerp.move, move | {"copy": "*fp16"}, {"NEAR": False, "BLOCK": lerp.BLOCK}),
    ]


if __name__ == "__main__":
    sizes = programs()
    print(f"{len(sizes)} programs, the smallest of {min(sizes)} bytes")
