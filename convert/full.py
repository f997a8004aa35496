"""The full form: whole fp32 weights of student, decoder and teacher, whichever ranks and stage wrote them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.data2vec import Data2Vec
from pretrain.config import ConfigError, to_yaml
from pretrain.files import replacing
from pretrain.pieces import MASTER, TEACHER
from pretrain.saved import Checkpoint, find, weights


def full_weights(found: Checkpoint) -> dict[str, Tensor]:
    """A state dict of `Data2Vec`: `student.*` and `decoder.*`, the optimizer's masters, and `teacher.*`, the average.

    Raises CheckpointError if a part is missing or cannot be read.
    """
    with torch.device("meta"):
        model = Data2Vec(found.config.model)
    teacher = {name: parameter.shape for name, parameter in model.teacher.named_parameters()}
    trained = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    averages = weights(found.folder, TEACHER, teacher)
    return weights(found.folder, MASTER, trained) | {f"teacher.{name}": value for name, value in averages.items()}


def export(source: str | Path, target: str | Path) -> str:
    """Writes the full form of a run's newest or a given checkpoint, with step and resolved config as metadata; whole or
    not at all, and never over a file. Returns what to tell the user.

    Raises ConfigError or CheckpointError, in one line, if it cannot be read or written.
    """
    target = Path(target).expanduser()
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target} should be the name of a file to write, NAME.safetensors")
    if target.exists():
        raise ConfigError(f"{target} is there already; choose another name, or delete it")
    found = find(source)
    tensors = full_weights(found)
    metadata = {"format": "pt", "step": str(found.step), "config": to_yaml(found.config)}
    try:
        with replacing(target) as beside:
            save_file(tensors, beside, metadata)
            beside.chmod(0o644)  # it is made readable for its owner alone
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {target}: {error}") from None
    size = sum(tensor.numel() for tensor in tensors.values())
    return f"{target}: {len(tensors)} tensors, {size / 1e6:.1f} M fp32 weights after step {found.step} of {found.run}"
