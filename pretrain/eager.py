"""Without torch's compiler, whose import takes a process as long as all else before its first step.

Libraries import it to compile functions, or to say which are not to be compiled. Of theirs none is compiled here:
`train.compile` is about blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isfunction
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

normal_ = torch.Tensor.normal_


@contextmanager
def uncompiled() -> Iterator[None]:
    """What `torch.compile` and `torch.compiler.disable` decorate inside stays as it is."""
    with patch.object(torch, "compile", as_it_is), patch.object(torch.compiler, "disable", as_it_is):
        yield


def as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    """A decorator, with arguments or without."""
    return as_it_is if function is None else function


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made inside have shapes and no numbers: on torch's meta device, which would go through its compiler to
    draw normal ones."""
    with torch.device("meta"), patch.object(Tensor, "normal_", drawn_if_real):
        yield


def drawn_if_real(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor if tensor.is_meta else normal_(tensor, *args, **kwargs)


def allow(cls: type) -> None:
    """Takes from the methods of a class that torch tells its compiler, at their first call, to leave them alone."""
    for name, method in list(vars(cls).items()):
        if isfunction(method) and method.__code__.co_filename == torch._compile.__file__:
            setattr(cls, name, vars(method)["__wrapped__"])
