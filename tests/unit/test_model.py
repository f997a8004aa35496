"""Data2Vec on a tiny model: who influences whom, who learns, and how everything starts."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.config import DecoderConfig, ImageConfig, LossConfig, MaskConfig, ModelConfig, TargetConfig
from models.convolution import convolve
from models.data2vec import Batch, Data2Vec, Encoder
from models.decoder import Decoder
from models.image import sincos_positions
from models.masks import draw_block_masks, gather_rows, row_keys, scatter_rows

PUBLISHED = json.loads((Path(__file__).parent / "data" / "init.json").read_text())
TINY = ModelConfig(
    width=32,
    heads=4,
    prenet_depth=1,
    depth=3,
    num_masks=3,
    image=ImageConfig(size=24, patch=4),
    mask=MaskConfig(prob=0.75, adjust=0.1),
    decoder=DecoderConfig(width=16, groups=4, layers=2),
    targets=TargetConfig(top_k_layers=2),
    loss=LossConfig(cls=0.5),
)
QUIET = dataclasses.replace(TINY, mask=dataclasses.replace(TINY.mask, noise_std=0.0))
SAMPLES = 4


def batch(config=TINY, samples=range(SAMPLES)):
    """Pixels and masks are functions of the sample, so that samples can be put in another order."""
    samples = np.array(samples)
    pixels = [
        torch.randint(256, (3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(int(s)))
        for s in samples
    ]
    keys = row_keys(1, np.zeros_like(samples), samples, config.num_masks)
    seeds = tuple(samples.tolist())
    return Batch(torch.stack(pixels), *draw_block_masks(config.mask, keys, config.grid_shape), seeds)


def model(config=TINY):
    torch.manual_seed(0)
    return Data2Vec(config)


def shaken(config=TINY):
    """With weights far from their initial ones, and a teacher unlike the student."""
    out = model(config)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return out


def test_everything_learns_but_the_teacher():
    net = shaken()
    out = net(batch())
    (out.regression + out.cls).backward()
    unmoved = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert unmoved == [name for name, _ in net.named_parameters() if name.startswith("teacher.")]


def test_tracked_pairs_every_student_parameter_with_the_teachers_own():
    net = model()
    names = {id(p): name for name, p in net.named_parameters()}
    pairs = [(names[id(student)], names[id(teacher)]) for student, teacher in net.tracked()]
    assert pairs == [(f"student.{n}", f"teacher.{n}") for n, _ in net.student.named_parameters()]


def test_the_student_sees_kept_patches_only():
    net, given = shaken(), batch()
    patch = (set(given.ids_keep[1].tolist()) - set(given.ids_keep[0].tolist())).pop()  # seen in row 1, hidden in row 0
    y, x = divmod(patch, TINY.image.grid)
    pixels = given.inputs.clone()
    pixels[0, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] ^= 255
    seen = (given.ids_keep == patch).any(1)
    seen[TINY.num_masks :] = False
    assert 0 < seen.sum() < TINY.num_masks
    with torch.no_grad():
        before, after = (net.student(net.student.local(p), given.ids_keep) for p in (given.inputs, pixels))
        changed = (before != after).flatten(1).any(1)
        assert changed.tolist() == seen.tolist()
        contexts = [net.student.context(net.student.local(p), given.ids_keep)[0] for p in (given.inputs, pixels)]
        assert (contexts[0] != contexts[1]).flatten(1).any(1).tolist() == seen.tolist()
        moved = (
            net.targets(given.inputs, net.student.local(given.inputs)) != net.targets(pixels, net.student.local(pixels))
        ).any(2)
    assert moved[0].all() and not moved[1:].any()  # the teacher contextualises: every position of that sample


def test_the_student_knows_the_positions_it_keeps():
    net, given = shaken(), batch()
    features = net.student.local(given.inputs)
    kept = net.student.positions(features, given.ids_keep)
    for row in range(len(kept)):
        ids, sample = given.ids_keep[row], row // TINY.num_masks
        torch.testing.assert_close(kept[row], features[sample, ids] + sincos_positions(32, 6)[ids])


def test_gather_and_scatter_are_inverse():
    x = torch.randn(2, 36, 5)
    given = batch(samples=range(2))
    rows = x.repeat_interleave(TINY.num_masks, 0)
    kept = gather_rows(x, given.ids_keep)
    full = scatter_rows(kept, given.ids_keep, 36, 0.0, given.seeds)
    hidden = torch.zeros(6, 36, dtype=torch.bool).scatter_(1, given.ids_mask, True)
    assert torch.equal(full, rows.masked_fill(hidden[..., None], 0.0))
    full[torch.arange(6)[:, None], given.ids_mask] = gather_rows(x, given.ids_mask)
    assert torch.equal(full, rows)


def test_noise_belongs_to_the_sample():
    """However samples are batched; and it differs between samples and between a sample's masks."""
    given, kept = batch(), torch.zeros(SAMPLES * TINY.num_masks, batch().ids_keep.shape[1], 5)
    whole = scatter_rows(kept, given.ids_keep, 36, 1.0, given.seeds).chunk(SAMPLES)
    for sample, rows in enumerate(whole):
        alone = batch(samples=[sample])
        assert torch.equal(scatter_rows(kept[: TINY.num_masks], alone.ids_keep, 36, 1.0, alone.seeds), rows)
    noise = torch.cat(whole)[:, :, 0]
    assert len({tuple(row.tolist()) for row in noise}) == SAMPLES * TINY.num_masks


def test_the_decoder_gets_kept_outputs_and_noise_elsewhere():
    config = dataclasses.replace(TINY, mask=dataclasses.replace(TINY.mask, noise_std=0.01))
    net, given, heard = model(config), batch(samples=range(32)), []
    net.decoder.register_forward_pre_hook(lambda _, args: heard.append(args[0].detach()))
    encoded = torch.randn(96, 1 + given.ids_keep.shape[1], 32)
    net.predict(encoded, given)
    own = torch.arange(96)[:, None]
    assert torch.equal(heard[0][own, given.ids_keep], encoded[:, 1:])
    noise = heard[0][own, given.ids_mask].double()
    n = noise.numel()
    assert abs(noise.mean()) < 5 * 0.01 / math.sqrt(n)
    assert float(noise.std()) == pytest.approx(0.01, rel=5 / math.sqrt(2 * n))
    assert len(noise.unique(dim=0)) == 96  # no two rows share theirs


def test_losses_are_those_of_hidden_positions_and_the_class_token():
    net, given = shaken(QUIET), batch()
    with torch.no_grad():
        out = net(given)
        targets = (
            net.targets(given.inputs, net.student.local(given.inputs)).double().repeat_interleave(QUIET.num_masks, 0)
        )
        encoded = net.student(net.student.local(given.inputs), given.ids_keep)
        prediction = net.predict(encoded, given).double()
    own = torch.arange(len(targets))[:, None]
    scale = 32**-0.5
    regression = scale * ((prediction - targets[own, given.ids_mask]) ** 2).sum()
    token = scale * ((encoded[:, 0].double() - targets.mean(1)) ** 2).sum()
    assert float(out.regression) == pytest.approx(float(regression), rel=1e-5)
    assert float(out.cls) == pytest.approx(float(token), rel=1e-5)
    assert float(out.prediction.n) == float(out.target.n) == given.masked
    hidden = targets[own, given.ids_mask].reshape(-1, 32)
    torch.testing.assert_close(out.target.m2 / (given.masked - 1), hidden.var(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.prediction.mean, prediction.mean((0, 1)), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_without_its_weight_there_is_no_class_token_term():
    config = dataclasses.replace(QUIET, loss=LossConfig(cls=0.0))
    with_term, without = shaken(QUIET)(batch()), shaken(config)(batch())
    assert float(without.cls) == 0.0 < float(with_term.cls)
    assert float(without.regression) == float(with_term.regression)


def test_targets_are_the_mean_over_the_top_blocks_only():
    net, given = shaken(), batch()
    inputs = net.teacher.context(net.teacher.local(given.inputs))[0].detach()
    raw = [ffn[:, 1:].double() for _, ffn in net.teacher.layers(inputs)]
    normed = [F.instance_norm(x.transpose(1, 2)).transpose(1, 2) for x in raw]
    expected = F.layer_norm((normed[1] + normed[2]) / 2, (32,))
    torch.testing.assert_close(
        net.targets(given.inputs, net.student.local(given.inputs)).double(), expected, rtol=1e-4, atol=1e-5
    )


def test_samples_in_another_order_give_the_same_in_that_order():
    net, order = shaken(QUIET), [2, 0, 3, 1]
    with torch.no_grad():
        one, other = batch(QUIET), batch(QUIET, order)
        rows = [net.predict(net.student(net.student.local(b.inputs), b.ids_keep), b) for b in (one, other)]
        predictions = [x.unflatten(0, (SAMPLES, -1)) for x in rows]
        torch.testing.assert_close(predictions[1], predictions[0][order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            net.targets(other.inputs, net.student.local(other.inputs)),
            net.targets(one.inputs, net.student.local(one.inputs))[order],
            rtol=1e-4,
            atol=1e-5,
        )
        assert (predictions[0][0] - predictions[0][1]).abs().max() > 0.01


@torch.no_grad()
def test_a_block_norms_after_its_residuals_and_gives_the_raw_mlp_output():
    block = shaken().student.blocks[0].double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in block.attn.qkv(x).chunk(3, dim=-1))
    attended = ((q @ k.mT / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    middle = F.layer_norm(x + block.attn.proj(attended), (32,), block.norm1.weight, block.norm1.bias, 1e-6)
    hidden = block.mlp.fc1(middle)
    ffn = block.mlp.fc2(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
    out = F.layer_norm(middle + ffn, (32,), block.norm2.weight, block.norm2.bias, 1e-6)
    torch.testing.assert_close(block(x), (out, ffn))


@torch.no_grad()
@pytest.mark.parametrize("residual", [True, False])
def test_decoder_layers_add_their_input_where_widths_agree(residual):
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, residual=residual))
    decoder = shaken(config).decoder
    x = torch.randn(2, 36, 32)
    first, second = decoder.convs
    y = F.gelu(F.layer_norm(first(x.mT.unflatten(-1, (6, 6))).flatten(2).mT, (16,)))
    z = F.gelu(F.layer_norm(second(y.mT.unflatten(-1, (6, 6))).flatten(2).mT, (16,)))
    torch.testing.assert_close(decoder(x), y + z if residual else z, rtol=1e-4, atol=1e-5)


def test_the_decoder_is_a_convolution_over_the_grid():
    """A bump reaches `layers` x 1 patches up, down, left and right, and no residual joins unlike widths."""
    decoder = model().decoder
    x = torch.zeros(1, 36, 32)
    bumped = x.clone()
    bumped[0, 2 * 6 + 3] = torch.randn(32)
    with torch.no_grad():
        moved = (decoder(x) != decoder(bumped)).any(2).view(6, 6)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[0:5, 1:6] = True
    assert torch.equal(moved, expected)
    assert decoder(x).shape == (1, 36, 16)


def test_uint8_pixels_are_normalised_once():
    net, given = model(), batch()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (TINY.image.mean, TINY.image.std))
    ready = (given.inputs / 255 - mean) / std
    torch.testing.assert_close(net.student.local(given.inputs), net.student.local(ready))


def test_the_teacher_starts_as_a_copy_that_shares_nothing():
    net = model()
    for student, teacher in net.tracked():
        assert torch.equal(student, teacher) and student.data_ptr() != teacher.data_ptr()
        assert not teacher.requires_grad


@pytest.fixture(scope="module")
def base():
    """The student and decoder of ViT-B/16, as they start."""
    torch.manual_seed(0)
    config = ModelConfig()
    parts = {"student": Encoder(config), "decoder": Decoder(config)}
    return {f"{part}.{name}": p.detach() for part, net in parts.items() for name, p in net.named_parameters()}


def test_initial_parameters_are_the_references(base):
    assert {name: list(p.shape) for name, p in base.items()} == {
        name: entry["shape"] for name, entry in PUBLISHED["parameters"].items()
    }


def test_initial_statistics_are_the_references(base):
    """Two draws of n values each: means differ by std * sqrt(2/n), standard deviations by half of that."""
    wrong = {}
    for name, entry in PUBLISHED["parameters"].items():
        p, std = base[name], entry["std"]
        if std == 0:
            if (p != entry["mean"]).any():
                wrong[name] = "should be constant"
            continue
        error = std * math.sqrt(2 / p.numel())
        if abs(float(p.mean()) - entry["mean"]) > 5 * error + 1e-6:
            wrong[name] = f"mean {float(p.mean())}, not {entry['mean']}"
        if abs(float(p.std()) - std) > 5 * error / math.sqrt(2) + 1e-6:
            wrong[name] = f"std {float(p.std())}, not {std}"
        uniform = entry["max"] < 1.8 * std
        if uniform != (float(p.max()) < 1.8 * std):
            wrong[name] = f"should be {'uniform' if uniform else 'normal'}"
    assert wrong == {}


@pytest.mark.parametrize(("width", "grid"), [(8, 3), (32, 6)])
def test_positions_have_their_closed_form(width, grid):
    ours = sincos_positions(width, grid)
    quarter = width // 4
    for y in range(grid):
        for x in range(grid):
            waves = [
                wave(place / 10000 ** (i / quarter))
                for place in (x, y)
                for wave in (math.sin, math.cos)
                for i in range(quarter)
            ]
            assert ours[y * grid + x].tolist() == pytest.approx(waves, abs=1e-6)


def test_positions_have_the_references_statistics():
    ours, entry = sincos_positions(768, 14), PUBLISHED["positions"]
    assert [float(v) for v in (ours.mean(), ours.std(), ours.min(), ours.max())] == pytest.approx(
        [entry[k] for k in ("mean", "std", "min", "max")], abs=1e-5
    )


@pytest.mark.parametrize("conv", [nn.Conv1d(6, 8, 5, padding=2), nn.Conv1d(6, 8, 5, padding=2, groups=2)])
def test_a_convolution_at_some_positions_is_the_whole_one_there(conv):
    """With all gradients; positions at both ends are among them."""
    ids = torch.tensor([[0, 1, 6, 10], [2, 3, 4, 10]])
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    conv = conv.double()
    weight = torch.randn(2, 4, 8, dtype=torch.float64)

    def gradients(y):
        return torch.autograd.grad((y * weight).sum(), [x, *conv.parameters()])

    whole = conv(x.mT).mT[torch.arange(2)[:, None], ids]
    partly = convolve(conv, x, (11,), ids)
    torch.testing.assert_close(partly, whole)
    torch.testing.assert_close(gradients(partly), gradients(whole))


def test_the_decoder_answers_for_the_positions_asked():
    config = dataclasses.replace(TINY, decoder=DecoderConfig(width=32, groups=1, kernel=3, layers=2))
    for net in (shaken(config), shaken(TINY), shaken(dataclasses.replace(TINY, decoder=DecoderConfig(layers=0)))):
        x, ids = torch.randn(2, 36, 32), torch.stack([torch.randperm(36)[:7] for _ in range(2)])
        torch.testing.assert_close(net.decoder(x, ids), net.decoder(x)[torch.arange(2)[:, None], ids])
