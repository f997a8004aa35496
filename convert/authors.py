"""The authors' checkpoints, fairseq's .pt files, to the full form and back: images, speech and text, pre-trained and
fine-tuned. Neither fairseq nor any class of it is needed; `convert.keymaps` has the names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert import unpickle
from convert.keymaps import (
    ALIBI,
    FINE_TUNED,
    MISSING,
    POSITIONS,
    Unfit,
    encoder_of,
    our_settings,
    their_name,
    their_settings,
    value_at,
)
from models.config import MODALITIES, HeadConfig, MaskConfig, problems
from models.image import sincos_positions
from pretrain.checkpoint import CheckpointError
from pretrain.eager import shapes_only
from pretrain.files import replacing
from pretrain.full import LABELS, Full, expected_shapes, head_of, model_of, network_of, refuse_differences
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
        with shapes_only():
            names = expected_shapes(network_of(found.settings))
        tensors = tensors | {n: tensors[n.replace("teacher", "student", 1)] for n in names if n.startswith("teacher.")}
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
    try:
        return _opened(state)
    except (Unfit, ConfigError, CheckpointError) as error:
        raise CheckpointError(f"cannot take {path}: {' '.join(str(error).split())}") from error


def _opened(state: Any) -> Found:
    """Raises Unfit, ConfigError or CheckpointError, without the file's name."""
    if not isinstance(state, dict) or not isinstance(cfg := state.get("cfg"), dict):
        raise Unfit("it is no checkpoint of the authors' program, which has a model and its cfg")
    weights, averages = _parameters(state.get("model"))
    modality, head = _kind(cfg, weights)
    kept = FINE_TUNED[modality]
    settings = our_settings(cfg if head is None else head.get(kept.settings), modality, head is not None)
    if modality == "text":
        prefix = "" if head is None else kept.prefix
        table = weights.get(f"{prefix}{encoder_of(modality)}.local_encoder.embed_tokens.weight")
        settings["model"]["text"]["vocabulary"] = _rows(table)
    if head is not None:
        last = weights.get(their_name("head.linear.weight", modality))
        own = {"outputs": _rows(last), "dropout": head.get(kept.dropout) or 0.0}
        settings = {"task": kept.ours, "model": settings["model"], "head": own}
    if isinstance(written := state.get("settings"), dict):  # written here: it has what `cfg` cannot say
        settings = merge(settings, written)
    _check_sizes(settings, len(weights))
    tensors = _renamed(weights, averages, settings)
    return Found(tensors, settings, _steps(state), _assets(state, tensors), averages is not None)


def _rows(tensor: Tensor | None) -> int:
    """1 where there is none, which is told when names are compared."""
    return len(tensor) if tensor is not None and tensor.dim() else 1


def _parameters(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Those of the student, and of the teacher if there is one."""
    if not isinstance(model, dict):
        raise Unfit("it is no checkpoint of the authors' program, which has a model and its cfg")
    averages = model.get(EMA)
    weights = {name: value for name, value in model.items() if name != EMA}
    for tensors in (weights, averages):
        if tensors is None:
            continue
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise Unfit("its parameters have no names")
        if strange := [n for n, v in tensors.items() if not isinstance(v, Tensor) or not v.is_floating_point()]:
            raise Unfit(f"no floating-point tensors: {', '.join(strange)}")
        for name, value in tensors.items():
            if name.endswith(ALIBI) and value.dim() == 4:  # as older versions of the program wrote it
                tensors[name] = value[None]
    return weights, averages


def _kind(cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any] | None]:
    """The modality, and of a fine-tuned model its own settings."""
    model = cfg.get("model")
    name = model.get("_name") if isinstance(model, dict) else None
    for modality, kept in FINE_TUNED.items():
        if isinstance(model, dict) and name == kept.name:
            own = {key: value_at(cfg, f"model.{key}") for key in kept.fixed}
            found = [
                f"{key} is {value!r:.40}, only {kept.fixed[key][0]!r} is known"
                for key, value in own.items()
                if value is not MISSING and value not in kept.fixed[key]
            ]
            if found:
                raise Unfit("; ".join(found))
            return modality, model
    if name != "data2vec_multi":
        known = ", ".join(["data2vec_multi", *(kept.name for kept in FINE_TUNED.values())])
        raise Unfit(f"it holds a model called {name!r:.60}; know {known}")
    there = [m for m in MODALITIES if any(key.startswith(f"{encoder_of(m)}.") for key in weights)]
    if len(there) != 1:
        raise Unfit(f"it has encoders of {', '.join(there) or 'no modality'}; it has to be one")
    return there[0], None


def _check_sizes(settings: Mapping[str, Any], count: int) -> None:
    """Settings can ask for more layers than anyone could build; the file's `count` tensors are one's measure."""
    config = model_of(settings)
    head_of(settings)
    masks = MaskConfig() if settings.get("head") else config.mask  # fine-tuning may have switched them off
    if found := problems(replace(config, mask=masks)):
        raise Unfit("; ".join(found))
    layers = [config.depth, config.prenet_depth, config.decoder.layers, config.audio.position_layers]
    if max(layers, default=0) > count:
        raise Unfit(f"it has {count} tensors for {max(layers)} layers of one kind")


def _steps(state: Mapping[str, Any]) -> int:
    history = state.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    steps = last.get("num_updates") if isinstance(last, dict) else None
    return steps if isinstance(steps, int) else 0


def _renamed(
    weights: Mapping[str, Tensor], averages: Mapping[str, Tensor] | None, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors under our names. Raises CheckpointError, listing all that do not fit."""
    expected = expected_names(settings, averages is not None)
    found = dict(weights) | {f"{EMA}.{name}": value for name, value in (averages or {}).items()}
    refuse_differences(found, {name: shape for name, (_, shape) in expected.items()})
    out = {}
    for name, (ours, shape) in expected.items():
        if ours is None:
            _check_positions(found[name], shape, name)
        else:
            out[ours] = found[name].flatten() if name.endswith(ALIBI) else found[name]
    return out


def _check_positions(found: Tensor, shape: tuple[int, ...], name: str) -> None:
    _, positions, width = shape
    error = (found[0].float() - sincos_positions(width, round(positions**0.5))).abs().max()
    if not error <= CLOSE.get(found.dtype, 1e-6):
        raise Unfit(f"{name} are not the fixed sin-cos positions, but {error:.1e} off; learned ones are not known")


def expected_names(settings: Mapping[str, Any], teacher: bool = True) -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Every name that a .pt file of this model has, those of the teacher as `_ema.NAME`: our name, None for what is
    computed here, and the shape there."""
    with shapes_only():
        network = network_of(settings)
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


def _assets(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Files that travel: ours, or the letters that the task's dictionary has."""
    out = {}
    held = state.get("assets")
    for name, content in held.items() if isinstance(held, dict) else ():
        if not isinstance(content, Tensor) or content.dtype != torch.uint8 or not ASSET.fullmatch(str(name)):
            raise Unfit(f"{name!r:.60} among its assets is no file")
        out[name] = content.contiguous().numpy().tobytes()
    task = state.get("task_state")
    letters = task.get("target_dictionary") if isinstance(task, dict) else None
    if isinstance(letters, dict) and isinstance(letters.get("symbols"), list) and LABELS not in out:
        names = list(map(str, letters["symbols"]))
        head = tensors.get("head.linear.weight")
        if head is not None:
            if len(head) != len(names):
                raise Unfit(f"its dictionary has {len(names)} symbols for {len(head)} outputs")
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
