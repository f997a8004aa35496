"""What speech and text add to the model: attention with a bias, ALiBi, padding, front ends, dropout and layer drop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.alibi import Alibi, slopes
from models.config import (
    RATE,
    AudioConfig,
    DecoderConfig,
    DropoutConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TargetConfig,
    TextConfig,
    problems,
)
from models.data2vec import Batch, Data2Vec
from models.fused.attention import LOGITS, Bias, attention, plain_attention
from models.masks import draw_block_masks, row_keys

AUDIO = ModelConfig(
    modality="audio",
    width=32,
    heads=4,
    prenet_depth=1,
    depth=3,
    norm_eps=1e-5,
    extra_tokens=0,
    num_masks=3,
    audio=AudioConfig(seconds=0.5, channels=16, position_groups=4),
    mask=MaskConfig(0.5, 0.05, 5, False, 0.01),
    decoder=DecoderConfig(32, 4, 7, 2),
    targets=TargetConfig(2, True, False, False, False),
    loss=LossConfig(cls=0.0),
)
TEXT = dataclasses.replace(
    AUDIO,
    modality="text",
    prenet_depth=0,
    text=TextConfig(50, 24),
    mask=MaskConfig(0.48, 0.0, 1, True, 0.01),
    decoder=DecoderConfig(32, 1, 9, 2, False, 2),
)
DROPOUT = DropoutConfig(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3)


def batch(config: ModelConfig, samples: int = 2, lengths: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(5)
    if config.modality == "audio":
        inputs = torch.randn(samples, config.length, generator=generator)
    else:
        inputs = torch.randint(4, config.text.vocabulary, (samples, config.length), generator=generator)
    index = torch.arange(samples).numpy()
    masks = draw_block_masks(config.mask, row_keys(1, 0 * index, index, config.num_masks), config.grid_shape)
    return Batch(inputs, masks.ids_keep, masks.ids_mask, tuple(range(samples)), lengths=lengths)


def model(config: ModelConfig) -> Data2Vec:
    torch.manual_seed(3)
    assert problems(config) == []
    return Data2Vec(config)


def qkv_and_bias(padded: bool, shared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    qkv = torch.randn(5, 7, 3, 4, 8, dtype=torch.float64).float().requires_grad_()
    slope = (-torch.rand(4)).requires_grad_()
    ids = torch.stack([torch.randperm(20)[:7].sort()[0] for _ in range(1 if shared else 5)])
    padding = torch.arange(7) >= torch.tensor([7, 4, 5, 1, 7])[:, None] if padded else None
    return qkv, slope, ids, padding


PIECES = pytest.mark.parametrize("logits", [1, 400, 2**20])  # one row at a time, two, all


@PIECES
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_attention_is_its_plain_twin(
    monkeypatch: pytest.MonkeyPatch, padded: bool, shared: bool, logits: int
) -> None:
    monkeypatch.setitem(LOGITS, "cpu", logits)
    qkv, slope, ids, padding = qkv_and_bias(padded, shared)
    grad = torch.randn(5, 7, 32)
    results = []
    for function in (attention, plain_attention):
        qkv.grad = slope.grad = None
        out = function(qkv, Bias(slope, ids, padding))
        out.backward(grad)
        results.append((out.detach(), qkv.grad, slope.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_padding_alone_is_a_bias_too() -> None:
    qkv, _, _, padding = qkv_and_bias(True, False)
    torch.testing.assert_close(attention(qkv, Bias(padding=padding)), plain_attention(qkv, Bias(padding=padding)))


def test_fused_attention_in_low_precision_keeps_the_bias_exact() -> None:
    """Weights that depend on the bias alone: rounded to bf16, -40.3 would be -40.25 and they 5 % off."""
    qkv = torch.zeros(1, 3, 3, 1, 2, dtype=torch.bfloat16)
    qkv[0, 1, 2] = 1  # the output is the second key's weight
    bias = Bias(torch.tensor([-0.1]), torch.tensor([[0, 400, 403]]), torch.tensor([[True, False, False]]))
    ours = attention(qkv, bias)[0, 0, 0]
    assert abs(float(ours) - float(torch.sigmoid(torch.tensor(0.3)))) < 2**-9  # bf16 of the weight itself


def test_a_row_that_sees_only_padding_stays_finite() -> None:
    qkv, slope, ids, _ = qkv_and_bias(False, False)
    padding = torch.zeros(5, 7, dtype=torch.bool)
    padding[2] = True
    gradients = []
    for function in (attention, plain_attention):
        qkv.grad = slope.grad = None
        out = function(qkv, Bias(slope, ids, padding))
        out.square().sum().backward()
        assert out.isfinite().all()
        gradients.append((qkv.grad, slope.grad))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert (gradients[0][0][2, :, :2] == 0).all() and gradients[0][0].isfinite().all()


def test_attention_dropout_has_the_share_and_the_scale() -> None:
    torch.manual_seed(1)
    n, t = 40, 25
    qkv = torch.zeros(n, t, 3, 2, 4)  # equal weights 1/t
    qkv[:, :, 2] = 1
    out = attention(qkv, None, 0.2)
    kept = (out * t * 0.8).view(n, t, 2, 4)[..., 0]  # how many of the t weights were kept
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert abs(float(kept.mean()) / t - 0.8) < 4 * (0.16 / (n * t * t * 2)) ** 0.5


@PIECES
def test_attention_dropout_has_the_gradient_of_what_it_computed(monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    monkeypatch.setitem(LOGITS, "cpu", logits)
    qkv, slope, ids, padding = qkv_and_bias(True, False)
    qkv, slope = qkv.detach().double().requires_grad_(), slope.detach().double().requires_grad_()

    def seeded(qkv: Tensor, slope: Tensor) -> Tensor:
        torch.manual_seed(9)
        return attention(qkv, Bias(slope, ids, padding), 0.3)

    out = seeded(qkv, slope)
    direction = torch.randn_like(qkv)
    (to_qkv, to_slope) = torch.autograd.grad(out.square().sum(), (qkv, slope))
    step = 1e-2
    with torch.no_grad():
        ends = [seeded(qkv + sign * step * direction, slope).square().sum() for sign in (1, -1)]
        tilted = [seeded(qkv, slope + sign * step).square().sum() for sign in (1, -1)]
    assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float((to_qkv * direction).sum()), rel=2e-3)
    assert float((tilted[0] - tilted[1]) / (2 * step)) == pytest.approx(float(to_slope.sum()), rel=2e-3)


def test_slopes_are_the_papers() -> None:
    assert slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twice = slopes(16)
    torch.testing.assert_close(slopes(12), torch.cat([slopes(8), twice[0::2][:4]]))


def test_a_negative_scale_gives_neither_bias_nor_gradient() -> None:
    alibi = Alibi(4)
    alibi.scale.data = torch.tensor([1.0, -0.5, 2.0, 0.0])
    slope = alibi()
    assert slope.tolist() == [-0.25, 0, -2 * 0.015625, 0]
    slope.sum().backward()
    assert alibi.scale.grad[1] == 0 and alibi.scale.grad[0] == -0.25
    bias = Bias(slope, torch.tensor([[0, 3, 7]]))
    assert bias.distance.tolist() == [[[0, 3, 7], [3, 0, 4], [7, 4, 0]]]
    assert bias.distance is bias.distance  # all blocks share it


def test_frames_are_those_of_the_convolutions() -> None:
    for samples in (400, 401, 719, 720, 16_000, 160_000):
        x = torch.zeros(1, 1, samples)
        for kernel, stride in zip(AudioConfig().kernels, AudioConfig().strides, strict=True):
            x = F.conv1d(x, torch.zeros(1, 1, kernel), stride=stride)
        assert AudioConfig().frames(samples) == x.shape[-1]
    assert AudioConfig().frames(10 * RATE) == 499
    assert AudioConfig().frames(399) <= 0


def test_hidden_audio_does_not_leak_into_the_student() -> None:
    net, given = model(AUDIO).eval(), batch(AUDIO)
    with torch.no_grad():
        features = net.student.local(given.inputs)
        other = features.clone()
        for row in range(AUDIO.num_masks):
            other[0, given.ids_mask[row]] = 9.0
            seen = [net.student(f, given.ids_keep)[row] for f in (features, other)]
            torch.testing.assert_close(*seen, rtol=0, atol=0)
            other[0] = features[0]


@pytest.mark.parametrize("config", [AUDIO, TEXT], ids=lambda c: c.modality)
def test_padding_changes_nothing_before_it(config: ModelConfig) -> None:
    """A short sample padded at its end has the features of the sample alone, but for what convolutions carry over."""
    config = dataclasses.replace(config, audio=dataclasses.replace(config.audio, position_layers=0))
    net, given = model(config).eval(), batch(config, 1)
    short = config.length * 2 // 3
    t = config.grid(short)[0]
    with torch.no_grad():
        alone = net.student(net.student.local(given.inputs[:, :short]))
        padded = given.inputs.clone()
        padded[:, short:] = 1 if config.modality == "text" else 0
        lengths = torch.tensor([t])
        ours = net.student(net.student.local(padded, lengths), None, lengths)
        blind = net.student(net.student.local(padded))
    torch.testing.assert_close(ours[:, :t], alone, rtol=1e-4, atol=1e-5)
    assert (blind[:, :t] - alone).abs().max() > 1e-3


def test_what_the_teacher_averages() -> None:
    names = {c.modality: {n.split(".")[0] for n, _ in model(c).teacher.named_parameters()} for c in (AUDIO, TEXT)}
    assert names == {"audio": {"positions", "alibi", "context_norm", "prenet", "blocks"}, "text": {"blocks"}}


@pytest.mark.parametrize("config", [AUDIO, TEXT], ids=lambda c: c.modality)
def test_targets_come_from_the_students_features(config: ModelConfig) -> None:
    net, given = model(config), batch(config)
    features = net.student.local(given.inputs)
    once = net.targets(given.inputs, features)
    assert not once.requires_grad
    assert (net.targets(given.inputs, features + torch.randn_like(features)) - once).abs().max() > 0.1
    torch.testing.assert_close(net.targets(torch.zeros_like(given.inputs), features), once, rtol=0, atol=0)


@dataclasses.dataclass
class Place:
    """A dropout module of the student, or the decoder's: what its input is, and what becomes of its output."""

    dropout: str
    after: str  # the module whose output it takes
    then: str  # the module that takes its output
    plus: str = ""  # the module whose input is added on the way


PLACES = {
    "residual": (AUDIO, Place("blocks.1.attn_dropout", "blocks.1.attn", "blocks.1.norm1", "blocks.1.attn")),
    "mlp": (AUDIO, Place("blocks.2.mlp_dropout", "blocks.2.mlp", "blocks.2.norm2", "blocks.2.mlp")),
    "prenet": (AUDIO, Place("context_dropout", "context_norm", "prenet.0")),
    "embedding": (TEXT, Place("local.dropout", "local.norm", "positions")),
    "decoder": (TEXT, Place("decoder_dropout", "", "decoder")),
}


@pytest.mark.parametrize("field", PLACES)
def test_dropout_acts_where_it_belongs(field: str) -> None:
    config, place = PLACES[field]
    config = dataclasses.replace(config, mask=dataclasses.replace(config.mask, noise_std=0.0))
    net = model(dataclasses.replace(config, dropout=DropoutConfig(**{field: 0.25})))
    entered, left = {}, {}

    def keep(name: str) -> None:
        def hook(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            entered[name], left[name] = args[0].detach(), output.detach() if isinstance(output, Tensor) else output

        net.get_submodule(name if name.startswith("decoder") else f"student.{name}".rstrip(".")).register_forward_hook(
            hook
        )

    for name in {place.dropout, place.after, place.then, place.plus}:
        keep(name)
    given = batch(config)
    net(given)
    before, after = entered[place.dropout], left[place.dropout]
    assert torch.equal(before, left[place.after])
    zeros = (after == 0) & (before != 0)
    assert float(zeros.float().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(after[~zeros], before[~zeros] / 0.75)
    if place.plus:
        after = after + entered[place.plus]
    taken = entered[place.then]
    if field == "decoder":
        taken = taken[torch.arange(len(taken))[:, None], given.ids_keep]
    assert torch.equal(taken, after)
    net.eval()
    net(given)
    assert torch.equal(entered[place.dropout], left[place.dropout])


def test_attentions_dropout_is_the_configs() -> None:
    net, x = model(dataclasses.replace(AUDIO, dropout=DropoutConfig(attention=0.5))), torch.randn(2, 9, 32)
    block = net.student.blocks[0]
    assert not torch.equal(block(x)[0], block(x)[0])
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])


def test_the_mlps_target_is_taken_before_its_dropout() -> None:
    net, given = model(dataclasses.replace(AUDIO, dropout=DropoutConfig(mlp=0.5))), batch(AUDIO)
    x, bias = net.student.context(net.student.local(given.inputs), given.ids_keep)
    ffn = [ffn for _, ffn in net.student.layers(x, bias)]
    assert all((f == 0).float().mean() < 0.01 for f in ffn)


def test_the_teacher_never_drops_but_text_shares_the_embeddings_dropout() -> None:
    for config, random in ((AUDIO, False), (TEXT, True)):
        net, given = model(dataclasses.replace(config, dropout=DROPOUT)).train(), batch(config)
        targets = [net.targets(given.inputs, net.student.local(given.inputs)) for _ in range(2)]
        assert torch.equal(*targets) is not random
        features = net.student.local(given.inputs)
        assert torch.equal(net.targets(given.inputs, features), net.targets(given.inputs, features))


def test_layer_drop_leaves_out_whole_blocks_by_seed() -> None:
    config = dataclasses.replace(AUDIO, depth=6, dropout=DropoutConfig(layer=0.3))
    net, given = model(config), batch(config)
    drawn = [net.dropped_blocks(seed) for seed in range(400)]
    assert abs(sum(map(len, drawn)) / 2400 - 0.3) < 4 * (0.21 / 2400) ** 0.5
    assert drawn == [net.dropped_blocks(seed) for seed in range(400)]
    seed = next(s for s, d in enumerate(drawn) if 0 < len(d) < 6)
    ran = []
    for i, block in enumerate(net.student.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    net(given, seed)
    assert set(ran) == set(range(6)) - drawn[seed]
    ran.clear()
    net.eval()(given, seed)
    assert ran == list(range(6))


def test_two_layer_projection_and_no_residual() -> None:
    net, given = model(TEXT).eval(), batch(TEXT)
    x = torch.randn(2, TEXT.text.tokens, TEXT.width)
    with torch.no_grad():
        y = x
        for conv in net.decoder.convs:
            y = F.conv1d(y.transpose(1, 2), conv.weight, conv.bias, padding=conv.padding).transpose(1, 2)
            y = F.gelu(F.layer_norm(y, (TEXT.decoder.width,)))
        torch.testing.assert_close(net.decoder(x), y, rtol=1e-4, atol=1e-5)
    assert [tuple(p.shape) for p in net.decoder.proj.parameters()] == [(64, 32), (64,), (32, 64), (32,)]
    assert float(net(given).regression.detach()) > 0


def test_token_masks_are_uniform() -> None:
    config, keys = MaskConfig(0.48, 0.0, 1, True), row_keys(1, torch.zeros(4000).numpy(), torch.arange(4000).numpy(), 1)
    masks = draw_block_masks(config, keys, (24,))
    assert masks.ids_keep.shape == (4000, 12)
    hidden = torch.zeros(4000, 24).scatter_(1, masks.ids_mask, 1.0)
    expected, spread = 0.5, (0.25 / 4000) ** 0.5
    assert (hidden.mean(0) - expected).abs().max() < 5 * spread
    pair = (hidden[:, 1:] * hidden[:, :-1]).mean(0)
    assert (pair - 12 * 11 / (24 * 23)).abs().max() < 5 * spread


def test_published_counts_of_hidden_positions() -> None:
    text, audio = MaskConfig(0.48, 0.0, 1, True), MaskConfig(0.5, 0.05, 5, False)
    assert (512 - text.hidden(512), 512 - MaskConfig(0.5, 0.0, 1, True).hidden(512)) == (266, 256)
    assert [audio.hidden(t) for t in (50, 200, 999)] == [25, 100, 499]
    assert [MaskConfig(0.55, 0.1, 5, False).hidden(t) for t in (50, 200, 999)] == [27, 110, 549]


def test_initialisation_of_the_new_parts() -> None:
    config = dataclasses.replace(AUDIO, width=128, audio=AudioConfig(seconds=0.5, channels=64, position_groups=4))
    student = model(config).student
    assert float(student.local.convs[1].weight.detach().std()) == pytest.approx((2 / (64 * 3)) ** 0.5, rel=0.05)
    assert float(student.local.proj.weight.detach().std()) == pytest.approx(64**-0.5 / 3**0.5, rel=0.05)
    assert student.alibi.scale.tolist() == [1.0] * 4
    text = model(dataclasses.replace(TEXT, text=TextConfig(500, 24))).student.local
    assert float(text.tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not text.tokens.weight[1].any() and not text.positions.weight[1].any()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modality": "video"}, "know image, audio, text"),
        ({"extra_tokens": 1}, "extra_tokens are for images"),
        ({"modality": "text"}, "text has no prenet"),
        ({"dropout": DropoutConfig(layer=1.0)}, "dropout.layer=1.0 must lie in"),
        ({"audio": AudioConfig(position_kernel=4)}, "position_kernel=4 must be odd"),
        ({"audio": AudioConfig(kernels=(3,))}, "1 kernels for 7 strides"),
        ({"decoder": DecoderConfig(32, 4, 7, 2, True, 3)}, "projection_layers=3"),
    ],
)
def test_models_that_cannot_be(changes: dict, told: str) -> None:
    assert told in "; ".join(problems(dataclasses.replace(AUDIO, **changes)))
