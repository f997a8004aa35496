"""Dropout, residual and LayerNorm in one kernel, run by Triton's interpreter, against torch's operators in float64."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from models.config import DropoutConfig, ModelConfig
from models.encoder import Block
from models.fused import kernels, norm_kernels
from models.fused.norm import ResidualNorm, type_of_norm
from tests import fused_adam
from tests.compiled import compiled
from tests.twins import doubles, drawn, same

CONFIG = ModelConfig(width=24, heads=2)
SHAPE = (3, 7)  # samples, positions: an odd number of rows


@pytest.fixture(autouse=True)
def chosen():
    kernels.use(kernels.Kernels(norm="triton"))
    yield
    kernels.use(kernels.Kernels())


def layer(width: int, dtype: torch.dtype = torch.float32) -> ResidualNorm:
    norm = ResidualNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    return norm.to(dtype)


def against_float64(
    norm: ResidualNorm, x: Tensor, f: Tensor, y: Tensor, times: Tensor | float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """y and all its gradients are those of LayerNorm(x + times * f)."""
    given = (x, f, norm.weight, norm.bias)
    twin = doubles(given)
    plain = F.layer_norm(twin[0] + times * twin[1], x.shape[-1:], *twin[2:], norm.eps)
    same(y, given, plain, twin, dtype or f.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [768, 80, 24])
def test_values_and_gradients(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x, f = layer(width, dtype), drawn(*SHAPE, width, dtype=dtype), drawn(*SHAPE, width, dtype=dtype)
    y = norm(x, f)
    assert y.dtype == dtype
    against_float64(norm, x, f, y)


def test_rows_of_all_programs_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than tiles, tiles that are not full, and inputs that are no blocks of memory."""
    torch.manual_seed(0)
    monkeypatch.setattr(norm_kernels, "PROGRAMS", 2)
    norm = layer(768)
    x, f = (drawn(13, 3, 768).transpose(0, 1) for _ in range(2))
    assert norm_kernels.tile(768).rows * 2 < 39
    against_float64(norm, x, f, norm(x, f))


def test_statistics_are_fp32() -> None:
    """bf16 knows 256 and 258, and no mean between them."""
    x = (256 + 2 * torch.randint(2, (5, 1, 80))).bfloat16()
    x[..., 0], x[..., 1] = 256, 258
    norm = ResidualNorm(80).bfloat16()
    y = norm(x, torch.zeros_like(x))
    expected = F.layer_norm(x.double(), (80,))
    torch.testing.assert_close(
        y.double(), expected, rtol=2**-7, atol=1e-6
    )  # the interpreter cuts off where it should round


def mask_of(norm: ResidualNorm, n: int, t: int, rate: float, seed: int) -> Tensor:
    """What is kept, read off what becomes of ones: above a row's mean."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return norm(torch.zeros(n, t, norm.weight.numel()), torch.ones(n, t, norm.weight.numel()), rate) > 0


def test_dropout_drops_its_share_everywhere() -> None:
    kept = mask_of(ResidualNorm(80), 20, 30, 0.25, 1).flatten(0, 1).float()
    within = 4.5 * (0.25 * 0.75) ** 0.5
    assert abs(kept.mean() - 0.75) < within / 48_000**0.5
    assert (kept.mean(0) - 0.75).abs().max() < within / 600**0.5
    assert (kept.mean(1) - 0.75).abs().max() < within / 80**0.5
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(2, 1), kept.roll(4, 1)):  # nor do neighbours agree
        assert abs(((kept - 0.75) * (shifted - 0.75)).mean()) < 4.5 * 0.1875 / 48_000**0.5


def test_dropout_follows_the_hosts_generator() -> None:
    norm = ResidualNorm(80)
    first = mask_of(norm, 3, 5, 0.25, 1)
    assert torch.equal(first, mask_of(norm, 3, 5, 0.25, 1)) and not torch.equal(first, mask_of(norm, 3, 5, 0.25, 2))
    state = torch.get_rng_state()
    norm(torch.zeros(1, 1, 80), torch.ones(1, 1, 80))
    assert torch.equal(state, torch.get_rng_state())  # without dropout nothing is drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_drops_the_same(dtype: torch.dtype) -> None:
    norm = ResidualNorm(24)
    kept = mask_of(norm, *SHAPE, 0.4, 3)
    norm = layer(24, dtype)
    x, f = (drawn(*SHAPE, 24, dtype=dtype) for _ in range(2))
    factor = torch.tensor([0.0, 2.0, 0.5])[:, None, None]
    torch.manual_seed(3)
    against_float64(norm, x, f, norm(x, f, 0.4), kept / 0.6)
    torch.manual_seed(3)
    against_float64(norm, x, f, norm(x, f, 0.4, factor.to(dtype)), kept / 0.6 * factor)
    against_float64(norm, x, f, norm(x, f, factor=factor), factor)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_types_are_those_of_torchs_operators(types: tuple[torch.dtype, torch.dtype], autocast: bool) -> None:
    x, f = (drawn(*SHAPE, 24, dtype=dtype) for dtype in types)
    norm = layer(24, torch.float32 if autocast else torch.promote_types(*types))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused, plain = norm(x, f), norm(x + f)
    assert fused.dtype == plain.dtype
    against_float64(norm, x, f, fused, dtype=torch.bfloat16)


def test_autocast_has_norms_in_fp32_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    for is_cuda, expected in ((True, torch.float32), (False, torch.bfloat16)):
        assert type_of_norm(cast(Tensor, SimpleNamespace(is_cuda=is_cuda)), torch.bfloat16) == expected


def test_the_sum_alone_is_kept() -> None:
    norm, x, f = layer(768), drawn(*SHAPE, 768), drawn(*SHAPE, 768)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x, f, 0.1)
        assert sum(t.numel() for t in kept if t is not norm.weight) == x.numel() + 2 * 21
        kept.clear()
        with torch.no_grad():
            norm(x, f)
    assert kept == []


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1, 24\); it must be that of x, \(3, 7, 24\)"):
        layer(24)(drawn(3, 7, 24), drawn(3, 1, 24))


@pytest.mark.parametrize("path", [0.0, 0.5])
def test_a_block_is_the_same_with_the_kernel(path: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block, x, calls = Block(CONFIG, path), drawn(5, 7, 24), []
    launch = norm_kernels.residual_norm_forward
    monkeypatch.setattr(
        norm_kernels, "residual_norm_forward", {(1,): lambda *a, **k: calls.append(launch[(1,)](*a, **k))}
    )
    found = []
    for choice in ("triton", "torch"):
        kernels.use(kernels.Kernels(norm=choice))
        torch.manual_seed(2)  # whose samples go past it
        out, ffn = block(x)
        found.append((out, ffn, *torch.autograd.grad(out.square().sum() + ffn.sum(), (x, *block.parameters()))))
        assert len(calls) == 2
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_a_block_drops_while_it_trains_alone() -> None:
    config = dataclasses.replace(CONFIG, dropout=DropoutConfig(residual=0.5, mlp=0.5))
    block, x = Block(config), drawn(3, 7, 24)
    assert not torch.equal(block(x)[0], block(x)[0])
    block.eval()
    fused = block(x)[0]
    kernels.use(kernels.Kernels(norm="torch"))
    torch.testing.assert_close(fused, block(x)[0])


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """apex's norm, by its twin, is taken; what it is given is of these types."""
    given: list[torch.dtype] = []
    twin = fused_adam.layer_norm
    monkeypatch.setattr(fused_adam, "layer_norm", lambda x, *more: given.append(x.dtype) or twin(x, *more))
    fused_adam.install(monkeypatch)
    kernels.use(kernels.Kernels(norm="apex"))
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apexs_norm_is_torchs(dtype: torch.dtype, apex: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    norm, x = layer(24, dtype), drawn(*SHAPE, 24, dtype=dtype)
    y, given = norm(x), (x, norm.weight, norm.bias)
    twin = doubles(given)
    same(y, given, F.layer_norm(twin[0], (24,), *twin[1:], norm.eps), twin)
    assert apex == [dtype]


def test_apexs_norm_is_in_fp32_under_a_gpus_autocast(apex: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.fused.norm.type_of_norm", lambda x, dtype: torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(24)(drawn(*SHAPE, 24, dtype=torch.bfloat16)).dtype == torch.float32
    assert apex == [torch.float32]


def test_a_block_is_the_same_with_apexs_norm(apex: list[torch.dtype]) -> None:
    """Dropout and drop path are torch's either way, and draw the same."""
    config = dataclasses.replace(CONFIG, dropout=DropoutConfig(residual=0.5, mlp=0.5))
    block, x, found = Block(config, 0.5), drawn(5, 7, 24), []
    for choice in ("apex", "torch"):
        kernels.use(kernels.Kernels(norm=choice))
        torch.manual_seed(2)
        out, ffn = block(x)
        found.append((out, ffn, *torch.autograd.grad(out.square().sum() + ffn.sum(), (x, *block.parameters()))))
    assert len(apex) == 2
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_checkpoints_know_the_same_names() -> None:
    names = [name for name in Block(CONFIG).state_dict() if "norm" in name]
    assert names == ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]


def test_the_kernels_compile_for_hopper() -> None:
    found = compiled(
        """
import torch
from models.fused.norm import ResidualNorm
for dtype in (torch.float32, torch.bfloat16):
    norm = ResidualNorm(768).to(dtype)
    x = torch.randn(3, 7, 768).to(dtype).requires_grad_()
    norm(x, x.detach()).sum().backward()
    norm(x, x.detach().bfloat16(), 0.1, torch.ones(3)).sum().backward()
"""
    )
    assert sorted(kernel.name for kernel in found) == ["residual_norm_backward"] * 4 + ["residual_norm_forward"] * 4
