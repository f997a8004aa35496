"""What a run will cost, computed before it starts: parameters, batch arithmetic, matrix work, memory of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from models.config import ModelConfig
from models.data2vec import Data2Vec
from pretrain.config import BatchPlan, Config, batch_plan
from pretrain.eager import shapes_only
from pretrain.engine import read_mechanics
from pretrain.layout import Group, Zero, groups

GIB = 2**30


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products for one sample with its M masks; backward counts twice forward."""

    local: float
    teacher: float
    student: float  # forward and backward
    decoder: float  # forward and backward
    blocks: float  # what of teacher and student tensor parallelism splits; all else every rank computes

    @property
    def total(self) -> float:
        return self.local + self.teacher + self.student + self.decoder


def useful_work(config: ModelConfig) -> Work:
    """The matrix work that the method needs, with nothing recomputed: what speed is measured against."""
    width, t, m = config.width, config.positions, config.num_masks
    hidden = config.mask.hidden(t)
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
    teacher, student = encoder(t + config.extra_tokens), 3 * m * encoder(visible_tokens(config))
    return Work(
        2 * local.first + 3 * local.others,
        teacher + local.teacher + local.positions,
        student + 3 * m * local.positions,
        3 * m * (sum(convolutions) + 2 * hidden * into),
        teacher + student,
    )


def visible_tokens(config: ModelConfig) -> int:
    """What the student's blocks see of one masked view."""
    return config.positions - config.mask.hidden(config.positions) + config.extra_tokens


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
    """Bytes on one rank. The first four are exact: what is held when it is most, after the last backward pass or, of
    stage 1's gradients, before they are reduced. The others come and go, and are estimates.

    `host` is what of the four lies in the host's memory. `buffers` is what gradients are reduced in, `copies` what is
    gathered of partitioned weights, or cast of them, while a micro-step runs, `stepping` what the optimizer's step
    makes of the gradients, when activations and copies are gone.
    """

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    host: float
    buffers: float
    copies: float
    stepping: float
    activations: float

    @property
    def states(self) -> float:
        """What stays on the device."""
        return self.weights + self.gradients + self.optimizer + self.teacher - self.host

    @property
    def total(self) -> float:
        return self.states + max(self.activations + self.buffers + self.copies, self.stepping)


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Student, decoder and teacher, without allocating them."""
    with shapes_only():
        model = Data2Vec(config)
    return {
        name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("student", "decoder", "teacher")
    }


def element_size(precision: str, stage: int) -> int:
    """Bytes of a weight and of its gradient. Stage 0 computes in bf16 with fp32 weights (`pretrain.engine`)."""
    return 4 if precision == "fp32" or (precision == "bf16" and stage == 0) else 2


def memory(config: Config, plan: BatchPlan, zero: Zero, rank: int | None = None) -> Memory:
    """What data-parallel `rank` holds, or the rank that holds most: the first four within 5% (`benchmarks.memory`),
    activations to about a tenth."""
    layout = groups(config)
    held = _unsharded if zero.stage == 0 else _partitioned if zero.stage == 3 else _flat
    every = range(plan.ranks) if rank is None else [rank]
    low = element_size(config.train.precision, zero.stage)
    computed = 4 if config.train.precision == "fp32" else 2
    states = held(layout, low, plan, zero, every)
    if config.train.precision == "bf16" and zero.stage == 0:  # autocast's, kept for the backward pass
        states["copies"] = 2 * sum(group.total for group in layout)
    values = computed * saved_values(config.model, config.train.tensor_parallel) + dropout_masks(config.model)
    return Memory(**states, activations=samples(config.model, plan.micro_batch) * values)


def _unsharded(
    layout: Sequence[Group], low: int, plan: BatchPlan, zero: Zero, every: Sequence[int]
) -> dict[str, float]:
    """fp16 keeps masters, and makes fp32 gradients of all of them for a step."""
    trained, teacher = (sum(group.total for group in which) for which in _both(layout))
    masters, average = (4 * trained, 4 * teacher) if low == 2 else (0, 0)
    return {
        "weights": low * trained,
        "gradients": low * trained,
        "optimizer": masters + 8 * trained,
        "teacher": low * teacher + average,
        "host": 0,
        "buffers": 0,
        "copies": 0,
        "stepping": masters,
    }


def _flat(layout: Sequence[Group], low: int, plan: BatchPlan, zero: Zero, every: Sequence[int]) -> dict[str, float]:
    """Stages 1 and 2: flat buffers of weights, and of the teacher's; shards of masters, moments and averages.

    Stage 1 has all gradients until they are reduced; stage 2 those of the parameters that a shard touches, whole, so
    that a large table weighs on every rank that has some of it.
    """
    ranks = plan.ranks
    trained, teacher = (sum(group.flat(ranks) for group in which) for which in _both(layout))
    shard, largest = trained // ranks, max(max(group.sizes) for group in layout)
    touched = max(sum(group.touched(ranks, rank) for group in layout) for rank in every)
    average = 4 * teacher / ranks if low == 2 or zero.offload else 0  # in fp32 it is a view of the teacher's buffer
    gradients = low * (sum(group.total for group in layout) if zero.stage == 1 else 0 if zero.offload else touched)
    host: float = 0
    if zero.offload:  # masters, moments, their fp32 gradients and averages; weights and gradients in transit
        accumulated = touched if zero.stage == 2 and plan.accumulation > 1 else 0
        transit = low * (shard + largest + accumulated) + 4 * shard
        host = 12 * shard + transit + average
        gradients += transit + low * largest
    group = max(group.flat(ranks) // ranks for group in layout)
    return {
        "weights": low * trained,
        "gradients": gradients,
        "optimizer": 12 * shard,
        "teacher": low * teacher + average,
        "host": host,
        "buffers": low * zero.reduce_bucket * zero.buckets,
        "copies": 0,
        "stepping": 0 if zero.offload else (4 if low == 4 else 4 + low) * group,
    }


def _partitioned(
    layout: Sequence[Group], low: int, plan: BatchPlan, zero: Zero, every: Sequence[int]
) -> dict[str, float]:
    """Stage 3: partitions of everything, and whole what is small. What the backward pass soon needs again stays
    gathered after the forward pass."""
    ranks = plan.ranks
    trained, teacher = (sum(group.partition(ranks) for group in which) for which in _both(layout))
    small, gathered = gathered_at_stage3(layout, zero, ranks)
    average = 4 * teacher if low == 2 or zero.offload else 0  # in fp32 the teacher's partitions are views of it
    transit = (4 + low) * trained if zero.offload else 0
    group = min(max(group.partition(ranks) for group in layout), zero.sub_group)
    return {
        "weights": low * (trained + small),
        "gradients": transit or low * trained,
        "optimizer": 12 * trained,
        "teacher": low * teacher + average,
        "host": 12 * trained + transit + average if zero.offload else 0,
        "buffers": low * zero.reduce_bucket,
        "copies": low * gathered,
        "stepping": low * zero.reduce_bucket + (0 if zero.offload else (4 if low == 4 else 4 + low) * group),
    }


def _both(layout: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """What is trained, and what of it the teacher averages."""
    return list(layout), [group for group in layout if group.tracked]


def gathered_at_stage3(layout: Sequence[Group], zero: Zero, ranks: int) -> tuple[int, int]:
    """Elements of trained parameters that stay gathered for good, and that are gathered at most besides: those that
    come again within the reuse distance, and what is fetched ahead. With one rank nothing is."""
    if ranks == 1:
        return 0, 0
    sizes = [size for group in layout for size in group.sizes]
    small = sum(size for size in sizes if size <= zero.persistence)
    large = sum(sizes) - small
    return small, min(large, zero.reuse // 2 + zero.prefetch)


def samples(config: ModelConfig, amount: int) -> int:
    """How many of the largest samples `amount` of a batch size is: itself, or for speech so many waveform samples."""
    return max(1, amount // config.sample_size)


def saved_values(config: ModelConfig, tensor_parallel: int = 1) -> float:
    """Numbers that one rank keeps for the backward pass of one sample with its masks, by torch's operators; kernels
    keep less: a third of a decoder layer, and of a layer of positions or of a waveform, is made again."""
    width, t, m = config.width, config.positions, config.num_masks
    hidden = config.mask.hidden(t)
    tokens = m * visible_tokens(config)
    local = LOCAL_WORK[config.modality](config).saved
    # A convolution of the positions keeps what one of the decoder does.
    positions = 3 * m * t * width * config.audio.position_layers if config.modality == "audio" else 0
    # A block keeps: its input (qkv's), q, k, v, attention's output, the sum into norm1, norm1's output, the hidden
    # layer before and after GELU, the sum into norm2. Half of the eight are split over tensor-parallel ranks.
    block = tokens * width * (4 + (4 + 2 * config.mlp_ratio) / tensor_parallel)
    # A decoder layer keeps: its input, the convolution's output and the normalised values.
    decoder = m * t * config.decoder.width * 3 * config.decoder.layers
    if last_at_hidden(config):  # windows for the input, and all else at hidden positions
        decoder += m * config.decoder.width * (hidden * (config.decoder.kernel + 2) - 3 * t)
    ends = local + positions + m * hidden * (config.decoder.width + 3 * width)
    return (config.prenet_depth + config.depth) * block + decoder + ends


def dropout_masks(config: ModelConfig) -> float:
    """Bytes kept for the backward pass of one sample with its masks, one for every value that may be dropped; what
    attention drops is drawn again, and by kernels all is."""
    tokens = config.num_masks * visible_tokens(config)
    places = (config.dropout.residual > 0) + (config.dropout.mlp > 0)
    return (config.prenet_depth + config.depth) * places * tokens * config.width


def describe(config: Config, ranks: int) -> str:
    """The text of --dry-run."""
    plan = batch_plan(config.train, ranks)
    zero = Zero.of(read_mechanics(config.train.deepspeed))
    counts, work, use = parameter_counts(config.model), useful_work(config.model), memory(config, plan, zero)
    model, train = config.model, config.train
    batch = samples(model, train.batch_size)
    unit = (
        model.unit
        if model.sample_size == 1
        else f"waveform samples, {batch} {model.unit} of {model.audio.seconds:g} s,"
    )
    hidden = model.mask.hidden(model.positions)
    trained = counts["student"] + counts["decoder"]
    shared = "ranks" if train.tensor_parallel == 1 else f"groups of {train.tensor_parallel} ranks"
    lines = [
        f"parameters   {trained / 1e6:.2f} M trained (student {counts['student'] / 1e6:.2f} M, decoder "
        f"{counts['decoder'] / 1e6:.2f} M); teacher {counts['teacher'] / 1e6:.2f} M, averaged",
        f"masks        {model.num_masks} a sample: {model.positions} positions, {model.positions - hidden} seen, "
        f"{hidden} predicted",
        f"batch        {train.batch_size} {unit} = {plan.ranks} {shared} x {plan.micro_batch} x {plan.accumulation} "
        f"accumulated; {batch * model.num_masks} masked views a step",
        f"run          {train.steps:,} steps, {train.steps * batch:,} {model.unit}",
        f"matrix work  {work.total / 1e12:.3g} TFLOP a sample, {work.total * batch / 1e12:.3g} a step, "
        f"{work.total * batch * train.steps / 1e18:.3g} EFLOP in all",
        f"memory       {use.total / GIB:.2f} GiB a rank at ZeRO {zero.stage}, {train.precision}: weights "
        f"{use.weights / GIB:.2f}, gradients {use.gradients / GIB:.2f}, optimizer {use.optimizer / GIB:.2f}, teacher "
        f"{use.teacher / GIB:.2f}" + (f", of these {use.host / GIB:.2f} in the host's memory" if use.host else ""),
        f"             and in a step {(use.total - use.states) / GIB:.2f} (estimate): activations "
        f"{use.activations / GIB:.2f}, reduce buckets {use.buffers / GIB:.2f}, gathered or cast weights "
        f"{use.copies / GIB:.2f}, or after them the optimizer's {use.stepping / GIB:.2f}",
    ]
    lines.append(f"checkpoints  every {config.run.save_every} steps into {config.run.dir}/checkpoints/step_*")
    return "\n".join(lines)
