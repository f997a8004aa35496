"""A saved step of a run, read without the engine that wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from pretrain.checkpoint import BEST, CheckpointError, latest
from pretrain.config import Config, load
from pretrain.pieces import read_whole
from pretrain.settings import ConfigError, read_tree


@dataclass(frozen=True)
class Checkpoint:
    """One saved step of a run, whose folder may be all there is of it."""

    folder: Path

    @property
    def run(self) -> Path:
        """Where reports about it belong."""
        parent = self.folder.parent
        return parent.parent if parent.name == "checkpoints" else self.folder

    @property
    def step(self) -> int:
        """Raises CheckpointError if it cannot be read."""
        path = self.folder / "state.json"
        try:
            return int(json.loads(path.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None

    @property
    def config(self) -> Config:
        """Of a pre-training run. Raises ConfigError if it is another."""
        if "task" in self.settings:
            raise ConfigError(f"{self.run} is a run of fine-tuning; give one of pre-training")
        return load(self.folder / "config.yaml")

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved config of whatever run it is, as it was written."""
        return read_tree(self.folder / "config.yaml")


def find(path: str | Path, best: bool = False) -> Checkpoint:
    """The newest checkpoint of a run folder, or its `best`, if evaluations have chosen one; or the one that `path` is.

    Raises ConfigError if it is none of these, CheckpointError if the run has not saved yet, or if what is asked for is
    no longer there.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give a run folder or one of its checkpoints/step_*")
    if (path / "state.json").is_file() and (path / "config.yaml").is_file():
        return Checkpoint(path)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if found := (latest(folder, BEST) if best else None) or latest(folder):
        return Checkpoint(found)
    if folder.is_dir() or (path / "metrics.jsonl").is_file():
        raise CheckpointError(f"{path} holds no complete checkpoint yet; the run saves one every run.save_every steps")
    raise ConfigError(f"{path} is neither a run folder nor a checkpoint: no checkpoints/latest and no state.json in it")


def weights(folder: Path, kind: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """`pretrain.pieces.read_whole`, but that it raises CheckpointError, in one line, whatever is wrong."""
    try:
        return read_whole(folder, kind, shapes)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())[:200]}") from None
