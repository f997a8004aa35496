"""The authors' checkpoints, fairseq's .pt files, to the full form and back: images, speech and text, pre-trained and
fine-tuned. Neither fairseq nor any class of it is needed; `convert.keymaps` has the names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert import unpickle
from convert.keymaps import (
    ALIBI,
    FINE_TUNED,
    POSITIONS,
    Unfit,
    encoder_of,
    our_settings,
    their_name,
    their_settings,
)
from models.config import MODALITIES, HeadConfig
from models.image import sincos_positions
from pretrain.checkpoint import CheckpointError
from pretrain.files import replacing
from pretrain.full import LABELS, Full, expected_shapes, network_of, refuse_differences
from pretrain.settings import ConfigError, merge, to_tree

SUFFIX = ".pt"
EMA = "_ema"
COPY_TEACHER = "--teacher-from-student"
CLOSE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}  # positions, which are at most 1; fp32 has 1e-6
ASSET = re.compile(r"\w[\w.-]*")  # names of files, not of paths


@dataclass(frozen=True)
class Found:
    """A file's content under our names, in the file's own types. `teacher`: it has one."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    step: int
    assets: dict[str, bytes]
    teacher: bool


def read(path: str | Path, teacher_from_student: bool = False) -> tuple[Full, list[str]]:
    """The full form of a .pt file, in fp32, and what to tell the user of it.

    Raises CheckpointError, in one line, for a file that is refused, for settings that cannot be had here, for names
    that are missing, unexpected or of another shape, all of them listed, and, unless `teacher_from_student`, if the
    file was written without a teacher.
    """
    found = open_file(path)
    notes = []
    tensors = found.tensors
    if "head" not in found.settings and not found.teacher:
        if not teacher_from_student:
            raise CheckpointError(
                f"{path} has no teacher ({EMA}); {COPY_TEACHER} lets one start as a copy of the student"
            )
        names = expected_shapes(network_of(found.settings, "meta"))
        copies = {n: tensors[n.replace("teacher", "student", 1)] for n in names if n.startswith("teacher.")}
        tensors = tensors | {name: tensor.clone() for name, tensor in copies.items()}
        notes.append(f"{path} has no teacher: it starts as a copy of the student")
    if narrow := sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"}):
        count = sum(tensor.dtype != torch.float32 for tensor in tensors.values())
        notes.append(f"{count} of {len(tensors)} tensors are {' and '.join(narrow)} in {path}; written as float32")
    return Full(_apart(tensors), found.settings, found.step, found.assets), notes


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In fp32, contiguous, no two in one memory; those that are so already are not copied."""
    out: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.float().contiguous()
        if own.untyped_storage().nbytes() != own.nbytes or own.data_ptr() in taken:
            own = own.clone()
        taken.add(own.data_ptr())
        out[name] = own
    return out


def open_file(path: str | Path, verify: bool = True) -> Found:
    """What a .pt file holds, its tensors still views of it. Raises CheckpointError as `read` does."""
    state = unpickle.read(path, verify)
    weights, cfg = (state.get(key) if isinstance(state, dict) else None for key in ("model", "cfg"))
    if not isinstance(weights, dict) or not isinstance(cfg, dict) or not isinstance(cfg.get("model"), dict):
        raise CheckpointError(f"{path} is no checkpoint of the authors' program: it has no model, or no cfg of one")
    weights = dict(weights)
    averages = weights.pop(EMA, None)
    modality, fine_tuned = _kind(cfg, weights, path)
    if fine_tuned:
        head, cfg = cfg["model"], cfg["model"].get(FINE_TUNED[modality].settings) or {}
    try:
        settings = our_settings(cfg, modality, fine_tuned)
    except Unfit as error:
        raise CheckpointError(f"{path} cannot be had here: {error}") from None
    prefix = FINE_TUNED[modality].prefix if fine_tuned else ""
    if modality == "text":
        table = weights.get(f"{prefix}{encoder_of(modality)}.local_encoder.embed_tokens.weight")
        if isinstance(table, Tensor) and table.dim():
            settings["model"].setdefault("text", {})["vocabulary"] = len(table)
    if fine_tuned:
        settings = {"model": settings["model"], "head": _head_settings(head, weights, modality, path)}
    if isinstance(own := state.get("settings"), dict):  # written here: it has what `cfg` cannot say
        settings = merge(settings, own)
    tensors = _renamed(weights, averages, settings, modality, fine_tuned, path)
    history = state.get("optimizer_history") or [{}]
    step = history[-1].get("num_updates", 0) if isinstance(history[-1], dict) else 0
    assets = _assets(state, tensors, path)
    return Found(tensors, settings, int(step), assets, averages is not None)


def _kind(cfg: Mapping[str, Any], weights: Mapping[str, Any], path: str | Path) -> tuple[str, bool]:
    """The modality, and whether the model is fine-tuned."""
    name = cfg["model"].get("_name")
    for modality, kept in FINE_TUNED.items():
        if name == kept.name:
            return modality, True
    if name != "data2vec_multi":
        known = ", ".join(["data2vec_multi", *(kept.name for kept in FINE_TUNED.values())])
        raise CheckpointError(f"{path} holds a model called {name!r:.60}; know {known}")
    there = [m for m in MODALITIES if any(key.startswith(f"{encoder_of(m)}.") for key in weights)]
    if len(there) != 1:
        raise CheckpointError(f"{path} has encoders of {', '.join(there) or 'no modality'}; it has to be one")
    return there[0], False


def _head_settings(
    head: Mapping[str, Any], weights: Mapping[str, Any], modality: str, path: str | Path
) -> dict[str, Any]:
    kept = FINE_TUNED[modality]
    problems = [
        f"{key} is {head[key]!r:.40}, only {values[0]!r} is known"
        for key, values in kept.fixed.items()
        if key in head and head[key] not in values and not str(head[key]).startswith("${")
    ]
    if problems:
        raise CheckpointError(f"{path} cannot be had here: {'; '.join(problems)}")
    last = weights.get(their_name("head.linear.weight", modality))
    outputs = len(last) if isinstance(last, Tensor) and last.dim() else 1  # a missing one is listed later
    return {"outputs": outputs, "dropout": float(head.get(kept.dropout) or 0)}


def _renamed(
    weights: Mapping[str, Any],
    averages: Any,
    settings: Mapping[str, Any],
    modality: str,
    fine_tuned: bool,
    path: str | Path,
) -> dict[str, Tensor]:
    """The tensors under our names. Raises CheckpointError, listing all that do not fit."""
    expected = expected_names(settings, averages is not None)
    found: dict[str, Any] = dict(weights)
    if averages is not None:
        found |= {f"{EMA}.{name}": value for name, value in averages.items()}
    if strange := [name for name, value in found.items() if not _is_weight(value)]:
        raise CheckpointError(f"{path}: no floating-point tensors: {', '.join(map(str, strange))}")
    for name, value in found.items():
        if name.endswith(ALIBI) and value.dim() == 4:  # as older versions of the program wrote it
            found[name] = value[None]
    refuse_differences(found, {name: shape for name, (_, shape) in expected.items()}, str(path))
    out = {}
    for name, (ours, shape) in expected.items():
        if ours is None:
            _check_positions(found[name], shape, f"{path}: {name}")
        else:
            out[ours] = found[name].flatten() if name.endswith(ALIBI) else found[name]
    return out


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _check_positions(found: Tensor, shape: tuple[int, ...], where: str) -> None:
    _, positions, width = shape
    error = (found[0].float() - sincos_positions(width, round(positions**0.5))).abs().max()
    if not error <= CLOSE.get(found.dtype, 1e-6):
        raise CheckpointError(
            f"{where} are not the fixed sin-cos positions, but {error:.1e} off; learned ones are not known"
        )


def expected_names(settings: Mapping[str, Any], teacher: bool = True) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Every name that a .pt file of this model has, those of the teacher as `_ema.NAME`: our name, None for what is
    computed here, and the shape there."""
    network = network_of(settings, "meta")
    config, fine_tuned = network.config, bool(settings.get("head"))
    out: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    for ours, shape in expected_shapes(network).items():
        name = their_name(ours, config.modality, fine_tuned)
        if name.endswith(ALIBI):
            shape = (1, 1, *shape, 1, 1)
        if not ours.startswith("teacher."):
            out[name] = ours, shape
        elif teacher:
            out[f"{EMA}.{name}"] = ours, shape
    if config.modality == "image":
        positions = POSITIONS.format(encoder=encoder_of("image"))
        shape = (1, config.positions, config.width)
        out[(FINE_TUNED["image"].prefix if fine_tuned else "") + positions] = None, shape
        if teacher and not fine_tuned:
            out[f"{EMA}.{positions}"] = None, shape
    return out


def _assets(state: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, bytes]:
    """Files that travel: ours, or the letters that the task's dictionary has."""
    out = {}
    held = state.get("assets")
    for name, content in held.items() if isinstance(held, dict) else ():
        if not isinstance(content, Tensor) or content.dtype != torch.uint8 or not ASSET.fullmatch(str(name)):
            raise CheckpointError(f"{path}: {name!r:.60} among its assets is no file")
        out[name] = content.contiguous().numpy().tobytes()
    task = state.get("task_state")
    letters = task.get("target_dictionary") if isinstance(task, dict) else None
    if isinstance(letters, dict) and isinstance(letters.get("symbols"), list) and LABELS not in out:
        names = list(map(str, letters["symbols"]))
        head = tensors.get("head.linear.weight")
        if head is not None:
            if len(head) != len(names):
                raise CheckpointError(f"{path}: its dictionary has {len(names)} symbols for {len(head)} outputs")
            out[LABELS] = json.dumps(names, ensure_ascii=False).encode()
    return out


def write(full: Full, path: str | Path) -> None:
    """Writes a .pt file that the authors' program takes, whole or not at all, and never over a file; what its `cfg` has
    no words for, all our settings and the files that travel, is beside it. Raises ConfigError if it cannot."""
    path = Path(path).expanduser()
    if path.suffix != SUFFIX:
        raise ConfigError(f"{path} should be the name of a file to write, NAME{SUFFIX}")
    if path.exists():
        raise ConfigError(f"{path} is there already; choose another name, or delete it")
    try:
        with replacing(path) as beside:
            torch.save(state_of(full), beside)
            beside.chmod(0o644)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"cannot write {path}: {' '.join(str(error).split())[:200]}") from None


def state_of(full: Full) -> dict[str, Any]:
    """What fairseq's trainer saves, of plain containers, without the optimizer's state."""
    config, head = full.model, full.head
    weights: dict[str, Any] = {}
    averages: dict[str, Tensor] = {}
    for name, (ours, shape) in expected_names(full.settings).items():
        tensor = sincos_positions(config.width, config.image.grid) if ours is None else full.tensors[ours]
        place, key = (averages, name.removeprefix(f"{EMA}.")) if name.startswith(f"{EMA}.") else (weights, name)
        place[key] = tensor.view(shape)
    cfg = their_settings(full.settings | {"model": to_tree(config)}, config.modality)
    if head is None:
        weights[EMA] = averages
    else:
        cfg = _fine_tuned_settings(cfg, config.modality, head)
    return {
        "args": None,
        "cfg": cfg,
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "ModelCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": full.step,
            }
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True},
            "val_loss": None,
            "previous_training_time": 0.0,
        },
        "last_optimizer_state": None,
        "settings": full.settings,
        "assets": {name: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for name, data in full.assets.items()},
    }


def _fine_tuned_settings(cfg: dict[str, Any], modality: str, head: HeadConfig) -> dict[str, Any]:
    """The `cfg` of a fine-tuned model, around that of its pre-training."""
    kept = FINE_TUNED[modality]
    own: dict[str, Any] = {key: values[0] for key, values in kept.fixed.items()}
    own |= {"_name": kept.name, kept.settings: cfg, "num_classes": head.outputs}
    if kept.dropout:
        own[kept.dropout] = head.dropout
    task = {"_name": kept.task, "data": "", "normalize": True}
    return {"_name": None, "common": cfg["common"], "criterion": {"_name": None}, "task": task, "model": own}
