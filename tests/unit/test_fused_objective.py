"""Kernels of targets, loss, rows and the teacher's update against float64 and their plain twins, on the CPU through
Triton's interpreter; and that a GPU's compiler takes them."""

import dataclasses
import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.config import (
    AudioConfig,
    DecoderConfig,
    ImageConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TargetConfig,
)
from models.data2vec import Batch, Data2Vec
from models.fused import kernels
from models.masks import draw_block_masks, gather_rows, row_keys, scatter_rows
from models.targets import mean_target, regression
from pretrain.ema import move
from tests.compiled import compiled

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
OURS = kernels.Kernels(targets="triton", loss="triton", rows="triton", teacher="triton")
B, M, T, D = 2, 3, 67, 70  # none a multiple of a tile, T and D more than one
LOW = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def ours():
    """By kernels, but where a test says otherwise."""
    kernels.use(OURS)
    yield
    kernels.use(kernels.Kernels())


def values(*shape, seed=0, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    gain = 0.5 + torch.rand(shape[-1], generator=generator)
    return mean + scale * gain * torch.randn(*shape, generator=generator) + torch.randn(shape[-1], generator=generator)


def some(kept, rows=B * M, length=T, seed=0):
    """(rows, kept) ascending places."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(length, generator=generator)[:kept].sort().values for _ in range(rows)])


def counted(monkeypatch, path, name):
    """A list that grows by one for every launch of a kernel."""
    module = importlib.import_module(path)
    launched, kernel = [], getattr(module, name)

    class Counting:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, name, Counting())
    return launched


def over_time(x):
    return F.instance_norm(x.mT).mT


def over_channels(x):
    return F.layer_norm(x, x.shape[-1:])


NORMS = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize(("dtype", "extra"), [(torch.float32, 1), (torch.bfloat16, 0)])
@pytest.mark.parametrize("norms", NORMS, ids=str)
def test_targets_are_those_of_float64(norms, dtype, extra, monkeypatch):
    launched = counted(monkeypatch, "models.fused.targets", "add_rows")
    blocks = [values(B, extra + T, D, seed=i, mean=20.0 * i).to(dtype) for i in range(3)]
    before = [block.clone() for block in blocks]
    layers = [block[:, extra:].double() for block in blocks]
    for norm, wanted in zip((over_time, over_channels), norms[:2], strict=True):
        layers = [norm(x) for x in layers] if wanted else layers
    expected = torch.stack(layers).mean(0)
    for norm, wanted in zip((over_channels, over_time), norms[2:], strict=True):
        expected = norm(expected) if wanted else expected
    config = TargetConfig(3, *norms)
    out = mean_target((block[:, extra:] for block in blocks), config)
    assert out.dtype == torch.float32 and len(launched) == 4 + norms[3]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, blocks, strict=True))


def test_targets_survive_a_large_mean():
    x = values(1, 196, 8, mean=1000.0)
    out = mean_target([x], TargetConfig(1, True, False, False, False))
    torch.testing.assert_close(out.double(), over_time(x.double()), rtol=0, atol=2e-4)


def wanted(targets, ids):
    return targets.double().repeat_interleave(M, 0)[torch.arange(len(ids))[:, None], ids]


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("dtype", LOW)
def test_regression_is_that_of_float64(dtype, beta, mean):
    ids, scale = some(47), 0.3  # 282 rows: more than a chunk
    targets, prediction = values(B, T, D, mean=mean), values(B * M, 47, D, seed=1, mean=mean).to(dtype)
    twin, target = prediction.double().requires_grad_(), wanted(targets, ids)
    d = twin - target
    small = d.abs() < beta
    assert not beta or 0.05 < small.double().mean() < 0.95  # both branches are there
    each = torch.where(small, d**2 / (2 * beta), d.abs() - beta / 2) if beta else d**2
    (gradient,) = torch.autograd.grad(1.5 * scale * each.sum(), twin)

    prediction.requires_grad_()
    loss, *moments = regression(prediction, targets, ids, beta, scale)
    (ours,) = torch.autograd.grad(1.5 * loss, prediction)
    assert loss.grad_fn.name() == "RegressionLossBackward"
    assert loss.dtype == torch.float32 and ours.dtype == dtype
    assert float(loss.detach()) == pytest.approx(scale * float(each.detach().sum()), rel=1e-6)
    torch.testing.assert_close(ours.double(), gradient, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
    for found, x in zip(moments, (prediction.detach().double(), target), strict=True):
        x = x.reshape(-1, D)
        assert float(found.n) == len(x)
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.m2, ((x - x.mean(0)) ** 2).sum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_one_prediction_that_is_not_finite_is_seen(beta):
    """In the loss, and in its own gradient alone: fp16's loss scale and skipped steps live on that."""
    targets, ids = values(B, T, D), some(5)
    prediction = values(B * M, 5, D, seed=1)
    prediction[1, 2, 3] = float("nan")
    prediction.requires_grad_()
    loss, *_ = regression(prediction, targets, ids, beta, 1.0)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.isnan() and gradient.isnan().nonzero().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("dtype", LOW)
def test_rows_are_taken_and_put_back(dtype):
    length = 17
    ids, x = some(5, length=length), values(B, length, D).to(dtype).requires_grad_()
    upstream, twin = values(B * M, 5, D, seed=1).to(dtype), x.detach().double().requires_grad_()
    plain = wanted(twin, ids)
    kept = gather_rows(x, ids)
    assert kept.grad_fn.name() == "GatherBackward" and torch.equal(kept.double(), plain)
    (ours,) = torch.autograd.grad(kept, x, upstream)
    (expected,) = torch.autograd.grad(plain, twin, upstream.double())
    assert not expected.any(-1).all() and expected.any()  # some positions are in no mask
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)

    kept = torch.cat([kept[:, :1], kept], 1).detach()[:, 1:].requires_grad_()  # behind an extra token
    full = scatter_rows(kept, ids, length)
    rows = torch.arange(B * M)[:, None]
    expected = torch.zeros(B * M, length, D, dtype=dtype)
    expected[rows, ids] = kept.detach()
    assert full.grad_fn.name() == "ScatterBackward" and torch.equal(full, expected)
    upstream = values(B * M, length, D, seed=2).to(dtype)
    (gradient,) = torch.autograd.grad(full, kept, upstream)
    assert torch.equal(gradient, upstream[rows, ids])


def philox(counter, key):
    """Philox4x32-10 of Salmon et al. (2011): four (n,) words and two -> four (n,) words."""
    c, k = [np.asarray(x, np.uint64) for x in counter], [np.uint64(x) for x in key]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> half ^ c[1] ^ k[0], b & low, a >> half ^ c[3] ^ k[1], a & low]
        k = [k[0] + np.uint64(0x9E3779B9) & low, k[1] + np.uint64(0xBB67AE85) & low]
    return c


def normal(words):
    """Two words to two normal numbers, by Box and Muller: the first bit is a sign that is folded away."""
    u = [np.where(w >> np.uint64(31), w ^ np.uint64(0xFFFFFFFF), w).astype(np.float64) * 2.0**-31 for w in words]
    radius = np.sqrt(-2 * np.log(np.maximum(u[0], 1e-7)))
    return radius * np.cos(2 * np.pi * u[1]), radius * np.sin(2 * np.pi * u[1])


def test_philox_has_its_published_answer():
    """Of the known answers that come with Random123."""
    assert [int(w) for w in philox([0, 0, 0, 0], [0, 0])] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", LOW)
def test_noise_is_a_function_of_seed_mask_position_and_channel(dtype):
    length, width, std, seeds = 6, 1030, 0.01, (5, 2**62 + 3)  # 1030: not four quarters
    ids, kept = some(2, length=length), values(B * M, 2, width).to(dtype)
    full = scatter_rows(kept, ids, length, std, seeds)
    rows = torch.arange(B * M)[:, None]
    assert torch.equal(full[rows, ids], kept)
    hidden = torch.ones(B * M, length, dtype=torch.bool).scatter_(1, ids, False)
    quarter = -(-width // 4)
    expected = np.zeros((B * M, length, width))
    for row, step in itertools.product(range(B * M), range(length)):
        seed = seeds[row // M]
        words = philox([np.arange(quarter), step, row % M, 0], [seed & 0xFFFFFFFF, seed >> 32])
        expected[row, step] = std * np.concatenate([*normal(words[:2]), *normal(words[2:])])[:width]
    noise, expected = full[hidden].double(), torch.from_numpy(expected)[hidden]
    rtol = 1e-4 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(noise, expected, rtol=rtol, atol=1e-5 * std)

    n = noise.numel()
    assert abs(float(noise.mean())) < 5 * std / n**0.5
    assert float(noise.std()) == pytest.approx(std, rel=5 / (2 * n) ** 0.5)
    assert float((noise / std).pow(4).mean()) == pytest.approx(3, abs=5 * (96 / n) ** 0.5)
    assert len(noise.unique(dim=0)) == len(noise)
    alone = scatter_rows(kept[M:], ids[M:], length, std, seeds[1:])
    assert torch.equal(alone, full[M:])


WEIGHTS = [1e-3, 0.3, 0.4999999, 0.5, 0.7, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_teacher_moves_bit_for_bit_as_torch_moves_it(weight, dtype, monkeypatch):
    """Of two tensors; and of what overflows, underflows or is no number."""
    launched = counted(monkeypatch, "models.fused.lerp", "move")
    special = [float("inf"), -0.0, 3.4e38, -7e4, 1e-40, 1e-6, 1 + 2**-8, 1 + 3 * 2**-8, 0.0]
    results = []
    for choice in (kernels.Kernels(), OURS):
        kernels.use(choice)
        averages = [values(5000, seed=1), torch.tensor([*special, float("nan")])]
        masters = [averages[0] + 0.1 * values(5000, seed=2), torch.tensor([*special, 1.0])]
        copies = [torch.zeros_like(a, dtype=dtype) for a in averages]
        move(averages, masters, copies, weight)
        results.append((*averages, *copies))
    assert len(launched) == 2
    for plain, fused in zip(*results, strict=True):
        assert torch.equal(plain.isnan(), fused.isnan())
        assert torch.equal(plain.nan_to_num(7.0), fused.nan_to_num(7.0))
    assert (results[1][0] != values(5000, seed=1)).any()


TINY = ModelConfig(
    width=32,
    heads=4,
    prenet_depth=1,
    depth=2,
    num_masks=M,
    image=ImageConfig(size=16, patch=4),
    mask=MaskConfig(prob=0.75, adjust=0.1, noise_std=0.0),
    decoder=DecoderConfig(width=32, groups=4, layers=2),
    targets=TargetConfig(top_k_layers=2),
    loss=LossConfig(cls=0.5),
    extra_tokens=1,
)
SPEECH = dataclasses.replace(
    TINY,
    modality="audio",
    extra_tokens=0,
    loss=LossConfig(beta=0.5, cls=0.0),
    audio=AudioConfig(seconds=0.3, channels=8, kernels=(16, 8, 4), strides=(10, 8, 4), position_groups=4),
    decoder=DecoderConfig(width=16, groups=1, layers=1),
    mask=MaskConfig(prob=0.5, adjust=0.05, length=5, inverse=False, noise_std=0.0),
)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(TINY, torch.float32), (TINY, torch.bfloat16), (SPEECH, torch.float32)],
    ids=["image", "image, bf16", "audio"],
)
def test_a_whole_step_is_the_plain_one(config, dtype):
    """Losses, moments, and gradients of all parameters."""
    torch.manual_seed(0)
    net = Data2Vec(config).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    inputs = torch.randn(B, 3, 16, 16) if config.modality == "image" else torch.randn(B, 4800)
    shape = config.grid(inputs.shape[-1])
    keys = row_keys(1, np.zeros(B), np.arange(B), M)
    batch = Batch(inputs, *draw_block_masks(config.mask, keys, shape), seeds=(1, 2))
    results = []
    for choice in (kernels.Kernels(), OURS):
        kernels.use(choice)
        out = net(batch)
        learning = [p for p in net.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(out.regression + out.cls, learning)
        results.append([out.regression.detach(), out.cls.detach(), *out.prediction, *out.target, *gradients])
    for plain, fused in zip(*results, strict=True):
        error = float((plain.double() - fused.double()).norm() / plain.double().norm().clamp(min=1e-6))
        assert error < (1e-5 if dtype == torch.float32 else 0.02), plain.shape


def test_the_kernels_compile_for_hopper():
    found = compiled("""
import torch
from models.config import TargetConfig
from models.fused import lerp, loss, rows, targets
ids = torch.arange(3).repeat(4, 1)
for dtype, masks in ((torch.float32, 1), (torch.bfloat16, 2)):
    x = torch.zeros(4, 5, 768, dtype=dtype, requires_grad=True)
    rows.Gather.apply(x[: 4 // masks], ids).sum().backward()
    rows.scatter(x[:, :3], ids, 5, 0.01, range(4 // masks)).sum().backward()
    rows.scatter(x[:, :3], ids, 5, 0.0, ()).sum().backward()
    for beta in (0.0, 1.0):
        loss.regression_loss(x[:, :3], torch.zeros(4 // masks, 5, 768), ids, beta, 1.0)[0].backward()
    norms = TargetConfig(layer_norm_layer=True, instance_norm=True)
    targets.finish(targets.add_layer(targets.add_layer(None, x.detach(), norms), x.detach(), norms), norms)
for copy in (torch.bfloat16, torch.float16):
    for weight in (0.1, 0.9):
        lerp.lerp(torch.zeros(8), torch.zeros(8), weight, torch.zeros(8, dtype=copy))
""")
    wanted = {"take", "add_up", "put", "forward_chunk", "backward_tile", "time_moments", "add_rows", "move"}
    assert {kernel.name for kernel in found} == wanted and len(found) >= 20


def test_without_triton_torch_computes_everything():
    program = """
import sys
sys.modules["triton"] = None
import torch
import models.data2vec
from models.fused import kernels
from models.masks import gather_rows
assert not kernels.AVAILABLE
assert torch.equal(gather_rows(torch.ones(1, 3, 2), torch.tensor([[0, 2]])), torch.ones(1, 2, 2))
assert kernels.problems(kernels.Kernels(rows="triton"), torch.device("cpu"))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert found.returncode == 0, found.stderr
