"""The run's configuration: frozen dataclasses < YAML (differences only, one level of `base:`) < `a.b=c` overrides."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path

from models.baselines.config import DATA2VEC2
from models.config import RATE, ModelConfig, problems
from models.fused.kernels import Kernels
from models.split import split_problem
from pretrain.settings import ConfigError, build, read_tree


@dataclass(frozen=True)
class ImageDataConfig:
    """Crop area and aspect ratio are drawn from the two ranges. `draft`: a JPEG of which a crop has at least twice the
    pixels it needs, each way, is decoded at 1/2, 1/4 or 1/8, which is faster and changes pixels slightly."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    max_pixels: int = 178_956_970
    draft: bool = True


@dataclass(frozen=True)
class AudioDataConfig:
    """Shorter clips are left out. `pool` clips at a time are sorted by length and cut into batches, whose clips are
    cropped to the shortest, or to a `multiple` of waveform samples: on a CPU each new length costs half a step more."""

    min_seconds: float = 2.0
    pool: int = 4096
    multiple: int = 1


@dataclass(frozen=True)
class DataConfig:
    """`path`: images (class folders, a folder at any depth, tar shards, idx files), recordings (a folder at any depth,
    LibriSpeech's tree, a tab-separated manifest) or a tokenised corpus; or `fetch:NAME` for a data set that
    `pretrain.data.fetch` knows. Of recordings it may be several places, joined by `+`. The run stops when more than
    `max_failed_share` of the samples read could not be decoded (and more than ten, unless the share is 0)."""

    path: str = ""
    split: str = "train"
    workers: int = 4
    max_failed_share: float = 0.01
    image: ImageDataConfig = field(default_factory=ImageDataConfig)
    audio: AudioDataConfig = field(default_factory=AudioDataConfig)


@dataclass(frozen=True)
class OptimConfig:
    """Adam with decoupled decay, eps added before bias correction; `clip_norm` 0 switches clipping off. `schedule`: how
    the rate falls to 0, cosine or linear.

    `exempt_1d` spares 1-D parameters and biases the weight decay, as the paper means and its program does not do.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    exempt_1d: bool = True
    clip_norm: float = 4.0
    warmup_steps: int = 50_040
    schedule: str = "cosine"


@dataclass(frozen=True)
class EmaConfig:
    """The teacher's decay goes linearly from `start` to `end` over `anneal_steps` updates and stays there."""

    start: float = 0.9998
    end: float = 0.99999
    anneal_steps: int = 100_000


@dataclass(frozen=True)
class TrainConfig:
    """`batch_size` is global, whatever the ranks. `micro_batch` is a rank's share of one forward pass (None: all of its
    share); accumulation follows. Both count images, or blocks of text; for speech they bound the waveform samples of
    all clips together, and `micro_batch`, which decides which clips meet, has to be given. `precision`: fp32, bf16 or
    fp16. `deepspeed`: a JSON of mechanics. `tensor_parallel` ranks, neighbours, split every layer and see the same
    batches. `init_from`: a run, a checkpoint or a full form, whose weights a run without a checkpoint starts from.
    `kernels`: which implementation each fused layer, and the optimizer, takes. `recompute`: the student's blocks keep
    their input alone for the backward pass, which computes them again: less memory, a third more work. `compile`:
    blocks go through torch.compile."""

    steps: int = 375_300
    batch_size: int = 256
    micro_batch: int | None = None
    seed: int = 1
    precision: str = "bf16"
    deepspeed: str = "ds_configs/zero1.json"
    tensor_parallel: int = 1
    threads: int | None = None
    init_from: str = ""
    kernels: Kernels = field(default_factory=Kernels)
    recompute: bool = False
    compile: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how often it speaks. `keep_last` newest checkpoints stay, and each `keep_every`-th step
    (0: none)."""

    dir: str = ""
    log_every: int = 20
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0


@dataclass(frozen=True)
class WatchConfig:
    """The run stops if, after `after_steps`, a deviation falls under its minimum (docs/method.md 1.10); or at any time
    if the gradient norm rises over `max_grad_norm` or fp16's loss scale falls under `min_loss_scale` (0: not watched).

    A step over `slow_step` times the median of recent ones (0: not watched) and over `slow_seconds` has all ranks'
    stacks dumped; one over `hang_minutes` (0: not watched) ends the run, and so does a rank that has not been heard of
    for `silent_seconds` (docs/faults.md).
    """

    after_steps: int = 5000
    min_target_deviation: float = 0.0
    min_prediction_deviation: float = 0.0
    max_grad_norm: float = 0.0
    min_loss_scale: float = 0.0
    slow_step: float = 10.0
    slow_seconds: float = 30.0
    hang_minutes: float = 30.0
    silent_seconds: float = 40.0


@dataclass(frozen=True)
class ProbeConfig:
    """Every `every` steps (0: never) the teacher is probed: `samples` labelled training samples tell `test` test
    samples' classes, both evenly over classes, by the nearest `neighbours` and by ridge regression. They lie at `path`,
    or else at `data.path`. Probes behind the first take no more than `share` of the time: what would is skipped."""

    every: int = 0
    path: str = ""
    samples: int = 2000
    test: int = 1000
    share: float = 0.02
    neighbours: int = 10


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


class Settings(typing.Protocol):
    """What every kind of run has in its config."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def optim(self) -> OptimConfig: ...

    @property
    def run(self) -> RunConfig: ...

    @property
    def watch(self) -> WatchConfig: ...


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch falls on the data-parallel ranks: batch_size = ranks x micro_batch x accumulation."""

    ranks: int
    micro_batch: int
    accumulation: int


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The config of a YAML file with `a.b=c` overrides.

    Raises ConfigError, always one line, for a missing file, bad YAML, an unknown key (naming the nearest), a value of
    the wrong type, or numbers that do not fit together.
    """
    config = build(Config, read_tree(path, overrides), source=str(path))
    if not config.run.dir:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=default_folder(path)))
    check(config)
    return config


def default_folder(path: str | Path) -> str:
    """Of the run of a YAML file that names none."""
    return f"runs/{Path(path).stem}"


def check(config: Config) -> None:
    """Raises ConfigError naming every setting that cannot work."""
    rules = [
        (config.ema.anneal_steps >= 0, f"ema.anneal_steps={config.ema.anneal_steps} must be 0 or more"),
        (0 <= config.ema.start <= 1 and 0 <= config.ema.end <= 1, "ema.start and ema.end must lie in [0, 1]"),
    ]
    probe = config.probe
    rules += [
        (getattr(probe, name) >= least, f"probe.{name}={getattr(probe, name)} must be at least {least}")
        for name, least in (("every", 0), ("samples", 1), ("test", 1), ("neighbours", 1))
    ]
    rules.append(
        (config.optim.schedule in SCHEDULES, f"optim.schedule={config.optim.schedule!r}: {' or '.join(SCHEDULES)}")
    )
    rules.append((0 < probe.share <= 1, f"probe.share={probe.share} must lie in (0, 1]"))
    audio = config.data.audio
    if config.model.modality == "audio" and not problems(config.model):
        least = int(audio.min_seconds * RATE)
        frames = config.model.audio.frames(least - least % max(1, audio.multiple) or least)  # as PackSampler crops
        rules.append(
            (
                0 < config.model.mask.hidden(frames) < frames,
                f"data.audio.min_seconds={audio.min_seconds}: of {frames} frames none could be hidden or none be left",
            )
        )
        rules.append(
            (
                config.model.objective == DATA2VEC2 or frames > config.model.mask.length,
                f"data.audio.min_seconds={audio.min_seconds}: {frames} frames have no room for two spans of "
                f"model.mask.length={config.model.mask.length}",
            )
        )
    check_settings(config, rules)


def check_settings(config: Settings, more: typing.Sequence[tuple[bool, str]]) -> None:
    """Raises ConfigError naming every setting of any run that cannot work, and what of `more` rules does not hold."""
    found = problems(config.model)
    optim, train, data, run = config.optim, config.train, config.data, config.run
    image, audio, watch = data.image, data.audio, config.watch
    rules = [
        (0 < optim.lr < math.inf, f"optim.lr={optim.lr} must be positive and finite"),
        (all(0 <= b < 1 for b in optim.betas), f"optim.betas={optim.betas} must lie in [0, 1)"),
        (0 < optim.eps < math.inf, f"optim.eps={optim.eps} must be positive and finite"),
        (0 <= optim.weight_decay < math.inf, f"optim.weight_decay={optim.weight_decay} must be 0 or more, and finite"),
        (optim.warmup_steps >= 0, f"optim.warmup_steps={optim.warmup_steps} must be 0 or more"),
        (0 <= data.max_failed_share <= 1, f"data.max_failed_share={data.max_failed_share} must lie in [0, 1]"),
        (0 <= optim.clip_norm < math.inf, f"optim.clip_norm={optim.clip_norm} must be 0 (off) or positive, and finite"),
        (train.precision in PRECISIONS, f"train.precision={train.precision!r}: know {', '.join(PRECISIONS)}"),
        (train.steps >= 1 and train.batch_size >= 1, "train.steps and train.batch_size must be at least 1"),
        (0 <= train.seed < 2**63, f"train.seed={train.seed} must lie in [0, 2^63)"),
        (train.micro_batch is None or train.micro_batch >= 1, "train.micro_batch must be at least 1, or null"),
        (run.log_every >= 1 and run.save_every >= 1, "run.log_every and run.save_every must be at least 1"),
        (run.keep_last >= 1, f"run.keep_last={run.keep_last} must be at least 1"),
        (train.threads is None or train.threads >= 1, f"train.threads={train.threads} must be at least 1, or null"),
        (train.tensor_parallel >= 1, f"train.tensor_parallel={train.tensor_parallel} must be at least 1"),
        (data.workers >= 0, f"data.workers={data.workers} must be 0 or more"),
        (
            config.model.objective == DATA2VEC2 or not (train.recompute or train.compile),
            f"train.recompute and train.compile are for data2vec2's blocks, not for {config.model.objective}'s",
        ),
        (
            0 < image.crop_scale[0] <= image.crop_scale[1] <= 1,
            f"data.image.crop_scale={image.crop_scale}: 0 < low <= high <= 1",
        ),
        (0 < image.crop_ratio[0] <= image.crop_ratio[1], f"data.image.crop_ratio={image.crop_ratio}: 0 < low <= high"),
        (0 <= image.flip <= 1, f"data.image.flip={image.flip} must lie in [0, 1]"),
        (image.max_pixels >= 1, f"data.image.max_pixels={image.max_pixels} must be at least 1"),
        (watch.slow_step >= 0 and watch.hang_minutes >= 0, "watch.slow_step and watch.hang_minutes must be 0 or more"),
        (watch.slow_seconds > 0, f"watch.slow_seconds={watch.slow_seconds} must be positive"),
        (watch.silent_seconds > 0, f"watch.silent_seconds={watch.silent_seconds} must be positive"),
        (audio.pool >= 1 and audio.multiple >= 1, "data.audio.pool and data.audio.multiple must be at least 1"),
        *more,
    ]
    if config.model.modality == "audio" and not found:
        shortest, longest = audio.min_seconds, config.model.audio.seconds
        rules += [
            (shortest <= longest, f"data.audio.min_seconds={shortest} is longer than model.audio.seconds={longest}"),
            (
                train.micro_batch is not None and train.micro_batch >= config.model.length,
                f"train.micro_batch={train.micro_batch} must be given for speech, in waveform samples, at least "
                f"{config.model.length} for a clip of model.audio.seconds={longest}",
            ),
        ]
    found += [sentence for ok, sentence in rules if not ok]
    if found:
        raise ConfigError("; ".join(found))
    if unsplit := split_problem(config.model, train.tensor_parallel):
        raise ConfigError(unsplit)


PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "linear")


def batch_plan(train: TrainConfig, ranks: int) -> BatchPlan:
    """Splits the global batch over `ranks` of which `train.tensor_parallel` at a time share their part; raises
    ConfigError, naming what would divide, if it does not."""
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks cannot train anything; at least 1")
    ranks = data_ranks(ranks, train.tensor_parallel)
    if train.batch_size % ranks:
        near = nearest_divisors(train.batch_size, ranks, 4)
        raise ConfigError(
            f"train.batch_size={train.batch_size} does not divide over {ranks} ranks; "
            f"{', '.join(map(str, near))} ranks would, or a batch of {max(1, round(train.batch_size / ranks)) * ranks}"
        )
    share = train.batch_size // ranks
    micro = train.micro_batch or share
    if share % micro:
        sizes = nearest_divisors(share, micro, 8)
        raise ConfigError(
            f"train.micro_batch={micro} does not divide a rank's share of {share} "
            f"({train.batch_size} over {ranks} ranks); these do: {', '.join(map(str, sizes))}"
        )
    return BatchPlan(ranks, micro, share // micro)


def data_ranks(ranks: int, tensor_ranks: int) -> int:
    """How many shares of a batch there are; raises ConfigError if groups of `tensor_ranks` leave some `ranks` over."""
    if ranks % tensor_ranks:
        fit = nearest_divisors(ranks, tensor_ranks, 8)
        raise ConfigError(
            f"train.tensor_parallel={tensor_ranks} does not divide {ranks} ranks; {', '.join(map(str, fit))} would"
        )
    return ranks // tensor_ranks


def nearest_divisors(number: int, to: int, count: int) -> list[int]:
    """At most `count` divisors of `number`, those nearest to `to`, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted(sorted({*low, *(number // d for d in low)}, key=lambda d: abs(d - to))[:count])
