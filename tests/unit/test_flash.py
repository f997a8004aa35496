"""Attention's kernels, on the CPU in Triton's interpreter: values and gradients against float64, what is dropped
against Philox written down again, and what the compiler makes of them for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.fused import kernels
from models.fused.attention import STREAM, Bias, attention, plain_attention

pytest.importorskip("triton")

from models.fused import flash
from tests.compiled import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest value
SMALL = flash.Tiles(flash.Tile(16, 32, 4, 1), flash.Tile(32, 16, 4, 1), flash.Tile(16, 16, 4, 1))


@pytest.fixture(autouse=True)
def in_triton() -> Iterator[None]:
    before = kernels._used
    kernels.use(kernels.Kernels(attention="triton"))
    yield
    kernels.use(before)


def inputs(length: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv of three rows and two heads, slopes, positions, and padding: here and there, of all a row's keys, of none."""
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(3, length, 3, 2, width, generator=generator).to(dtype)
    positions = torch.stack([torch.randperm(3 * length, generator=generator)[:length].sort()[0] for _ in range(3)])
    padding = torch.stack([torch.rand(length, generator=generator) < 0.3, torch.ones(length), torch.zeros(length)])
    return qkv, -torch.rand(2, generator=generator), positions, padding.bool()


def upstream(qkv: Tensor, bias: Bias) -> Tensor:
    """Noise, and what flatter slopes would change, lest slope's gradient be a small difference of large sums."""
    noise = torch.randn(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4], generator=torch.Generator().manual_seed(0))
    if bias.slope is None:
        return noise.to(qkv.dtype)
    flat = plain_attention(qkv.double(), Bias(bias.slope / 2, bias.positions, bias.padding))
    change = flat - plain_attention(qkv.double(), bias)
    return (noise + change / change.std()).to(qkv.dtype)


def differentiated(qkv: Tensor, bias: Bias, grad: Tensor, exact: bool, dropout: float = 0.0) -> list[Tensor]:
    """Output and gradients of qkv and slope: of the twin in float64, or of the kernels."""
    kind = {"dtype": torch.float64} if exact else {"device": DEVICE}
    leaves = [None if leaf is None else leaf.to(**kind).requires_grad_() for leaf in (qkv.detach(), bias.slope)]
    others = [None if x is None or exact else x.to(DEVICE) for x in (bias.positions, bias.padding)]
    if exact:
        out = plain_attention(leaves[0], Bias(leaves[1], bias.positions, bias.padding))
    else:
        out = attention(leaves[0], Bias(leaves[1], *others), dropout)
    gradients = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad.to(out))
    return [x.detach().cpu() for x in (out, *gradients)]


def close(ours: list[Tensor], exact: list[Tensor], bound: float) -> None:
    for name, our, wanted in zip(("out", "qkv", "slope"), ours, exact, strict=False):
        assert our.isfinite().all(), name
        error = float((our.double() - wanted).abs().max() / wanted.abs().max())
        assert error < bound, f"{name}: {error:.1e} off, bound {bound:.0e}"
    assert len(ours) == len(exact)


@pytest.mark.parametrize(
    ("length", "width", "slanted", "shared", "padded", "dtype"),
    [
        (37, 16, True, False, False, torch.float32),
        (70, 64, True, True, True, torch.float32),
        (70, 80, True, False, True, torch.float32),
        (150, 16, False, False, True, torch.float32),
        (70, 64, True, False, True, torch.bfloat16),
        (150, 80, True, True, False, torch.bfloat16),
        (37, 16, True, False, True, torch.float16),
    ],
)
def test_kernels_are_their_plain_twin(
    length: int, width: int, slanted: bool, shared: bool, padded: bool, dtype: torch.dtype
) -> None:
    qkv, slope, positions, padding = inputs(length, width, dtype)
    bias = Bias(
        slope if slanted else None,
        (positions[:1] if shared else positions) if slanted else None,
        padding if padded else None,
    )
    grad = upstream(qkv, bias)
    close(differentiated(qkv, bias, grad, False), differentiated(qkv, bias, grad, True), BOUNDS[dtype])


def test_what_lies_apart_in_memory_is_read_where_it_lies() -> None:
    """Heads before positions, every second column, and a gradient that is one number seen from everywhere."""
    qkv, slope, positions, _ = inputs(37, 32)
    apart = qkv.permute(3, 0, 2, 1, 4).contiguous().permute(1, 3, 2, 0, 4)[..., ::2]
    assert apart.shape == (3, 37, 3, 2, 16) and apart.stride(-1) == 2
    grad = torch.ones(()).expand(3, 37, 32)
    bias = Bias(slope, positions)
    close(differentiated(apart, bias, grad, False), differentiated(apart, bias, grad, True), BOUNDS[torch.float32])


def test_the_torch_implementation_agrees_also_where_all_is_padding() -> None:
    qkv, slope, positions, padding = inputs(37, 16)
    bias = Bias(slope, positions, padding)
    grad = upstream(qkv, bias)
    ours = differentiated(qkv, bias, grad, False)
    assert ours[1][1, :, 2].abs().max() > 1e-3 and (ours[1][1, :, :2] == 0).all()  # values learn, logits do not
    kernels.use(kernels.Kernels(attention="torch"))
    close(ours, [x.double() for x in differentiated(qkv, bias, grad, False)], BOUNDS[torch.float32])


def test_slopes_that_do_not_learn_get_no_gradient() -> None:
    qkv, slope, positions, _ = inputs(37, 16)
    x = qkv.to(DEVICE).requires_grad_()
    attention(x, Bias(slope.to(DEVICE), positions.to(DEVICE))).sum().backward()
    exact = differentiated(qkv, Bias(slope, positions), torch.ones(3, 37, 32), True)
    close([x.grad.cpu()], exact[1:2], BOUNDS[torch.float32])


def weights(seed: int, dropout: float, stream: int | None = None) -> Tensor:
    """What is left of the weights of `inputs(40, 64)` (N, H, K, K): the output, where each value is a unit vector."""
    qkv, slope, positions, padding = inputs(40, 64)
    qkv[:, :, 2] = torch.eye(40, 64)[:, None]
    torch.manual_seed(seed)
    bias = Bias(slope.to(DEVICE), positions.to(DEVICE), padding.to(DEVICE))
    return attention(qkv.to(DEVICE), bias, dropout, stream).view(3, 40, 2, 64)[..., :40].transpose(1, 2).cpu()


def dropped(seed: int, stream: int | None = None) -> Tensor:
    return (weights(seed, 0.25, stream) == 0) & (weights(seed, 0.0) != 0)


def test_dropout_has_the_share_and_the_scale() -> None:
    whole, left = weights(0, 0.0), weights(0, 0.25)
    seen = whole != 0
    kept = (left != 0)[seen]
    assert abs(float(kept.double().mean()) - 0.75) < 4 * (0.25 * 0.75 / len(kept)) ** 0.5
    torch.testing.assert_close(left[seen], whole[seen] * kept / 0.75, rtol=1e-5, atol=1e-7)


def test_dropout_follows_seed_and_stream_alone() -> None:
    first = dropped(0)
    assert torch.equal(dropped(0), first)
    state = torch.get_rng_state()
    seen = weights(0, 0.0) != 0
    expected = 2 * 0.25 * 0.75  # places where two masks differ that know nothing of each other
    for other in (dropped(1), dropped(0, 1), dropped(0, 2), first.roll(1, 0), first.roll(1, 1), first.roll(1, 3)):
        both = seen & seen.roll(1, 0) & seen.roll(1, 3)
        share = float((first ^ other)[both].double().mean())
        assert abs(share - expected) < 5 * (expected / int(both.sum())) ** 0.5
    dropped(0, 1)
    assert torch.equal(torch.get_rng_state(), state)  # ranks agree afterwards


def philox(key: int, counter: tuple[int, ...]) -> list[int]:
    """Philox 4x32 of 7 rounds, four words (Salmon, Moraes, Dror & Shaw 2011)."""
    a, b, c, d = counter
    low, high = key % 2**32, key >> 32
    for _ in range(7):
        one, two = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (two >> 32) ^ b ^ low, two % 2**32, (one >> 32) ^ d ^ high, one % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def test_what_is_dropped_is_philox_of_the_place() -> None:
    """So that a run resumed under another version drops the same."""
    assert philox(0, (0, 0, 0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]  # Random123's known answer
    found, whole = dropped(5, 3), weights(5, 0.0)
    torch.manual_seed(5)
    seed = (int(torch.randint(2**62, ())) + 3 * STREAM) % 2**62
    for row, head, i, j in torch.nonzero(whole)[::97].tolist():
        words = philox(seed, (i, j // 8, head, row))
        word = words[(0, 2, 1, 3)[j % 8 // 2]]
        assert bool(found[row, head, i, j]) == ((word >> 16 if j % 2 else word & 0xFFFF) < 0.25 * 2**16)


def test_dropout_has_the_gradient_of_what_it_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mask that unit vectors showed, whatever the values and the tiles."""
    qkv, slope, positions, padding = inputs(40, 64)
    grad = upstream(qkv, Bias(slope, positions, padding))
    kept = ~dropped(7).double().bool()
    x, s = qkv.double().requires_grad_(), slope.double().requires_grad_()
    eye = torch.eye(40, dtype=torch.float64)[:, None].expand(3, 40, 2, 40)
    with_eye = torch.cat([x[:, :, :2], torch.cat([eye, x.new_zeros(3, 40, 2, 24)], -1)[:, :, None]], 2)
    plain = plain_attention(with_eye, Bias(s, positions, padding)).view(3, 40, 2, 64)[..., :40].transpose(1, 2)
    out = ((plain * kept / 0.75) @ x[:, :, 2].transpose(1, 2)).transpose(1, 2).flatten(2)
    exact = [out.detach(), *torch.autograd.grad(out, (x, s), grad.double())]
    found = []
    for tiles in (SMALL, flash.tiles(torch.float32, 64)):
        monkeypatch.setattr(flash, "tiles", lambda *_, tiles=tiles: tiles)
        torch.manual_seed(7)
        found.append(differentiated(qkv, Bias(slope, positions, padding), grad, False, 0.25))
        close(found[-1], exact, BOUNDS[torch.float32])
    torch.manual_seed(7)
    again = differentiated(qkv, Bias(slope, positions, padding), grad, False, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(found[-1], again, strict=True))  # a resumed run repeats every bit


def test_without_a_bias_dropout_is_the_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.zeros(2, 24, 3, 2, 16)
    qkv[:, :, 2] = 1
    out = attention(qkv.to(DEVICE), None, 0.5).cpu() * 24 * 0.5  # how many of the 24 weights were kept
    torch.testing.assert_close(out, out.round(), atol=1e-4, rtol=0)
    assert len(out.unique()) > 4
    monkeypatch.setattr(flash.FlashAttention, "apply", lambda *_: pytest.fail("torch's own is faster"))
    attention(qkv)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile_for_a_gpu(dtype: str) -> None:
    """With tensor cores for bf16, in the shared memory that GPUs from 8.6 on have, too."""
    found = compiled(f"""
import torch
from models.fused.flash import FlashAttention
qkv = torch.zeros(2, 400, 3, 4, 64, dtype=torch.{dtype}, requires_grad=True)
slope, ids = torch.zeros(4, requires_grad=True), torch.zeros(2, 400, dtype=torch.int64)
FlashAttention.apply(qkv, slope, ids, torch.zeros(2, 400, dtype=torch.bool), 0.1, 2**61).sum().backward()
""")
    assert sorted(kernel.name for kernel in found) == ["forward_kernel", "key_gradient_kernel", "query_gradient_kernel"]
    for kernel in found:
        assert kernel.shared <= 99 * 1024 and kernel.tensor_cores == (dtype == "bfloat16")
