"""What the model is, as frozen dataclasses. The defaults are the published ViT-B/16 (see docs/method.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from models.baselines import config as baselines
from models.baselines.config import DATA2VEC2, OBJECTIVES, MaeConfig, MlmConfig, Wav2Vec2Config


@dataclass(frozen=True)
class ImageConfig:
    """Pixels in, patches out. `mean` and `std` are per channel, for pixels scaled to [0, 1]. `positions`: the side of
    the grid of patches whose positions are spread over this one's (0: its own), as pre-training at another size had."""

    size: int = 224
    patch: int = 16
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    positions: int = 0

    @property
    def grid(self) -> int:
        return self.size // self.patch


@dataclass(frozen=True)
class AudioConfig:
    """16 kHz waveform in, 50 frames a second out. `kernels` and `strides` belong to the local encoder's convolutions,
    `channels` is their width; relative positions come from the stack of convolutions that `position_*` describe.
    `seconds`: the longest clip."""

    seconds: float = 20.0
    channels: int = 512
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    position_layers: int = 5
    position_kernel: int = 19
    position_groups: int = 16

    def frames(self, samples: int) -> int:
        """How many frames the convolutions make of `samples` (0 or less: too short for one)."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples


@dataclass(frozen=True)
class TextConfig:
    """Token ids in. `tokens` is the length of a block, `pad` the id whose embedding stays zero."""

    vocabulary: int = 50_265
    tokens: int = 512
    pad: int = 1


@dataclass(frozen=True)
class MaskConfig:
    """Block masks. `prob` is the share of hidden positions, `adjust` makes up for blocks that overlap, `length` is a
    block's edge (1: positions one by one). With `inverse` the blocks are what stays visible. `noise_std`: the decoder's
    filling."""

    prob: float = 0.8
    adjust: float = 0.07
    length: int = 3
    inverse: bool = True
    noise_std: float = 0.01

    def hidden(self, positions: int) -> int:
        """How many of `positions` every row hides. The float floor is the reference's: 0.8 of 196 keeps 39, not 40."""
        return positions - int(positions * (1 - self.prob)) if self.inverse else int(positions * self.prob)


@dataclass(frozen=True)
class DecoderConfig:
    """Grouped convolutions over the full length, then a projection to the encoder's width: one Linear, or with
    `projection_layers` 2 a Linear to twice the decoder's width, GELU, Linear."""

    width: int = 768
    groups: int = 16
    kernel: int = 3
    layers: int = 6
    residual: bool = True
    projection_layers: int = 1


@dataclass(frozen=True)
class TargetConfig:
    """How the outputs of the teacher's last `top_k_layers` blocks become one regression target."""

    top_k_layers: int = 10
    instance_norm_layer: bool = True
    layer_norm_layer: bool = False
    layer_norm: bool = True
    instance_norm: bool = False


@dataclass(frozen=True)
class LossConfig:
    """`scale` multiplies every squared difference (None: 1/sqrt(width)); `beta` > 0 chooses smooth-L1.

    `cls` weighs the class-token term. In the reference that term is *summed* over the rows of one rank's micro-batch,
    so that its weight grows with a number that should not matter; `cls_rows` is that number of rows (images x masks)
    in the published run, and our mean over the global batch's rows is multiplied by it.
    """

    scale: float | None = None
    beta: float = 0.0
    cls: float = 0.01
    cls_rows: int = 256


@dataclass(frozen=True)
class DropoutConfig:
    """Of the student while it trains: after attention's projection (`residual`), on attention's weights, on the MLP's
    output behind the target, on the prenet's input, on kept positions on their way into the decoder, on text's
    embeddings. `layer` is the probability that a whole main block is left out of a micro-step, on all ranks alike;
    `path` that of a sample going past the attention, or the MLP, of the last block, growing linearly up to there.
    `activation` is of the MLP's hidden units."""

    residual: float = 0.0
    attention: float = 0.0
    mlp: float = 0.0
    prenet: float = 0.0
    decoder: float = 0.0
    embedding: float = 0.0
    layer: float = 0.0
    path: float = 0.0
    activation: float = 0.0


@dataclass(frozen=True)
class HeadConfig:
    """What fine-tuning puts on the encoder: `outputs` classes, letters, or 1 for a number to regress. `dropout` is the
    head's own."""

    outputs: int = 0
    dropout: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """`objective`: data2vec2, or a baseline, mae, wav2vec2 or mlm, whose own numbers are in the section of its name. Of
    the others a baseline has no use for decoder, targets and loss (docs/method.md 5)."""

    objective: str = DATA2VEC2
    modality: str = "image"
    width: int = 768
    heads: int = 12
    prenet_depth: int = 2
    depth: int = 10
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    extra_tokens: int = 1
    num_masks: int = 16
    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    text: TextConfig = field(default_factory=TextConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mae: MaeConfig = field(default_factory=MaeConfig)
    wav2vec2: Wav2Vec2Config = field(default_factory=Wav2Vec2Config)
    mlm: MlmConfig = field(default_factory=MlmConfig)

    def grid(self, length: int) -> tuple[int, ...]:
        """Positions along each axis of inputs whose last axis has `length` pixels, waveform samples or tokens."""
        if self.modality == "image":
            return (length // self.image.patch, length // self.image.patch)
        return (self.audio.frames(length) if self.modality == "audio" else length,)

    @property
    def length(self) -> int:
        """The last axis of the largest inputs."""
        sizes = {"image": self.image.size, "audio": round(self.audio.seconds * RATE), "text": self.text.tokens}
        return sizes[self.modality]

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Positions along each axis of the largest inputs."""
        return self.grid(self.length)

    @property
    def positions(self) -> int:
        """T, the number of positions of the largest sample."""
        return math.prod(self.grid_shape)

    def path_rates(self) -> list[float]:
        """`dropout.path` of each block, the prenet's first: from 0 to the whole rate, as the reference's fine-tuning
        has it, which takes the steps of the main blocks for both (docs/method.md 4)."""
        rate, steps = self.dropout.path, max(1, self.depth - 1)
        first = min(rate, self.prenet_depth * rate / steps)
        prenet = [min(rate, i * rate / steps) for i in range(self.prenet_depth)]
        return prenet + [first + i * (rate - first) / steps for i in range(self.depth)]

    @property
    def unit(self) -> str:
        """What samples are called."""
        return {"image": "images", "audio": "clips", "text": "blocks"}[self.modality]

    @property
    def sample_size(self) -> int:
        """What the largest sample takes of `train.batch_size`, which counts waveform samples for audio."""
        return self.length if self.modality == "audio" else 1

    @property
    def loss_scale(self) -> float:
        return self.width**-0.5 if self.loss.scale is None else self.loss.scale


def problems(config: ModelConfig) -> list[str]:
    """Every reason why this model cannot be built, one sentence each; empty if it can."""
    image, audio, text, mask, decoder = config.image, config.audio, config.text, config.mask, config.decoder
    if config.modality not in MODALITIES:
        return [f"model.modality={config.modality!r}: know {', '.join(MODALITIES)}"]
    if config.modality not in OBJECTIVES.get(config.objective, ()):
        fit = [name for name, modalities in OBJECTIVES.items() if config.modality in modalities]
        return [f"model.objective={config.objective!r}: for {config.modality} there are {', '.join(fit)}"]
    found = [
        f"model.{name}={value} must be at least {least}"
        for name, value, least in (
            *((name, getattr(config, name), 1) for name in ("width", "heads", "depth", "num_masks")),
            *((name, getattr(config, name), 0) for name in ("prenet_depth", "extra_tokens", "mlp_ratio", "norm_eps")),
            *((f"image.{name}", getattr(image, name), 1) for name in ("size", "patch", "channels")),
            *(
                (f"audio.{name}", getattr(audio, name), 1)
                for name in ("channels", "position_kernel", "position_groups")
            ),
            *((f"audio.{name}", min(getattr(audio, name), default=0), 1) for name in ("kernels", "strides")),
            ("audio.position_layers", audio.position_layers, 0),
            ("image.positions", image.positions, 0),
            *((f"text.{name}", getattr(text, name), 1) for name in ("vocabulary", "tokens")),
            ("text.pad", text.pad, 0),
            *((f"decoder.{name}", getattr(decoder, name), 1) for name in ("width", "groups", "kernel")),
            ("decoder.layers", decoder.layers, 0),
            ("mask.length", mask.length, 1),
            ("mask.adjust", mask.adjust, 0),
            ("mask.noise_std", mask.noise_std, 0),
            ("loss.cls_rows", config.loss.cls_rows, 1),
        )
        if not value >= least
    ]
    if len(audio.kernels) != len(audio.strides):
        found.append(f"model.audio has {len(audio.kernels)} kernels for {len(audio.strides)} strides; one each a layer")
    if found:
        return found  # what follows divides by these
    rules = [
        (config.width % config.heads == 0, f"model.width={config.width} does not divide by model.heads={config.heads}"),
        (
            0 < mask.prob < 1 and 0 < mask.hidden(config.positions) < config.positions,
            f"model.mask.prob={mask.prob} must hide at least one of {config.positions} positions and leave one",
        ),
        (
            decoder.width % decoder.groups == 0 and config.width % decoder.groups == 0,
            f"model.width={config.width} and model.decoder.width={decoder.width} must both divide by "
            f"model.decoder.groups={decoder.groups}",
        ),
        (decoder.kernel % 2 == 1, f"model.decoder.kernel={decoder.kernel} must be odd"),
        (decoder.projection_layers in (1, 2), f"model.decoder.projection_layers={decoder.projection_layers}: 1 or 2"),
        (
            1 <= config.targets.top_k_layers <= config.depth,
            f"model.targets.top_k_layers={config.targets.top_k_layers} must be 1 to model.depth={config.depth}",
        ),
        (config.loss.cls == 0 or config.extra_tokens > 0, "model.loss.cls > 0 needs model.extra_tokens >= 1"),
        (config.extra_tokens == 0 or config.modality == "image", "model.extra_tokens are for images; set it to 0"),
        *(
            (0 <= share < 1, f"model.dropout.{name}={share} must lie in [0, 1)")
            for name, share in vars(config.dropout).items()
        ),
    ]
    if config.modality == "image":
        rules += [
            (config.width % 4 == 0, f"model.width={config.width} must divide by 4 for 2-D sin-cos positions"),
            (
                image.size % image.patch == 0,
                f"model.image.size={image.size} does not divide by its patch={image.patch}",
            ),
            (
                len(image.mean) == len(image.std) == image.channels and all(std > 0 for std in image.std),
                f"model.image.mean and std need {image.channels} values each, one a channel, std positive",
            ),
        ]
    if config.modality == "audio":
        rules += [
            (audio.position_kernel % 2 == 1, f"model.audio.position_kernel={audio.position_kernel} must be odd"),
            (
                config.width % audio.position_groups == 0,
                f"model.width={config.width} must divide by model.audio.position_groups={audio.position_groups}",
            ),
        ]
    if config.modality == "text":
        rules.append((config.prenet_depth == 0, "model.prenet_depth: text has no prenet, its teacher averages blocks"))
        rules.append((text.pad < text.vocabulary, f"model.text.pad={text.pad} is no id below {text.vocabulary}"))
    found = [sentence for ok, sentence in rules if not ok]
    return found if config.objective == DATA2VEC2 else found + baselines.problems(config)


MODALITIES = ("image", "audio", "text")
RATE = 16_000  # of every waveform, in samples a second
