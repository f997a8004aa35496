"""Costs computed before a run, against the published sizes and against counting what really runs."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.config import DecoderConfig, ImageConfig, ModelConfig, TargetConfig
from models.data2vec import Batch, Data2Vec
from models.fused import linear
from models.masks import draw_block_masks, row_keys
from pretrain.config import load
from pretrain.plan import parameter_counts, useful_work

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


@pytest.mark.parametrize(("preset", "tera"), [("image_base", 0.41), ("image_large", 1.70), ("image_huge14", 4.46)])
def test_work_of_the_presets(preset, tera):
    assert useful_work(load(CONFIGS / f"{preset}.yaml").model).total == pytest.approx(tera * 1e12, rel=0.02)


@pytest.fixture(autouse=True)
def plain_linear(monkeypatch):
    monkeypatch.setattr(linear, "AVAILABLE", False)  # torch's counter knows its own operators only


def counted(config, samples=2):
    """(forward, forward and backward) operations of one sample, by looking at every matrix product that runs."""
    keys = row_keys(1, np.zeros(samples), np.arange(samples), config.num_masks)
    pixels = torch.randn(samples, 3, config.image.size, config.image.size)
    batch = Batch(pixels, *draw_block_masks(config.mask, keys, config.grid_shape), tuple(range(samples)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention would recompute
        out = Data2Vec(config)(batch)
        forward = counter.get_total_flops()
        (out.regression + out.cls).backward()
    return forward / samples, counter.get_total_flops() / samples


@pytest.mark.parametrize("prenet", [0, 1])
def test_work_is_what_runs(prenet):
    """Exactly: the counter knows matrix products and convolutions, and so does the plan."""
    config = dataclasses.replace(TINY, prenet_depth=prenet)
    assert useful_work(config).total == counted(config)[1]


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
