"""The full form: whole fp32 weights in one file, whichever ranks and stage wrote them. All conversions go through it.

    student.*  decoder.*  teacher.*     a pre-trained model: a state dict of `models.data2vec.Data2Vec`, or of a
                                        baseline, which has no teacher
    student.*  head.*                   a fine-tuned one, of `models.heads.FineTuned`
    assets/NAME                         bytes of the files that the weights mean nothing without: tokenizer, labels

The step and the run's resolved settings are the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.config import HeadConfig, ModelConfig
from models.heads import FineTuned
from models.objectives import network as pre_trained
from pretrain.checkpoint import CheckpointError
from pretrain.data.names import few
from pretrain.data.tokenizer import TOKENIZERS
from pretrain.eager import shapes_only
from pretrain.files import replacing
from pretrain.pieces import MASTER, TEACHER, whole_shapes
from pretrain.saved import Checkpoint, find, weights
from pretrain.settings import ConfigError, build

ASSETS = "assets/"
LABELS = "labels.json"  # names of a fine-tuned model's outputs, in their order
SUFFIX = ".safetensors"
WHICH = ("teacher", "student")
TOLD = 3  # names of a kind in an error's line


@dataclass(frozen=True)
class Full:
    """A model and what belongs to it. `settings`: the run's resolved YAML, which has at least `model`, and `head`
    if it is fine-tuned. Raises CheckpointError, in one line, if they do not describe the `tensors`."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    step: int = 0
    assets: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if wrong := [name for name in self.assets if not name or Path(name).name != name]:
            raise CheckpointError(f"{wrong[0]!r:.80} travels with the weights and is no name of a file")
        with shapes_only():
            expected = expected_shapes(self.network())
        refuse_differences(self.tensors, expected)

    @property
    def model(self) -> ModelConfig:
        return model_of(self.settings)

    @property
    def head(self) -> HeadConfig | None:
        """None: the model is pre-trained."""
        return head_of(self.settings)

    @property
    def labels(self) -> list[str] | None:
        """Names of a fine-tuned model's outputs, in their order, if they came with it. Raises CheckpointError if they
        are not as many."""
        if self.head is None or LABELS not in self.assets:
            return None
        try:
            labels = json.loads(self.assets[LABELS])
        except ValueError:
            labels = None
        if not isinstance(labels, list) or len(labels) != self.head.outputs:
            raise CheckpointError(f"{LABELS} is no list of {self.head.outputs} names, one an output")
        return list(map(str, labels))

    def network(self) -> Any:
        """The module whose state dict the tensors are, not filled."""
        return network_of(self.settings)

    def encoder(self, which: str = "student") -> dict[str, Tensor]:
        """A state dict of `models.objectives.encoder`: the student's or the teacher's, which comes with the student's
        local features, and with whatever else it shares, where it has none of its own. A baseline has one encoder.

        Raises ConfigError if there is no teacher.
        """
        if which not in WHICH:
            raise ConfigError(f"which={which!r}: know {', '.join(WHICH)}")
        if which == "teacher" and self.head is not None:
            raise ConfigError("a fine-tuned model has no teacher; take the student")
        own = {n.removeprefix(f"{which}."): t for n, t in self.tensors.items() if n.startswith(f"{which}.")}
        shared = {n.removeprefix("student."): t for n, t in self.tensors.items() if n.startswith("student.")}
        return {name: own.get(name, tensor) for name, tensor in shared.items()}


def network_of(settings: Mapping[str, Any]) -> Any:
    """The module that the settings describe, freshly initialised."""
    config, head = model_of(settings), head_of(settings)
    return pre_trained(config) if head is None else FineTuned(config, head)


def expected_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def refuse_differences(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str = "") -> None:
    """Raises CheckpointError, in one line, with the first names that are missing, unexpected or of another shape. If
    there are more, all of them are its notes."""
    lists = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        ],
    }
    if told := [f"{what}: {few(names, TOLD)}" for what, names in lists.items() if names]:
        error = CheckpointError(f"{where or 'the weights'} do not fit the model; {'; '.join(told)}")
        if max(map(len, lists.values())) > TOLD:
            for what, names in lists.items():
                for name in names:
                    error.add_note(f"{what}: {name}")
        raise error


def model_of(settings: Mapping[str, Any], source: str = "") -> ModelConfig:
    return build(ModelConfig, settings.get("model", {}), "model.", source)


def head_of(settings: Mapping[str, Any], source: str = "") -> HeadConfig | None:
    return build(HeadConfig, settings["head"], "head.", source) if settings.get("head") else None


def settings(path: str | Path) -> dict[str, Any]:
    """The resolved config of what `read` reads, without its weights. Raises ConfigError or CheckpointError, in one
    line, for what describes no model."""
    path = Path(path).expanduser()
    found = _metadata(path)[0] if path.suffix == SUFFIX else _find(path).settings
    model_of(found, str(path))
    head_of(found, str(path))
    return found


def assets(path: str | Path) -> dict[str, bytes]:
    """The files that travel with the weights of what `read` reads, without those."""
    path = Path(path).expanduser()
    if path.suffix != SUFFIX:
        return assets_of(_find(path).run)
    _metadata(path)  # tells, in one line, what cannot be read
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(ASSETS)]  # noqa: SIM118 (it is no dict)
        return {name.removeprefix(ASSETS): file.get_tensor(name).numpy().tobytes() for name in names}


def _find(path: Path, best: bool = False) -> Checkpoint:
    """What `find` finds. Raises ConfigError for a file in another form."""
    if path.is_file() or (path / "config.json").is_file():
        raise ConfigError(f"{path} is neither a run nor a full form; python -m convert makes a NAME{SUFFIX} of it")
    return find(path, best)


def _metadata(path: Path) -> tuple[dict[str, Any], int]:
    """Settings and step of a file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "config" not in metadata:
            raise CheckpointError(f"{path} is no full form: no config in its metadata; python -m convert writes one")
        found = yaml.safe_load(metadata["config"])
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} is no full form: the config in its metadata has no sections")
        return found, int(metadata.get("step", 0))
    except (OSError, SafetensorError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None


def read(path: str | Path, best: bool = False) -> Full:
    """The full form of a .safetensors file, of a run's newest checkpoint, or its `best` if it has one, or of one of its
    checkpoints/step_*.

    Raises ConfigError or CheckpointError, in one line, if it is none of these or a part is missing.
    """
    path = Path(path).expanduser()
    return _read_file(path) if path.suffix == SUFFIX else _read_checkpoint(_find(path, best))


def _read_file(path: Path) -> Full:
    found, step = _metadata(path)
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if not name.startswith(ASSETS)]  # noqa: SIM118 (it is no dict)
        tensors = {name: file.get_tensor(name) for name in names}
    return _whole(path, tensors, found, step, assets(path))


def _read_checkpoint(found: Checkpoint) -> Full:
    tensors: dict[str, Tensor] = {}
    for kind, prefix in ((MASTER, ""), (TEACHER, "teacher.")):
        shapes = whole_shapes(found.folder, kind)
        tensors |= {prefix + name: tensor for name, tensor in weights(found.folder, kind, shapes).items()}
    return _whole(found.folder, tensors, found.settings, found.step, assets_of(found.run))


def _whole(place: Path, *parts: Any) -> Full:
    """The full form of its parts. Raises its errors with the `place` that they were read from."""
    try:
        return Full(*parts)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{place}: {error}") from error


def assets_of(run: Path) -> dict[str, bytes]:
    """The files of a run folder that travel with its weights."""
    return {path.name: path.read_bytes() for pattern in (*TOKENIZERS, LABELS) for path in sorted(run.glob(pattern))}


def write(full: Full, path: str | Path) -> None:
    """Writes a .safetensors file, whole or not at all, and never over a file. Raises ConfigError if it cannot."""
    path = Path(path).expanduser()
    if path.suffix != SUFFIX:
        raise ConfigError(f"{path} should be the name of a file to write, NAME{SUFFIX}")
    if path.exists():
        raise ConfigError(f"{path} is there already; choose another name, or delete it")
    content = {
        ASSETS + name: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for name, data in full.assets.items()
    }
    settings = yaml.safe_dump(full.settings, sort_keys=False, width=110)
    try:
        with replacing(path) as beside:
            save_file(full.tensors | content, beside, {"format": "pt", "step": str(full.step), "config": settings})
            beside.chmod(0o644)  # it is made readable for its owner alone
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from None
