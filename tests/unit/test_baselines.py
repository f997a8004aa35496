"""The baselines against transformers' own networks, given the same weights and masks; what is drawn, against what is
published of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RobertaForMaskedLM, ViTMAEForPreTraining, Wav2Vec2ForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from finetune.features import FrozenEncoder
from models.baselines import mae, mlm, wav2vec2
from models.baselines.batch import Hidden, corrupt, draw_negatives
from models.baselines.config import MlmConfig
from models.config import HeadConfig, ModelConfig
from models.data2vec import Batch, FullView
from models.heads import FineTuned
from models.masks import draw_spans, row_keys, sample_keys
from models.objectives import encoder, network
from pretrain.baselines import BaselineTrainer, describe
from pretrain.checkpoint import RunState
from pretrain.config import Config, load
from pretrain.data.collate import COLLATES
from pretrain.data.sources import Sample
from pretrain.settings import ConfigError

ROOT = Path(__file__).parents[2]
OBJECTIVES = ("mae", "wav2vec2", "mlm")
SMALL = ["model.prenet_depth=0", "model.num_masks=1", "model.depth=2", "model.targets.top_k_layers=2"]
OVERRIDES = {
    "mae": ["model.mask={prob: 0.75, adjust: 0, length: 1}", "model.mae={width: 24, depth: 2, heads: 3}"],
    "wav2vec2": [
        "model.mask={prob: 0.65, adjust: 0, length: 4, inverse: false}",
        "model.wav2vec2={width: 16, codes: 12, negatives: 10, position_kernel: 6}",
    ],
    "mlm": ["model.mask={prob: 0.15, adjust: 0, length: 1, inverse: false}"],
}
FILES = {"mae": "tiny.yaml", "wav2vec2": "tiny_audio.yaml", "mlm": "tiny_text.yaml"}


def config_of(objective: str, *more: str) -> Config:
    off = [f"model.dropout.{name}=0" for name in ("residual", "attention", "prenet", "layer")]
    given = [f"model.objective={objective}", *SMALL, *OVERRIDES[objective], *off, *more]
    return load(ROOT / "tests" / FILES[objective], given)


def samples(config: ModelConfig, count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    if config.modality == "image":
        inputs = rng.integers(0, 256, (count, 1, config.image.size, config.image.size), np.uint8)
    elif config.modality == "audio":
        inputs = rng.standard_normal((count, config.length)).astype(np.float32)
    else:
        inputs = rng.integers(4, config.text.vocabulary, (count, config.text.tokens))
    return [Sample(torch.from_numpy(one), 3, i) for i, one in enumerate(inputs)]


def batch_of(config: ModelConfig, count: int = 6) -> Any:
    return COLLATES[config.objective](config, 1)(samples(config, count))


def model_of(config: ModelConfig) -> Any:
    """With norms and biases that are not 1 and 0."""
    torch.manual_seed(0)
    model = network(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


MOVED = {  # our names' beginnings in transformers' networks
    "mae": {"student.local.proj.": "vit.embeddings.patch_embeddings.projection.", "student.blocks.": "vit.layers."}
    | {"student.extra_tokens.weight": "vit.embeddings.cls_token", "student.norm.": "vit.layernorm."},
    "wav2vec2": {"student.local.convs.": "wav2vec2.feature_extractor.conv_layers."}
    | {"student.local.projection.": "wav2vec2.feature_projection.", "student.blocks.": "wav2vec2.encoder.layers."}
    | {"student.positions.": "wav2vec2.encoder.pos_conv_embed.", "student.norm.": "wav2vec2.encoder.layer_norm."}
    | {"mask_token": "wav2vec2.masked_spec_embed"},
    "mlm": {"student.local.": "roberta.", "student.blocks.": "roberta.encoder.layer."}
    | {"dense.": "lm_head.dense.", "norm.": "lm_head.layer_norm.", "bias": "lm_head.bias"},
}
NETWORKS = {
    "mae": (mae, ViTMAEForPreTraining),
    "wav2vec2": (wav2vec2, Wav2Vec2ForPreTraining),
    "mlm": (mlm, RobertaForMaskedLM),
}


def theirs(model: Any) -> Any:
    """transformers' network with the model's weights."""
    objective = model.config.objective
    module, kind = NETWORKS[objective]
    other, own = kind(module.settings(model.config)).eval(), dict(model.named_parameters())
    if objective == "mae":  # transformers 5 begins with zeros, but has the table
        for part, name in ((other.vit.embeddings, "position_embeddings"), (other.decoder, "decoder_pos_embed")):
            table = build_2d_sinusoidal_position_embedding(4, 4, getattr(part, name).shape[-1], cls_token=True)
            getattr(part, name).data = table.roll(table.shape[1] // 2, dims=1)[None]  # as published: columns first
    named = dict(other.named_parameters())
    filled = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"} & named.keys()
    for name, parameter in own.items():
        start = next((s for s in MOVED[objective] if name.startswith(s)), "")
        moved = MOVED[objective].get(start, "") + name.removeprefix(start)
        named[moved].data.copy_(parameter.data)
        filled.add(moved)
    assert filled == named.keys()
    return other


def loss_of(model: Any, batch: Any) -> Tensor:
    """Of a batch that is the whole of a step."""
    return model(batch).loss / batch.masked


def test_mae_loses_what_transformers_does() -> None:
    model = model_of(config_of("mae").model)
    batch: Batch = batch_of(model.config)
    assert batch.ids_keep.shape == (6, 4) and batch.ids_mask.shape == (6, 12)  # int(16 * 0.25) of 16
    noise = torch.ones(6, 16).scatter(1, batch.ids_keep, 0) + torch.arange(16) / 100
    with torch.no_grad():
        found = theirs(model)(pixel_values=model.student.local.normalise(batch.inputs), noise=noise)
    assert torch.equal(found.mask.nonzero()[:, 1].view(6, -1), batch.ids_mask)
    assert float(loss_of(model, batch)) == pytest.approx(float(found.loss), rel=1e-5)
    model.decoder.decoder_pos_embed.zero_()
    assert float(loss_of(model, batch)) != pytest.approx(float(found.loss), rel=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_wav2vec2_loses_what_transformers_does(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While training, too, with the likeliest code in place of a drawn one; and at the step's own temperature."""
    config = config_of("wav2vec2").model
    model = model_of(replace(config, wav2vec2=replace(config.wav2vec2, dropout=0.0, temperature=(2.0, 0.5, 0.9))))
    batch: Hidden = batch_of(model.config)
    other = theirs(model)
    if training:
        temperatures = []

        def likeliest(x: Tensor, tau: float, hard: bool) -> Tensor:
            temperatures.append(tau)
            return F.one_hot(x.argmax(dim=-1), x.shape[-1]).to(x.dtype)

        monkeypatch.setattr(F, "gumbel_softmax", likeliest)
        model.train()
        other.train()
        model.step = 5
        other.set_gumbel_temperature(2 * 0.9**5)
    frames = config.positions
    hidden = torch.zeros(6 * frames, dtype=torch.bool)
    hidden[batch.places] = True
    negatives = torch.zeros(6 * frames, 10, dtype=torch.int64)
    negatives[batch.places] = batch.truth
    negatives = torch.where(hidden[:, None], batch.places[negatives], 0)
    with torch.no_grad():
        found = other(
            batch.inputs, mask_time_indices=hidden.view(6, -1), sampled_negative_indices=negatives.view(6, frames, -1)
        )
        output = model(batch)
        penalty = other.wav2vec2.feature_extractor(batch.inputs).square().mean()
    if training:
        assert temperatures == [pytest.approx(2 * 0.9**5)] * 2
    assert float(output.figures["contrastive"]) == pytest.approx(float(found.contrastive_loss), rel=1e-5)
    assert float(output.figures["perplexity"]) / batch.masked == pytest.approx(float(found.codevector_perplexity), 1e-5)
    wanted = float(found.loss) / batch.masked + 10 * float(penalty)
    assert float(output.loss) / batch.masked == pytest.approx(wanted, rel=1e-5)


def test_mlm_loses_what_transformers_does() -> None:
    model = model_of(config_of("mlm").model)
    batch: Hidden = batch_of(model.config)
    labels = torch.full((6 * 24,), -100)
    labels[batch.places] = batch.truth
    with torch.no_grad():
        found = theirs(model)(batch.inputs, labels=labels.view(6, -1))
    assert float(loss_of(model, batch)) == pytest.approx(float(found.loss), rel=1e-5)


def test_the_convolutions_get_a_tenth_of_the_gradient() -> None:
    config = config_of("wav2vec2").model
    grads = []
    for share in (1.0, 0.1):
        model = model_of(replace(config, wav2vec2=replace(config.wav2vec2, feature_gradient=share)))
        loss_of(model, batch_of(config)).backward()
        grads.append([p.grad for p in (model.student.local.convs[0].conv.weight, model.project_hid.weight)])
    assert torch.allclose(grads[1][0], 0.1 * grads[0][0], rtol=1e-4, atol=1e-7)
    assert torch.allclose(grads[1][1], grads[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_states_are_those_of_transformers(objective: str) -> None:
    """Local features, then each block's output, positions in their order; the last is the encoder's."""
    model = model_of(config_of(objective).model)
    inputs = torch.stack([s.inputs for s in samples(model.config, 3)])
    view = FullView(inputs, None, lambda states, lengths: torch.stack(list(states)))
    found, other = model(view), theirs(model)
    with torch.no_grad():
        if objective == "mae":
            pixels = model.student.local.normalise(inputs)
            other.config.mask_ratio = 0.0
            noise = torch.arange(16.0).expand(3, -1)
            seen = other.vit(pixels, noise=noise, output_hidden_states=True)
            states = [*seen.hidden_states[:-1], seen.last_hidden_state]
            expected = [other.vit.embeddings.patch_embeddings(pixels), *(state[:, 1:] for state in states[1:])]
        elif objective == "wav2vec2":
            seen = other.wav2vec2(inputs, output_hidden_states=True)
            local = other.wav2vec2.feature_projection(other.wav2vec2.feature_extractor(inputs).transpose(1, 2))[0]
            expected = [local, *seen.hidden_states[1:]]
        else:
            expected = list(other.roberta(inputs, output_hidden_states=True).hidden_states)
    assert len(found) == len(expected) == 3 and found.dtype == torch.float32
    for ours, state in zip(found, expected, strict=True):
        assert torch.allclose(ours, state, atol=1e-5)


@pytest.mark.parametrize("objective", ["wav2vec2", "mlm"])
def test_a_padded_sample_is_as_if_alone(objective: str) -> None:
    config = config_of(objective).model
    model = model_of(config)
    long, short = (s.inputs for s in samples(config, 2))
    size = {"wav2vec2": 5200, "mlm": 17}[objective]
    short, (frames,) = short[:size], config.grid(size)
    value = config.text.pad if objective == "mlm" else 0
    both = torch.stack([long, F.pad(short, (0, len(long) - size), value=value)])
    lengths = torch.tensor([config.positions, frames])
    frozen = FrozenEncoder(model.student, config, torch.device("cpu"))
    together = frozen.features(both, [0, 1], lengths)
    for alone, beside in zip(frozen.features(short[None], [0, 1]), together, strict=True):
        assert torch.allclose(alone.positions[0], beside.positions[1, :frames], atol=1e-5)
    assert torch.allclose(frozen.features(long[None]).positions[0], together[1].positions[0], atol=1e-5)


@pytest.mark.parametrize("objective", ["mae", "mlm"])
def test_two_micro_batches_are_one_batch(objective: str) -> None:
    """Whatever they hide: parts of a mean over all that is hidden. (wav2vec 2.0 has losses of a whole micro-batch.)"""
    model = model_of(config_of(objective).model)
    collate, eight = COLLATES[objective](model.config, 1), samples(model.config, 8)
    whole, parts = collate(eight), [collate(eight[:3]), collate(eight[3:])]
    masked = sum(part.masked for part in parts)
    assert masked == whole.masked
    total = sum(float(model(part).loss) / masked for part in parts)
    assert total == pytest.approx(float(loss_of(model, whole)), rel=1e-5)


def test_mlm_hides_what_is_published() -> None:
    rng = np.random.default_rng(0)
    vocabulary, pad = 500, 1
    ids = rng.integers(4, vocabulary, (4000, 50))
    keys = sample_keys(1, np.zeros(4000, np.int64), np.arange(4000))
    seen, hidden = corrupt(keys, ids, 0.15, MlmConfig(), vocabulary, pad)
    counts = hidden.sum(axis=1)
    assert set(counts) == {7, 8} and counts.mean() == pytest.approx(7.5, abs=0.03)  # int(0.15 * 50 + u)
    assert hidden.mean(axis=0) == pytest.approx(np.full(50, 0.15), abs=0.03)
    assert np.array_equal(seen[~hidden], ids[~hidden])
    told, true = seen[hidden], ids[hidden]
    assert (told == vocabulary).mean() == pytest.approx(0.8, abs=0.01)
    assert (told == true).mean() == pytest.approx(0.1, abs=0.01)
    random = told[(told != vocabulary) & (told != true)]
    assert len(random) / len(told) == pytest.approx(0.1, abs=0.01)
    assert pad not in random and random.max() < vocabulary and len(set(random)) > 480
    again = corrupt(keys[:7], ids[:7], 0.15, MlmConfig(), vocabulary, pad)
    assert np.array_equal(again.ids, seen[:7])  # whoever else is in the batch
    later = corrupt(sample_keys(1, np.ones(7, np.int64), np.arange(7)), ids[:7], 0.15, MlmConfig(), vocabulary, pad)
    assert not np.array_equal(later.hidden, again.hidden)  # another epoch's
    assert MlmConfig(mask_id=9).mask_id in corrupt(keys, ids, 0.15, MlmConfig(mask_id=9), vocabulary, pad).ids


def test_negatives_are_other_hidden_frames_of_the_clip() -> None:
    keys = row_keys(1, np.zeros(300, np.int64), np.arange(300), 2).reshape(-1, 2)
    hidden = draw_spans(keys[:, 0], np.full(300, 40), 40, 0.65, 10, least=2)
    assert hidden.sum(axis=1).min() >= 11
    assert 0.4 < hidden.mean() < 0.55  # 0.49 where clips are long (wav2vec 2.0, 4.2)
    negatives = draw_negatives(keys[:, 1], hidden, 30)
    rows = np.nonzero(hidden)[0]
    assert negatives.shape == (len(rows), 30)
    assert (rows[negatives] == rows[:, None]).all()
    assert (negatives != np.arange(len(rows))[:, None]).all()
    own = hidden[0].sum()
    drawn = draw_negatives(keys[:1, 1], hidden[:1], 4000)
    shares = np.stack([np.bincount(drawn[i], minlength=own) for i in range(own)]) / 4000
    off = ~np.eye(own, dtype=bool)
    assert shares[off] == pytest.approx(np.full(off.sum(), 1 / (own - 1)), abs=0.02)
    assert np.array_equal(draw_negatives(keys[:5, 1], hidden[:5], 30), negatives[: hidden[:5].sum()])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_are_a_pure_function_of_seed_epoch_and_sample(objective: str) -> None:
    config = config_of(objective).model
    six = samples(config, 6)
    collate = COLLATES[objective]
    first, again = collate(config, 1)(six), collate(config, 1)(six)
    other, later = collate(config, 2)(six), collate(config, 1)([replace(s, epoch=4) for s in six])
    name = "ids_mask" if objective == "mae" else "places"
    assert torch.equal(getattr(first, name), getattr(again, name))
    for different in (other, later):
        assert not torch.equal(getattr(first, name), getattr(different, name))


def test_temperature_follows_the_step() -> None:
    model: Any = network(config_of("wav2vec2").model)
    trainer: Any = SimpleNamespace(model=model, state=RunState(step=7))
    with pytest.raises(AttributeError):  # there is nothing to train here
        BaselineTrainer.step(trainer, [])
    assert model.step == 7
    for step, wanted in ((0, 2.0), (1000, 2 * 0.999995**1000), (277_258, 0.50000), (400_000, 0.5)):
        model.step = step
        assert model.temperature == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_heads_go_on_a_baselines_encoder(objective: str) -> None:
    config = config_of(objective).model
    torch.manual_seed(0)
    tuned = FineTuned(config, HeadConfig(outputs=5)).eval()
    assert tuned.student.state_dict().keys() == encoder(config).state_dict().keys()
    assert {f"student.{name}" for name in tuned.student.state_dict()} < network(config).state_dict().keys()
    inputs = torch.stack([s.inputs for s in samples(config, 4)])
    outputs = tuned(inputs)
    assert outputs.shape == ((4, config.positions, 5) if objective == "wav2vec2" else (4, 5))
    outputs.square().sum().backward()
    assert all(isinstance(p.grad, Tensor) for p in tuned.student.blocks.parameters())
    assert isinstance(tuned.student.blocks, nn.ModuleList)


@pytest.mark.parametrize(
    ("objective", "change", "told"),
    [
        ("mae", "model.objective=mea", "for image there are data2vec2, mae"),
        ("mae", "model.objective=mlm", "for image there are data2vec2, mae"),
        ("mae", "model.prenet_depth=1", "has main blocks alone"),
        ("mae", "model.num_masks=2", "sees a sample once"),
        ("mae", "model.mae.heads=5", "model.mae.width=24 does not divide"),
        ("mae", "model.extra_tokens=0", "has 1, its class token"),
        ("mae", "train.tensor_parallel=2", "layers of model.objective=mae are not split"),
        ("mae", "train.deepspeed=ds_configs/zero3.json", "is ZeRO 3"),
        ("mae", "optim.schedule=tri_stage", "cosine or linear"),
        ("wav2vec2", "model.mask.length=30", "have no room for two spans"),
        ("wav2vec2", "model.wav2vec2.groups=3", "model.wav2vec2.width=16 does not divide"),
        ("wav2vec2", "model.wav2vec2.temperature=[1, 2, 0.5]", "0 < least <= start"),
        ("mlm", "model.mlm.masked=0.95", "together 1 at most"),
        ("mlm", "model.mlm.mask_id=300", "is no id below 300"),
        ("mlm", "model.mask.inverse=true", "counts what is hidden"),
    ],
)
def test_what_cannot_be_is_one_line(objective: str, change: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as error:
        describe(config_of(objective, change), 2)
    assert told in str(error.value)


PUBLISHED = {
    "mae_base": (2.4e-3, (0.9, 0.95), 1e-8, 0.05, 12_480, "cosine", 0.75, 4096),  # He et al. 2021, table 8
    "wav2vec2_base": (5e-4, (0.9, 0.98), 1e-6, 0.01, 32_000, "linear", 0.65, 64 * 1_400_000),
    "roberta_base": (6e-4, (0.9, 0.98), 1e-6, 0.01, 24_000, "linear", 0.15, 8192),  # Liu et al. 2019, table 9
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_ones(name: str) -> None:
    config = load(ROOT / f"configs/pretrain/{name}.yaml")
    optim, model = config.optim, config.model
    found = (optim.lr, optim.betas, optim.eps, optim.weight_decay, optim.warmup_steps, optim.schedule)
    assert (*found, model.mask.prob, config.train.batch_size) == PUBLISHED[name]
    assert (model.width, model.heads, model.prenet_depth + model.depth, model.num_masks) == (768, 12, 12, 1)
    assert describe(config, 64).count("\n") == 4


@pytest.mark.parametrize(
    ("demo", "baseline"), [("image", "image_mae"), ("audio", "audio_wav2vec2"), ("text", "text_mlm")]
)
def test_demos_have_the_same_encoder_and_data(demo: str, baseline: str) -> None:
    ours, other = (load(ROOT / f"configs/pretrain/{name}_demo.yaml") for name in (demo, baseline))
    for name in ("modality", "width", "heads", "depth", "mlp_ratio", "norm_eps", "image", "audio", "text"):
        assert getattr(ours.model, name) == getattr(other.model, name), name
    assert ours.data == other.data
    views = [c.train.batch_size * (1 if demo == "audio" else c.model.num_masks) for c in (ours, other)]
    assert views[0] == views[1]
