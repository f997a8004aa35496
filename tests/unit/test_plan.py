"""Costs computed before a run, against the published sizes and against counting what really runs."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import encoder
from models.config import (
    AudioConfig,
    DecoderConfig,
    DropoutConfig,
    ImageConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TargetConfig,
    TextConfig,
)
from models.data2vec import Batch, Data2Vec
from models.fused import linear, taps
from models.fused.attention import plain_attention
from models.masks import draw_block_masks, row_keys
from pretrain.config import load
from pretrain.plan import parameter_counts, saved_values, useful_work

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
TINY = ModelConfig(
    width=64,
    heads=4,
    prenet_depth=1,
    depth=3,
    num_masks=3,
    image=ImageConfig(size=24, patch=4),
    decoder=DecoderConfig(width=32, groups=1, kernel=5, layers=2),
    targets=TargetConfig(top_k_layers=2),
)
AUDIO = dataclasses.replace(
    TINY,
    modality="audio",
    extra_tokens=0,
    audio=AudioConfig(seconds=0.5, channels=16, position_groups=1),
    mask=MaskConfig(0.5, 0.05, 5, False),
    loss=LossConfig(cls=0),
)
TEXT = dataclasses.replace(
    AUDIO,
    modality="text",
    prenet_depth=0,
    text=TextConfig(50, 24),
    mask=MaskConfig(0.48, 0, 1, True),
    decoder=DecoderConfig(32, 1, 9, 2, False, 2),
)


@pytest.mark.parametrize(("preset", "tera"), [("image_base", 0.41), ("image_large", 1.70), ("image_huge14", 4.46)])
def test_work_of_the_presets(preset, tera):
    assert useful_work(load(CONFIGS / f"{preset}.yaml").model).total == pytest.approx(tera * 1e12, rel=0.02)


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    monkeypatch.setattr(linear, "FASTER", False)  # torch's counter knows its own operators only
    monkeypatch.setattr(taps, "applicable", lambda conv, x: False)


def random_batch(config, samples):
    keys = row_keys(1, np.zeros(samples), np.arange(samples), config.num_masks)
    shapes = {"image": (3, config.length, config.length)}
    inputs = torch.randn(samples, *shapes.get(config.modality, (config.length,)))
    if config.modality == "text":
        inputs = torch.randint(4, config.text.vocabulary, inputs.shape)
    return Batch(inputs, *draw_block_masks(config.mask, keys, config.grid_shape), tuple(range(samples)))


def counted(config, samples=2):
    """(forward, forward and backward) operations of one sample, by looking at every matrix product that runs."""
    batch = random_batch(config, samples)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention would recompute
        out = Data2Vec(config)(batch)
        forward = counter.get_total_flops()
        (out.regression + out.cls).backward()
    return forward / samples, counter.get_total_flops() / samples


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, prenet_depth=0), AUDIO, TEXT])
def test_work_is_what_runs(config, monkeypatch):
    """Exactly: the counter knows matrix products and convolutions, and so does the plan."""
    monkeypatch.setattr(encoder, "attention", lambda qkv, bias, *dropout: plain_attention(qkv, bias))
    assert useful_work(config).total == counted(config)[1]


@pytest.mark.parametrize(
    "preset", ["image_base", "image_large", "audio_base", "audio_large", "text_base", "text_large"]
)
def test_activations_are_what_autograd_keeps(preset):
    """A quarter of the width and fewer blocks, the rest as published; one element of every storage kept counts."""
    config = load(CONFIGS / f"{preset}.yaml", ["model.audio.seconds=2", "model.audio.channels=128"]).model
    decoder = dataclasses.replace(config.decoder, width=config.decoder.width // 4)
    small = {"width": config.width // 4, "heads": 4, "depth": 4, "num_masks": 2, "decoder": decoder}
    targets = dataclasses.replace(config.targets, top_k_layers=2)
    config = dataclasses.replace(config, **small, targets=targets, dropout=DropoutConfig())
    net, storages = Data2Vec(config), {}
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = []  # as autograd would, so that no address is used twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(random_batch(config, 1))
    assert 4 * saved_values(config) == pytest.approx(sum(storages.values()), rel=0.1)


def test_forward_work_of_grouped_convolutions():
    """torch's counter ignores groups in a convolution's backward, so that only forward can be compared."""
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, groups=4))
    work = useful_work(config)
    patch = work.local / 2  # forward of the student's patch embedding
    assert counted(config)[0] == patch + work.teacher + (work.student + work.decoder) / 3


@pytest.mark.parametrize("preset", ["image_base", "image_large", "image_huge14"])
def test_parameters_by_hand(preset):
    model = load(CONFIGS / f"{preset}.yaml").model
    d, w, k = model.width, model.decoder.width, model.decoder.kernel
    block = 3 * d * d + 3 * d + d * d + d + 4 * d + 8 * d * d + 5 * d  # qkv, projection, two norms, MLP
    patches = 3 * model.image.patch**2 * d + d
    student = d + patches + 2 * d + (model.prenet_depth + model.depth) * block
    widths = [d] + [w] * model.decoder.layers
    decoder = sum(a * b // model.decoder.groups * k * k + b for a, b in pairwise(widths)) + w * d + d
    assert parameter_counts(model) == {"student": student, "decoder": decoder, "teacher": student}
