"""Encoders of images and speech as `modeling_data2vec2.py` has them: its config, its names, and the files that say how
inputs are prepared and what outputs mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.config import RATE, HeadConfig, ModelConfig
from pretrain.checkpoint import CheckpointError

MODULE = "modeling_data2vec2"
BLANK = 0  # the output of CTC that is no letter
WORDS = "|"  # between words, where a model has no space among its letters
BICUBIC = 3


def config(model: ModelConfig, head: HeadConfig | None) -> dict[str, Any]:
    """What config.json says."""
    kind, task = {"image": ("Vision", "ImageClassification"), "audio": ("Audio", "CTC")}[model.modality]
    name = f"Data2Vec2{kind}Model"
    classes = {"AutoConfig": f"{MODULE}.Data2Vec2Config", "AutoModel": f"{MODULE}.{name}"}
    classes[f"AutoModelFor{task}"] = f"{MODULE}.Data2Vec2For{task}"
    if head is not None:
        name = f"Data2Vec2For{task}"
    out: dict[str, Any] = {
        "model_type": "data2vec2",
        "architectures": [name],
        "auto_map": classes,
        "modality": model.modality,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.prenet_depth + model.depth,
        "num_prenet_layers": model.prenet_depth,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "layer_norm_eps": model.norm_eps,
        "hidden_dropout": model.dropout.residual,
        "attention_dropout": model.dropout.attention,
        "activation_dropout": model.dropout.activation,
        "mlp_dropout": model.dropout.mlp,
        "prenet_dropout": model.dropout.prenet,
        "head_dropout": 0.0 if head is None else head.dropout,
    }
    if model.modality == "image":
        out |= {
            "image_size": model.image.size,
            "patch_size": model.image.patch,
            "position_grid": model.image.positions,
            "num_channels": model.image.channels,
            "num_extra_tokens": model.extra_tokens,
        }
    else:
        out |= {
            "conv_dim": model.audio.channels,
            "conv_kernel": list(model.audio.kernels),
            "conv_stride": list(model.audio.strides),
            "num_position_layers": model.audio.position_layers,
            "position_kernel": model.audio.position_kernel,
            "position_groups": model.audio.position_groups,
            "pad_token_id": BLANK,
        }
    return out


def theirs(tensors: Mapping[str, Tensor], model: ModelConfig, head: HeadConfig | None) -> dict[str, Tensor]:
    """Tensors of an `models.data2vec.Encoder`, and `head.*`, under the names there."""
    if head is None:
        return dict(tensors)
    return {name if name.startswith("head.") else f"encoder.{name}": tensor for name, tensor in tensors.items()}


def ours(tensors: Mapping[str, Tensor], model: ModelConfig, head: HeadConfig | None) -> dict[str, Tensor]:
    """The way back; what has no place here keeps its name."""
    return {name if head is None else name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}


def write_processors(folder: Path, model: ModelConfig, labels: Sequence[str] | None) -> None:
    """Copies the module, and writes what prepares inputs; for letters, `labels`, also what reads outputs."""
    source = Path(__file__).with_name(f"{MODULE}.py")
    (folder / source.name).write_bytes(source.read_bytes())
    prepared = image_processor(model) if model.modality == "image" else waveform_processor(labels is not None)
    write_json(folder / "preprocessor_config.json", prepared)
    if model.modality == "audio" and labels is not None:
        write_json(folder / "vocab.json", {label: i for i, label in enumerate(labels)})
        write_json(folder / "tokenizer_config.json", letters(labels))


def image_processor(model: ModelConfig) -> dict[str, Any]:
    """The shorter side becomes `size`, the centre is taken, channels are normalised: three of them, for all images are
    made RGB, of which the module makes grey where the model wants it."""
    image, each = model.image, 3 // model.image.channels
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image.size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean) * each,
        "image_std": list(image.std) * each,
    }


def waveform_processor(letters: bool) -> dict[str, Any]:
    """Clips of mean 0 and variance 1, silence behind the shorter ones, and a mask that says so."""
    out: dict[str, Any] = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": RATE,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": True,
        "return_attention_mask": True,
    }
    return out | ({"processor_class": "Wav2Vec2Processor"} if letters else {})


def letters(labels: Sequence[str]) -> dict[str, Any]:
    """How the outputs of CTC are read: repetitions are one, the blank is nothing. Raises CheckpointError if two outputs
    have one name."""
    if twice := sorted({label for label in labels if list(labels).count(label) > 1}):
        raise CheckpointError(f"labels.json has {', '.join(map(repr, twice))} more than once")
    known = {token: token if token in labels else None for token in ("<s>", "</s>")}
    return {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "pad_token": labels[BLANK],
        "unk_token": "<unk>" if "<unk>" in labels else labels[BLANK],
        "bos_token": known["<s>"],
        "eos_token": known["</s>"],
        "word_delimiter_token": " " if " " in labels else WORDS,
        "replace_word_delimiter_char": " ",
        "do_lower_case": False,
        "clean_up_tokenization_spaces": False,
        "processor_class": "Wav2Vec2Processor",
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
