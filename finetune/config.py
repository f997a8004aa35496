"""The configuration of a fine-tuning run: the sections of pre-training's, a head, an evaluation, and the task's own."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.config import HeadConfig, ModelConfig
from pretrain import full
from pretrain.checkpoint import latest
from pretrain.config import SCHEDULES as FALLING
from pretrain.config import (
    DataConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    WatchConfig,
    check_settings,
    default_folder,
)
from pretrain.data.tables import Columns
from pretrain.settings import ConfigError, build, merge, read_tree, to_tree


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """Training learns from `split`. Of it, `labels` samples, evenly over classes, or `minutes` of speech, drawn by
    `train.seed` (None: all)."""

    labels: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class FineTuningOptimConfig(OptimConfig):
    """`schedule`: cosine, linear (both to 0) or tri_stage (`hold` of the steps at the peak, then exponentially to
    `final_scale` of it). `layer_decay`: the rate of block i of n, counted from 1, is multiplied by it n + 1 - i times,
    the head's by `head_scale`. Only the head learns before step `freeze_steps`; a waveform's convolutions never do with
    `freeze_local`."""

    hold: float = 0.4
    final_scale: float = 0.05
    layer_decay: float = 1.0
    head_scale: float = 1.0
    freeze_steps: int = 0
    freeze_local: bool = False


@dataclass(frozen=True)
class ImageTaskConfig:
    """What training images go through on the device, behind crop and flip (finetune/augment.py): RandAugment with
    `operations` at `magnitude` (of 10) and its deviation, `erase` the probability of random erasing, `mixup` and
    `cutmix` the parameters of their Beta distributions (0: off), `mix_prob` and `switch_prob` how often micro-batches
    are mixed and how often by CutMix; `smoothing` of labels. Evaluations see the middle of images, `crop_share` of
    their shorter side."""

    operations: int = 0
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.0
    crop_share: float = 1.0


@dataclass(frozen=True)
class SpeechTaskConfig:
    """`held_out`: where the evaluated splits lie, if not at `data.path`. `language`: of data sets that have several.
    Transcripts are spelt in lower or upper `case`, or kept as they are, without `punctuation` unless it is kept.
    Training hides spans of frames and of channels, as many as would cover a share `*_prob` if none overlapped."""

    held_out: str = ""
    language: str = ""
    case: str = "lower"
    punctuation: bool = False
    frame_prob: float = 0.65
    frame_length: int = 10
    channel_prob: float = 0.25
    channel_length: int = 64


@dataclass(frozen=True)
class EvalConfig:
    """Every `every` steps (0: none) and after the last one, the network is evaluated on `splits`, `batch_size` samples
    at a time over all ranks; the first of them says which checkpoint is the best."""

    every: int = 0
    splits: tuple[str, ...] = ("test",)
    batch_size: int = 256


@dataclass(frozen=True)
class TextTaskConfig:
    """`task`: one of GLUE, whose public files lie in `data.path` or in the folder of its name there. Else the tables
    there have `columns`, of fields that may be `quoted`, and `kind` says whether labels are classes or a number;
    `range` is what the network learns as 0 and as 1 of that (None: the least and the greatest of training). Texts are
    cut to `max_tokens` (None: to what the model takes). `tokenizer`: a file, where `train.init_from` brings none."""

    task: str = ""
    columns: Columns = field(default_factory=Columns)
    quoted: bool = False
    kind: str = "classes"
    range: tuple[float, float] | None = None
    max_tokens: int | None = None
    tokenizer: str = ""


@dataclass(frozen=True)
class Config:
    """`model` is that of `train.init_from`, where it is given, but for what the YAML says otherwise; positions follow
    another `model.image.size` by themselves. `which` of its encoders the weights come from: student or teacher."""

    task: str = "image"
    which: str = "student"
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    image: ImageTaskConfig = field(default_factory=ImageTaskConfig)
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    optim: FineTuningOptimConfig = field(default_factory=FineTuningOptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    speech: SpeechTaskConfig = field(default_factory=SpeechTaskConfig)
    text: TextTaskConfig = field(default_factory=TextTaskConfig)
    run: RunConfig = field(default_factory=RunConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)


TASKS = {"image": "image", "speech": "audio", "text": "text"}  # and their modalities
GLUE = ("CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B")
CLASSES, NUMBER = "classes", "number"  # kinds of labels
SCHEDULES = (*FALLING, "tri_stage")
CASES = ("lower", "upper", "keep")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with `a.b=c` overrides, over the model of what it is to start from.

    Raises ConfigError or CheckpointError, always one line.
    """
    tree = read_tree(path, overrides)
    start = _known(tree, path)
    known = full.model_of(full.settings(start)) if start else None
    if known:
        wanted = TASKS.get(str(tree.get("task", Config.task)), known.modality)
        if known.modality != wanted:
            raise ConfigError(
                f"train.init_from={start} is a model of {known.modality}; this task needs one of {wanted}"
            )
        tree["model"] = merge(to_tree(known), tree.get("model") or {})
    config = build(Config, tree, source=str(path))
    image = config.model.image
    if known and config.model.modality == "image" and image.grid != known.image.grid and not image.positions:
        config = replace(config, model=replace(config.model, image=replace(image, positions=known.image.grid)))
    if not config.run.dir:
        config = replace(config, run=replace(config.run, dir=default_folder(path)))
    check(config)
    return config


def _known(tree: Mapping[str, typing.Any], path: str | Path) -> str:
    """What the model's settings come from: a run that has begun has its own, and needs its start no more."""
    train, run = (found if isinstance(found := tree.get(key), dict) else {} for key in ("train", "run"))
    start = train.get("init_from")
    if not start or isinstance(start, list | dict):
        return ""
    own = str(run.get("dir") or default_folder(path))
    return own if latest(Path(own) / "checkpoints") else str(start)


def check(config: Config) -> None:
    """Raises ConfigError naming every setting that cannot work."""
    if config.task not in TASKS:
        raise ConfigError(f"task={config.task!r}: know {', '.join(TASKS)}")
    data, optim, evaluation = config.data, config.optim, config.eval
    image, speech = config.image, config.speech
    check_settings(
        typing.cast(typing.Any, config),
        [
            (
                config.model.modality == TASKS[config.task],
                f"task={config.task} needs model.modality={TASKS[config.task]}, not {config.model.modality}",
            ),
            (config.which in full.WHICH, f"which={config.which!r}: know {', '.join(full.WHICH)}"),
            (data.labels is None or data.labels >= 1, f"data.labels={data.labels} must be at least 1, or null"),
            (data.minutes is None or data.minutes > 0, f"data.minutes={data.minutes} must be positive, or null"),
            (data.minutes is None or config.task == "speech", "data.minutes is for speech; take data.labels"),
            (data.labels is None or config.task != "speech", "data.labels is not for speech; take data.minutes"),
            (optim.schedule in SCHEDULES, f"optim.schedule={optim.schedule!r}: know {', '.join(SCHEDULES)}"),
            (0 <= optim.hold <= 1, f"optim.hold={optim.hold} must lie in [0, 1]"),
            (0 < optim.final_scale <= 1, f"optim.final_scale={optim.final_scale} must lie in (0, 1]"),
            (
                optim.schedule != "tri_stage"
                or optim.warmup_steps + optim.hold * config.train.steps <= config.train.steps,
                f"optim.warmup_steps={optim.warmup_steps} and optim.hold={optim.hold} leave none of train.steps="
                f"{config.train.steps} to decay in",
            ),
            (
                not optim.freeze_local or config.model.modality == "audio",
                "optim.freeze_local is for a waveform's convolutions: leave it out",
            ),
            (0 < optim.layer_decay <= 1, f"optim.layer_decay={optim.layer_decay} must lie in (0, 1]"),
            (0 < optim.head_scale < math.inf, f"optim.head_scale={optim.head_scale} must be positive and finite"),
            (optim.freeze_steps >= 0, f"optim.freeze_steps={optim.freeze_steps} must be 0 or more"),
            (0 <= config.head.dropout < 1, f"head.dropout={config.head.dropout} must lie in [0, 1)"),
            *(
                (getattr(image, name) >= 0, f"image.{name}={getattr(image, name)} must be 0 or more")
                for name in ("operations", "magnitude_std", "mixup", "cutmix")
            ),
            *(
                (0 <= getattr(image, name) <= 1, f"image.{name}={getattr(image, name)} must lie in [0, 1]")
                for name in ("erase", "mix_prob", "switch_prob")
            ),
            (0 <= image.magnitude <= 10, f"image.magnitude={image.magnitude} must lie in [0, 10]"),
            (0 <= image.smoothing < 1, f"image.smoothing={image.smoothing} must lie in [0, 1)"),
            (0 < image.crop_share <= 1, f"image.crop_share={image.crop_share} must lie in (0, 1]"),
            (evaluation.every >= 0, f"eval.every={evaluation.every} must be 0 or more"),
            (evaluation.batch_size >= 1, f"eval.batch_size={evaluation.batch_size} must be at least 1"),
            (len(evaluation.splits) > 0, "eval.splits must name a split"),
            (speech.case in CASES, f"speech.case={speech.case!r}: know {', '.join(CASES)}"),
            *(
                (0 <= share <= 1, f"speech.{name}={share} must lie in [0, 1]")
                for name, share in (("frame_prob", speech.frame_prob), ("channel_prob", speech.channel_prob))
            ),
            (
                min(speech.frame_length, speech.channel_length) >= 1,
                "speech.frame_length and channel_length are at least 1",
            ),
            *_text_rules(config),
        ],
    )


def _text_rules(config: Config) -> list[tuple[bool, str]]:
    text, tokens = config.text, config.model.text.tokens
    columns, low_high = text.columns, text.range
    return [
        (text.task in ("", *GLUE), f"text.task={text.task!r}: know {', '.join(GLUE)}; empty for files of your own"),
        (
            not text.task or (not columns.given and not text.quoted),
            f"text.task={text.task} knows its columns; leave out text.columns and text.quoted",
        ),
        (
            not columns.given or bool(columns.a and columns.label),
            "text.columns needs a and label, and b for pairs, as names or as numbers",
        ),
        (text.kind in (CLASSES, NUMBER), f"text.kind={text.kind!r}: know {CLASSES}, {NUMBER}"),
        (text.kind == CLASSES or text.task in ("", "STS-B"), f"text.task={text.task} has text.kind={CLASSES}"),
        (low_high is None or low_high[0] < low_high[1], f"text.range={low_high}: low < high"),
        (
            text.max_tokens is None or 6 <= text.max_tokens <= tokens,
            f"text.max_tokens={text.max_tokens} must lie in [6, {tokens}], what the model takes, or be null",
        ),
    ]
