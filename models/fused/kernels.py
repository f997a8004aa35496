"""Which implementation each fused layer takes: kernels in Triton, or torch's operators, which are their plain twins;
and, by name, apex's or DeepSpeed's where there is one.

The choice changes speed and memory, and results by no more than rounding, but that noise between rows is drawn as other
numbers of the same distribution. It is one for the whole process, as that of torch's own backends is, and nothing that
a model or a checkpoint knows of.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, fields

import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default, which is to change, and bits with it
AVAILABLE = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, one program after the other
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernels:
    """Of each fused layer `triton`, `torch`, or `auto`: triton on a GPU where it is installed, else torch; of those
    `ON_REQUEST` torch. Noise and dropout are the same distributions, other numbers.

    `adam`: the optimizer, `torch`'s, which `auto` is, too, or the FusedAdam of `deepspeed` or `apex`. `attention`: with
    linear biases or padding; with dropout alone `auto` is torch's own, which is fused, too. `norm`: dropout, residual
    and LayerNorm of a block; of `apex` LayerNorm alone. `convolution`: LayerNorm over channels, GELU and residual
    behind a convolution. `grouped`: the convolution itself, where it has groups, as matrix products. `targets`: the
    teacher's outputs normalised and averaged. `loss`: squared error or smooth-L1 with the moments of prediction and
    target. `rows`: kept positions taken and put back, with noise between them. `teacher`: the average's update and its
    cast.
    """

    adam: str = "auto"
    attention: str = "auto"
    norm: str = "auto"
    convolution: str = "auto"
    grouped: str = "auto"
    targets: str = "auto"
    loss: str = "auto"
    rows: str = "auto"
    teacher: str = "auto"


ON_REQUEST = ("grouped",)  # cuDNN's convolutions take tensor cores, too, and which is faster is not known
CHOICES = dict.fromkeys((field.name for field in fields(Kernels)), ("auto", "triton", "torch")) | {
    "adam": ("auto", "torch", "deepspeed", "apex"),
    "norm": ("auto", "triton", "torch", "apex"),
}
APEX = {  # what NVIDIA's alone has, the first of each where it is built with kernels
    "adam": ("amp_C", "apex.optimizers"),
    "norm": ("fused_layer_norm_cuda", "apex.normalization.fused_layer_norm"),
}
_used = Kernels()


def asked_for(part: str, choice: str = "triton") -> bool:
    """Whether `part` is to be Triton's, or another's, by name."""
    return getattr(_used, part) == choice


def draw_seed() -> int:
    """For what a kernel draws, from the host's generator: nothing waits for the device."""
    return int(torch.randint(2**62, (), device="cpu"))


def why_not(*modules: str) -> str:
    """Why these cannot be imported, in a line; empty if they can."""
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # of a library that was built for another torch, whatever its loader says
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """What others' code has raised, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def problems(kernels: Kernels, device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`, one sentence each; empty if they can."""
    found = []
    for field in fields(kernels):
        choice = getattr(kernels, field.name)
        if choice not in CHOICES[field.name]:
            found.append(f"kernels.{field.name}={choice!r}: know {', '.join(CHOICES[field.name])}")
        elif choice == "triton" and not AVAILABLE:
            found.append(f"kernels.{field.name}=triton, which is not installed; take auto")
        elif choice == "triton" and device.type != "cuda" and not INTERPRETED:
            found.append(f"kernels.{field.name}=triton runs on GPUs; on the CPU set TRITON_INTERPRET=1, or take auto")
        elif choice in ("apex", "deepspeed") and device.type != "cuda":
            found.append(f"kernels.{field.name}={choice} runs on GPUs alone; take auto")
        elif choice == "apex" and (reason := why_not(*APEX[field.name])):
            found.append(
                f"kernels.{field.name}=apex needs NVIDIA's apex, built with --cpp_ext and --cuda_ext from "
                f"github.com/NVIDIA/apex (PyPI's apex is another package); without it take auto ({reason})"
            )
    return found


def use(kernels: Kernels) -> None:
    """Has all fused layers of this process take these from now on."""
    global _used
    _used = kernels


def triton(part: str, x: Tensor) -> bool:
    """Whether `part`, a field of `Kernels`, is computed by a kernel of ours for tensors like x."""
    choice = getattr(_used, part)
    if choice == "triton":
        return x.is_cuda or INTERPRETED  # what an engine keeps on the host stays with torch
    automatic = choice == "auto" and part not in ON_REQUEST
    return automatic and AVAILABLE and x.is_cuda and x.dtype in DTYPES
