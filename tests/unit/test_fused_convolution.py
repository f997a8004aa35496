"""Grouped convolutions and what follows them as kernels, run by Triton's interpreter, against torch in float64."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

from models.audio import RelativePositions, WaveformEncoder
from models.config import AudioConfig, DecoderConfig, ImageConfig, ModelConfig
from models.convolution import convolve
from models.decoder import Decoder
from models.fused import grouped, grouped_kernels, kernels, norm_kernels
from models.fused.norm_gelu import NormGelu, norm_gelu
from tests.compiled import compiled
from tests.twins import doubles, drawn, same

IMAGE = ModelConfig(width=32, heads=4, image=ImageConfig(size=20, patch=4), decoder=DecoderConfig(32, 2, 3, 2))
AUDIO = dataclasses.replace(
    IMAGE,
    modality="audio",
    extra_tokens=0,
    audio=AudioConfig(seconds=0.1, channels=24, position_layers=1, position_groups=2, position_kernel=5),
    decoder=DecoderConfig(48, 2, 5, 2),
)


@pytest.fixture(autouse=True)
def chosen():
    kernels.use(kernels.Kernels(convolution="triton", grouped="triton"))
    yield
    kernels.use(kernels.Kernels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "residual", "affine"), [(768, True, False), (80, False, True), (24, True, True)])
def test_norm_and_gelu(width: int, residual: bool, affine: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [drawn(3, 7, width, dtype=dtype)]
    given += [drawn(width, dtype=dtype), drawn(width, dtype=dtype)] if affine else []
    y = norm_gelu(*given)
    twin = doubles(given)
    plain = F.gelu(F.layer_norm(twin[0], (width,), *twin[1:]))
    assert y.dtype == dtype
    same(y, given, plain, twin)
    if residual:
        more, twin = [*given, drawn(3, 7, width, dtype=dtype)], [*twin, *doubles([drawn(3, 7, width)])]
        twin[-1].data.copy_(more[-1])
        plain = twin[-1] + F.gelu(F.layer_norm(twin[0], (width,), *twin[1:-1]))
        same(norm_gelu(*given, residual=more[-1]), more, plain, twin)


def test_rows_of_all_programs_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than tiles, the last of which is not full; the layout is that of a 1-D convolution's output."""
    monkeypatch.setattr(norm_kernels, "PROGRAMS", 2)
    norm = NormGelu(768)
    given = [drawn(3, 768, 5), norm.weight, norm.bias]
    twin = doubles(given)
    plain = F.gelu(F.layer_norm(twin[0].transpose(1, 2), (768,), *twin[1:]))
    same(norm(given[0].transpose(1, 2)), given, plain, twin)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_types_are_those_of_torchs_operators(types: tuple[torch.dtype, torch.dtype], autocast: bool) -> None:
    residual, x = (drawn(3, 7, 24, dtype=dtype) for dtype in types)
    found = []
    for choice in ("triton", "torch"):
        kernels.use(kernels.Kernels(convolution=choice))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(norm_gelu(x, residual=residual))
    assert found[0].dtype == found[1].dtype
    twin = doubles([x, residual])
    plain = twin[1] + F.gelu(F.layer_norm(twin[0], (24,)))
    same(found[0], [x, residual], plain, twin, torch.bfloat16)


def test_the_convolutions_output_alone_is_kept() -> None:
    x, residual, kept = drawn(3, 7, 24), drawn(3, 7, 24), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_gelu(x, residual=residual)
        assert sum(t.numel() for t in kept) == x.numel() + 2 * 21
        kept.clear()
        y = norm_gelu(x.detach(), residual=residual)  # as behind convolutions that are frozen
    assert kept == []
    assert torch.equal(torch.autograd.grad(y.sum(), residual)[0], torch.ones(3, 7, 24))


def convolution(
    axes: int, source: int, target: int, kernel: int, groups: int = 2, dtype: torch.dtype = torch.float32, **more: Any
) -> nn.Module:
    kind = grouped.GroupedConv1d if axes == 1 else grouped.GroupedConv2d
    return kind(source * groups, target * groups, kernel, padding=kernel // 2, groups=groups, **more).to(dtype)


@pytest.mark.parametrize(
    ("shape", "kernel", "source", "target", "dtype"),
    [
        ((9,), 19, 24, 24, torch.float32),  # wider than the grid on both sides: samples must not see each other
        ((71,), 7, 24, 48, torch.bfloat16),
        ((11,), 5, 5, 40, torch.float16),
        ((5, 4), 3, 24, 40, torch.float32),
        ((2, 4), 5, 48, 24, torch.bfloat16),
        ((5, 7), 3, 64, 64, torch.float16),
    ],
)
def test_grouped_convolutions(
    shape: tuple[int, ...], kernel: int, source: int, target: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv = convolution(len(shape), source, target, kernel, dtype=dtype)
    x = drawn(3, int(torch.tensor(shape).prod()), 2 * source, dtype=dtype)
    given = [x, conv.weight, conv.bias]
    twin = doubles(given)
    plain = [F.conv1d, F.conv2d][len(shape) - 1](
        twin[0].view(3, *shape, -1).movedim(-1, 1), *twin[1:], padding=kernel // 2, groups=2
    )
    y = convolve(conv, x, shape)
    assert y.dtype == dtype and y.is_contiguous() and "Grouped" in y.grad_fn.name()
    same(y, given, plain.movedim(1, -1).reshape(y.shape), twin)


def test_gradients_of_weights_are_summed_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grouped_kernels.CHUNK, "rows", 40)
    assert grouped.chunked(100, 32) == (64, 2)
    conv, x = convolution(1, 8, 8, 5), drawn(4, 25, 16)
    given, twin = [x, conv.weight], doubles([x, conv.weight])
    plain = F.conv1d(twin[0].transpose(1, 2), twin[1], conv.bias.double(), padding=2, groups=2).transpose(1, 2)
    same(convolve(conv, x, (25,)), given, plain, twin)


@pytest.mark.parametrize(("rows", "tile"), [(1, 32), (4096, 64), (4097, 64), (50_176, 64), (10_000_001, 32)])
def test_chunks_cover_all_rows_once(rows: int, tile: int) -> None:
    size, chunks = grouped.chunked(rows, tile)
    assert size % tile == 0 and (chunks - 1) * size < rows <= chunks * size and chunks <= grouped_kernels.CHUNK["most"]


def test_autocast_makes_the_convolutions_types_torchs() -> None:
    conv, x = convolution(1, 8, 8, 5), drawn(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = convolve(conv, x, (9,)), conv(x.transpose(1, 2)).transpose(1, 2)
    assert fused.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(fused, plain, rtol=2**-7, atol=2**-8)
    gradients = torch.autograd.grad(fused.float().square().sum(), (x, *conv.parameters()))
    expected = torch.autograd.grad(plain.float().square().sum(), (x, *conv.parameters()))
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted, rtol=2**-5, atol=2**-4)


def test_only_what_the_kernels_compute_goes_to_them() -> None:
    assert grouped.applicable(convolution(1, 8, 8, 5)) and grouped.applicable(convolution(2, 8, 128, 3))
    for changed in ({"stride": 2}, {"dilation": 2}, {"padding_mode": "circular"}, {"groups": 1}):
        assert not grouped.applicable(convolution(1, 8, 8, 5, **changed))
    assert not grouped.applicable(convolution(1, 8, 8, 4)) and not grouped.applicable(convolution(2, 8, 129, 3))
    assert not grouped.applicable(nn.Conv1d(16, 16, 5, padding=2, groups=2))
    assert not grouped.applicable(grouped.GroupedConv1d(16, 16, 5, groups=2))


def test_what_was_never_measured_is_not_chosen_by_itself() -> None:
    kernels.use(kernels.Kernels())
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert kernels.triton("convolution", on_gpu) and not kernels.triton("grouped", on_gpu)
    assert not any(kernels.triton(part, torch.zeros(1)) for part in vars(kernels.Kernels()))


def model(kind: type[nn.Module], config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    return kind(config)


@pytest.mark.parametrize("case", ["image", "image with ids", "audio with ids", "positions", "waveform"])
def test_whole_modules_are_the_same_with_the_kernels(case: str) -> None:
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(20)[:13].sort()[0] for _ in range(3)]) if "ids" in case else None
    inputs: tuple[Any, ...] = (drawn(3, 25 if case == "image" else 20, 32), ids)
    if case.startswith("image"):
        net, inputs = model(Decoder, IMAGE), (drawn(3, 25, 32), ids)
    elif case == "positions":
        net, inputs = model(RelativePositions, AUDIO), (*inputs, torch.tensor([20, 3, 11]))
    elif case == "waveform":
        net, inputs = model(WaveformEncoder, AUDIO), (drawn(1, 1600),)
    else:
        net = model(Decoder, AUDIO)
    names = [name for name, _ in net.named_parameters() if not name.startswith("proj") or case == "waveform"]
    wanted = [inputs[0], *(net.get_parameter(name) for name in names)]
    found = []
    for choice in ("triton", "torch"):
        kernels.use(kernels.Kernels(convolution=choice, grouped=choice))
        y = net(*inputs)
        found.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), wanted)))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=2e-5)


def test_the_kernels_compile_for_hopper() -> None:
    found = compiled(
        """
import torch
from models.fused import kernels
from models.fused.grouped import GroupedConv1d, GroupedConv2d
from models.fused.norm_gelu import NormGelu, norm_gelu
kernels.use(kernels.Kernels(convolution="triton"))
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(3, 25, 768).to(dtype).requires_grad_()
    norm_gelu(x, residual=x).sum().backward()
    NormGelu(768).to(dtype)(x).sum().backward()
GroupedConv1d(768, 384, 7, padding=3, groups=16).bfloat16()(x, (25,)).sum().backward()
GroupedConv2d(256, 256, 3, padding=1, groups=16)(x[..., :256].float(), (5, 5)).sum().backward()
"""
    )
    counted = Counter(kernel.name for kernel in found)
    assert counted == {"norm_gelu_forward": 4, "norm_gelu_backward": 4, "convolve": 4, "weight_gradient": 2}
