"""What a run will cost, computed before it starts: parameters, batch arithmetic, matrix work, memory of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from models.config import ModelConfig
from models.data2vec import Data2Vec
from pretrain.config import BatchPlan, Config, batch_plan
from pretrain.engine import read_mechanics

GIB = 2**30


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products for one sample with its M masks; backward counts twice forward."""

    local: float
    teacher: float
    student: float  # forward and backward
    decoder: float  # forward and backward

    @property
    def total(self) -> float:
        return self.local + self.teacher + self.student + self.decoder


def useful_work(config: ModelConfig) -> Work:
    """The matrix work that the method needs, with nothing recomputed: what speed is measured against."""
    width, t, m = config.width, config.positions, config.num_masks
    hidden = config.mask.hidden(t)
    visible = t - hidden + config.extra_tokens
    blocks = config.prenet_depth + config.depth

    def encoder(tokens: int) -> float:
        linear = 2 * tokens * width**2 * (4 + 2 * config.mlp_ratio)
        return blocks * (linear + 4 * tokens**2 * width)

    decoder = config.decoder
    widths = [width] + [decoder.width] * decoder.layers
    taps = decoder.kernel ** len(config.grid_shape) / decoder.groups
    convolutions = [2 * t * a * b * taps for a, b in pairwise(widths)]
    if last_at_hidden(config):
        convolutions[-1] *= hidden / t
    into = widths[-1] * width
    if decoder.projection_layers == 2:
        into = 2 * widths[-1] * (widths[-1] + width)
    local = LOCAL_WORK[config.modality](config)
    # No gradient is needed with respect to inputs: the first layer counts twice, not thrice.
    return Work(
        2 * local.first + 3 * local.others,
        encoder(t + config.extra_tokens) + local.teacher + local.positions,
        3 * m * (encoder(visible) + local.positions),
        3 * m * (sum(convolutions) + 2 * hidden * into),
    )


def last_at_hidden(config: ModelConfig) -> bool:
    """Whether the decoder's last convolution is a matrix product at hidden positions (`models.convolution`)."""
    return config.decoder.layers > 0 and config.decoder.groups == 1 and len(config.grid_shape) == 1


class LocalWork(NamedTuple):
    """Forward work before the blocks, for one sample: the student's first layer and its others, a local encoder of the
    teacher's own, and positions, where convolutions make them, for one view. `saved`: numbers that the student's local
    encoder keeps for the backward pass."""

    first: float
    others: float = 0.0
    teacher: float = 0.0
    positions: float = 0.0
    saved: float = 0.0


def image_work(config: ModelConfig) -> LocalWork:
    patch = 2 * config.positions * config.image.channels * config.image.patch**2 * config.width
    return LocalWork(patch, teacher=patch, saved=config.image.channels * config.image.size**2)


def audio_work(config: ModelConfig) -> LocalWork:
    audio, t = config.audio, config.length
    layers, channels, saved = [], 1, t
    for kernel, stride in zip(audio.kernels, audio.strides, strict=True):
        t = (t - kernel) // stride + 1
        layers.append(2 * t * channels * audio.channels * kernel)
        channels = audio.channels
        saved += 3 * t * channels  # the convolution's output, normalised, after GELU
    projection = 2 * t * channels * config.width
    taps = audio.position_kernel / audio.position_groups
    positions = audio.position_layers * 2 * t * config.width**2 * taps
    return LocalWork(layers[0], sum(layers[1:]) + projection, positions=positions, saved=saved + t * channels)


def text_work(config: ModelConfig) -> LocalWork:
    return LocalWork(0.0, saved=config.positions * config.width)  # rows of tables, normalised


LOCAL_WORK = {"image": image_work, "audio": audio_work, "text": text_work}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Student, decoder and teacher, without allocating them."""
    with torch.device("meta"):
        model = Data2Vec(config)
    return {
        name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("student", "decoder", "teacher")
    }


def memory(config: Config, plan: BatchPlan, stage: int) -> Memory:
    """An estimate for one rank, by ZeRO stage and precision; activations to about a tenth."""
    counts = parameter_counts(config.model)
    trained = counts["student"] + counts["decoder"]
    low = 2 if config.train.precision != "fp32" and not (stage == 0 and config.train.precision == "bf16") else 4
    shards = plan.ranks if stage >= 1 else 1
    masters = 0 if stage == 0 and low == 4 else 4 * trained / shards
    average = 0 if low == 4 else 4 * counts["teacher"] / shards
    return Memory(
        weights=low * (trained + counts["teacher"]) / (plan.ranks if stage >= 3 else 1),
        gradients=low * trained / (plan.ranks if stage >= 2 else 1),
        optimizer=masters + 8 * trained / shards,
        teacher=average,
        activations=samples(config.model, plan.micro_batch)
        * ((2 if config.train.precision != "fp32" else 4) * saved_values(config.model) + dropout_masks(config.model)),
    )


def samples(config: ModelConfig, amount: int) -> int:
    """How many of the largest samples `amount` of a batch size is: itself, or for speech so many waveform samples."""
    return max(1, amount // config.sample_size)


def saved_values(config: ModelConfig) -> float:
    """Numbers kept for the backward pass of one sample with its masks."""
    width, t, m = config.width, config.positions, config.num_masks
    hidden = config.mask.hidden(t)
    tokens = m * (t - hidden + config.extra_tokens)
    local = LOCAL_WORK[config.modality](config).saved
    # A convolution of the positions keeps what one of the decoder does.
    positions = 3 * m * t * width * config.audio.position_layers if config.modality == "audio" else 0
    # A block keeps: its input (qkv's), q, k, v, attention's output, the sum into norm1, norm1's output, the hidden
    # layer before and after GELU, the sum into norm2.
    block = tokens * width * (8 + 2 * config.mlp_ratio)
    # A decoder layer keeps: its input, the convolution's output and the normalised values.
    decoder = m * t * config.decoder.width * 3 * config.decoder.layers
    if last_at_hidden(config):  # windows for the input, and all else at hidden positions
        decoder += m * config.decoder.width * (hidden * (config.decoder.kernel + 2) - 3 * t)
    ends = local + positions + m * hidden * (config.decoder.width + 3 * width)
    return (config.prenet_depth + config.depth) * block + decoder + ends


def dropout_masks(config: ModelConfig) -> float:
    """Bytes kept for the backward pass of one sample with its masks, one for every value that may be dropped; what
    attention drops is drawn again."""
    tokens = config.num_masks * (config.positions - config.mask.hidden(config.positions) + config.extra_tokens)
    places = (config.dropout.residual > 0) + (config.dropout.mlp > 0)
    return (config.prenet_depth + config.depth) * places * tokens * config.width


def describe(config: Config, ranks: int) -> str:
    """The text of --dry-run."""
    plan = batch_plan(config.train, ranks)
    stage = read_mechanics(config.train.deepspeed).get("zero_optimization", {}).get("stage", 0)
    counts, work, use = parameter_counts(config.model), useful_work(config.model), memory(config, plan, stage)
    model, train = config.model, config.train
    batch = samples(model, train.batch_size)
    unit = (
        model.unit
        if model.sample_size == 1
        else f"waveform samples, {batch} {model.unit} of {model.audio.seconds:g} s,"
    )
    hidden = model.mask.hidden(model.positions)
    trained = counts["student"] + counts["decoder"]
    lines = [
        f"parameters   {trained / 1e6:.2f} M trained (student {counts['student'] / 1e6:.2f} M, decoder "
        f"{counts['decoder'] / 1e6:.2f} M); teacher {counts['teacher'] / 1e6:.2f} M, averaged",
        f"masks        {model.num_masks} a sample: {model.positions} positions, {model.positions - hidden} seen, "
        f"{hidden} predicted",
        f"batch        {train.batch_size} {unit} = {plan.ranks} ranks x {plan.micro_batch} x {plan.accumulation} "
        f"accumulated; {batch * model.num_masks} masked views a step",
        f"run          {train.steps:,} steps, {train.steps * batch:,} {model.unit}",
        f"matrix work  {work.total / 1e12:.3g} TFLOP a sample, {work.total * batch / 1e12:.3g} a step, "
        f"{work.total * batch * train.steps / 1e18:.3g} EFLOP in all",
        f"memory       {use.total / GIB:.2f} GiB a rank at ZeRO {stage}, {train.precision} (estimate): weights "
        f"{use.weights / GIB:.2f}, gradients {use.gradients / GIB:.2f}, optimizer {use.optimizer / GIB:.2f}, teacher "
        f"average {use.teacher / GIB:.2f}, activations {use.activations / GIB:.2f}",
    ]
    lines.append(f"checkpoints  every {config.run.save_every} steps into {config.run.dir}/checkpoints/step_*")
    return "\n".join(lines)
