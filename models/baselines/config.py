"""What of a model is a baseline's alone. The defaults are the published base models' (docs/method.md 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.config import ModelConfig

DATA2VEC2 = "data2vec2"
OBJECTIVES = {DATA2VEC2: ("image", "audio", "text"), "mae": ("image",), "wav2vec2": ("audio",), "mlm": ("text",)}
"""And the modalities that each is for."""


@dataclass(frozen=True)
class MaeConfig:
    """The decoder: `depth` blocks of `width`. With `normalise` each patch is to be told as mean 0 and variance 1."""

    width: int = 512
    depth: int = 8
    heads: int = 16
    normalise: bool = True


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Quantisation into `groups` of `codes`, together `width` wide, as what is compared; `negatives` of the same clip,
    their similarities divided by `logit_temperature`. Gumbel's `temperature` begins at the first number, is multiplied
    by the third at every step, and never falls under the second. `diversity` and `penalty` weigh the additional losses,
    `feature_gradient` what of the gradient goes on into the convolutions, whose features are quantised with `dropout`.
    `position_kernel` frames make the one convolution of positions."""

    groups: int = 2
    codes: int = 320
    width: int = 256
    negatives: int = 100
    logit_temperature: float = 0.1
    temperature: tuple[float, float, float] = (2.0, 0.5, 0.999995)
    diversity: float = 0.1
    penalty: float = 10.0
    feature_gradient: float = 0.1
    dropout: float = 0.1
    position_kernel: int = 128


@dataclass(frozen=True)
class MlmConfig:
    """Of the hidden tokens, `masked` are replaced by the mask, `random` by any token, and the rest stays. `mask_id`:
    the mask's id (null: one behind the vocabulary)."""

    masked: float = 0.8
    random: float = 0.1
    mask_id: int | None = None


def problems(config: ModelConfig) -> list[str]:
    """Every reason why a baseline cannot be built of a config whose numbers alone are in order, one sentence each."""
    mae, wav, mlm, objective = config.mae, config.wav2vec2, config.mlm, f"model.objective={config.objective}"
    start, least, factor = wav.temperature
    rules = {
        "mae": [
            (mae.width >= 4 and mae.width % 4 == 0, f"model.mae.width={mae.width} must divide by 4 for its positions"),
            (mae.depth >= 1, f"model.mae.depth={mae.depth} must be at least 1"),
            (
                mae.heads >= 1 and mae.width % mae.heads == 0,
                f"model.mae.width={mae.width} does not divide by model.mae.heads={mae.heads}",
            ),
            (config.extra_tokens == 1, f"model.extra_tokens={config.extra_tokens}: {objective} has 1, its class token"),
            (config.mask.inverse, f"model.mask.inverse=false: {objective} counts what stays visible; set it to true"),
        ],
        "wav2vec2": [
            *(
                (getattr(wav, name) >= 1, f"model.wav2vec2.{name}={getattr(wav, name)} must be at least 1")
                for name in ("groups", "codes", "negatives", "position_kernel")
            ),
            (
                wav.width >= 1 and wav.groups >= 1 and wav.width % wav.groups == 0,
                f"model.wav2vec2.width={wav.width} does not divide by model.wav2vec2.groups={wav.groups}",
            ),
            (wav.logit_temperature > 0, f"model.wav2vec2.logit_temperature={wav.logit_temperature} must be positive"),
            (
                0 < least <= start and 0 < factor <= 1,
                f"model.wav2vec2.temperature={list(wav.temperature)}: start, least and factor, 0 < least <= start and "
                "0 < factor <= 1",
            ),
            (0 <= wav.dropout < 1, f"model.wav2vec2.dropout={wav.dropout} must lie in [0, 1)"),
            (not config.mask.inverse, f"model.mask.inverse=true: {objective} counts what is hidden; set it to false"),
        ],
        "mlm": [
            (
                mlm.masked >= 0 and mlm.random >= 0 and mlm.masked + mlm.random <= 1,
                f"model.mlm.masked={mlm.masked} and model.mlm.random={mlm.random} are shares, together 1 at most",
            ),
            (
                mlm.mask_id is None or 0 <= mlm.mask_id < config.text.vocabulary,
                f"model.mlm.mask_id={mlm.mask_id} is no id below {config.text.vocabulary}",
            ),
            (not config.mask.inverse, f"model.mask.inverse=true: {objective} counts what is hidden; set it to false"),
        ],
    }
    found = [
        (
            config.prenet_depth == 0,
            f"model.prenet_depth={config.prenet_depth}: {objective} has main blocks alone; add them to model.depth",
        ),
        (config.num_masks == 1, f"model.num_masks={config.num_masks}: {objective} sees a sample once; set it to 1"),
        (config.dropout.path == 0, f"model.dropout.path={config.dropout.path}: {objective} has none; set it to 0"),
        *rules[config.objective],
    ]
    return [sentence for ok, sentence in found if not ok]
