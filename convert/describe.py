"""What a checkpoint is, on one screen, of any form. Weights are not read, only their names, shapes and types."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from convert import authors
from models.config import ModelConfig
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.full import ASSETS, LABELS, assets_of, head_of, model_of
from pretrain.pieces import MASTER, TEACHER, files, whole_shapes
from pretrain.saved import find

PARTS = ("student", "decoder", "teacher", "head")
SEVERAL = 6  # labels that are shown


@dataclass
class Summary:
    """`tensors`: name -> (shape, type). `assets`: name -> bytes. `layout`: the ranks that wrote it."""

    form: str
    tensors: dict[str, tuple[tuple[int, ...], str]]
    size: int
    settings: dict[str, Any]
    step: int | None
    assets: dict[str, bytes] = field(default_factory=dict)
    layout: str = "one file, nothing is split"


def described(path: str | Path) -> str:
    """The screen. Raises ConfigError or CheckpointError, in one line, for what is no checkpoint."""
    path = Path(path).expanduser()
    if path.suffix == authors.SUFFIX:
        found = _authors(path)
    elif path.suffix == full.SUFFIX:
        found = _full(path)
    elif (path / "config.json").is_file():
        found = _hugging_face(path)
    else:
        found = _run(path)
    facts = {"form": found.form} | (_of_settings(found) if "model" in found.settings else {})
    facts["parameters"] = _parameters(found)
    types = Counter(kind for _, kind in found.tensors.values())
    facts["types"] = ", ".join(f"{kind} ({count} tensors)" for kind, count in types.most_common())
    facts["step"] = "unknown" if found.step is None else f"{found.step:,}"
    facts["layout"] = found.layout
    facts["travels"] = ", ".join(f"{name} ({_bytes(len(data))})" for name, data in found.assets.items()) or "nothing"
    if LABELS in found.assets:
        facts["labels"] = _labels(found.assets[LABELS], path)
    facts["size"] = _bytes(found.size)
    return "\n".join([str(path), *(f"  {name:<11}{value}" for name, value in facts.items())])


def _of_settings(found: Summary) -> dict[str, str]:
    model, head = model_of(found.settings), head_of(found.settings)
    prenet = f"{model.prenet_depth} + " if model.prenet_depth else ""
    kind = "pre-trained" if head is None else f"fine-tuned, {head.outputs} outputs"
    return {
        "model": f"{kind}, {model.modality}: {_inputs(model)}",
        "encoder": f"width {model.width}, {prenet}{model.depth} blocks, {model.heads} heads",
    }


def _inputs(model: ModelConfig) -> str:
    image, audio, text = model.image, model.audio, model.text
    told: dict[str, Callable[[], str]] = {
        "image": lambda: f"{image.size} pixels, patch {image.patch}, {image.channels} channels",
        "audio": lambda: f"up to {audio.seconds:g} s at 16 kHz",
        "text": lambda: f"up to {text.tokens} tokens of {text.vocabulary:,}",
    }
    return told[model.modality]()


def _parameters(found: Summary) -> str:
    """Those of names that are not ours, as Hugging Face's, are called `model`."""
    counts: Counter[str] = Counter()
    for name, (shape, _) in found.tensors.items():
        part = name.partition(".")[0]
        counts[part if part in PARTS else "model"] += prod(shape)
    return ", ".join(f"{part} {counts[part]:,}" for part in ("model", *PARTS) if part in counts)


def _labels(content: bytes, path: Path) -> str:
    try:
        names = [str(name) for name in json.loads(content)]
    except (ValueError, TypeError):
        raise CheckpointError(f"{path}: its {LABELS} is no list of names") from None
    more = f", ... ({len(names)} in all)" if len(names) > SEVERAL else ""
    return ", ".join(names[:SEVERAL]) + more


def _bytes(size: int) -> str:
    return next(
        f"{size / 1000**i:.3g} {unit}" for i, unit in enumerate(("B", "kB", "MB", "GB", "TB")) if size < 999.5 * 1000**i
    )


def _authors(path: Path) -> Summary:
    found = authors.open_file(path, verify=False)
    tensors = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in found.tensors.items()}
    teacher = "" if found.teacher or head_of(found.settings) else ", without a teacher"
    form = f"the authors' program's (fairseq){teacher}"
    return Summary(form, tensors, path.stat().st_size, found.settings, found.step, found.assets)


def _full(path: Path) -> Summary:
    tensors, metadata, assets = _header(path)
    settings = full.settings(path)  # tells, in one line, what of the metadata cannot be read
    return Summary("full (safetensors)", tensors, path.stat().st_size, settings, int(metadata.get("step", 0)), assets)


def _header(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], Mapping[str, str], dict[str, bytes]]:
    """Tensors, metadata and assets of a safetensors file, of which the assets alone are read."""
    tensors, assets = {}, {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name.startswith(ASSETS):
                    assets[name.removeprefix(ASSETS)] = file.get_tensor(name).numpy().tobytes()
                else:
                    part = file.get_slice(name)
                    tensors[name] = tuple(part.get_shape()), TYPES.get(part.get_dtype(), part.get_dtype())
            return tensors, file.metadata() or {}, assets
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None


TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def _hugging_face(folder: Path) -> Summary:
    """Of a folder that `convert` wrote, whose config.json has our settings under `data2vec2`, or of another's."""
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(folder.glob("*" + full.SUFFIX)):
        tensors |= _header(file)[0]
    if not tensors:
        raise CheckpointError(f"{folder} has a config.json, but no {full.SUFFIX} file")
    try:
        config = json.loads((folder / "config.json").read_text())
        name = ", ".join([str(config["model_type"]), *map(str, config.get("architectures") or [])])
        ours = dict(config.get("data2vec2") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {type(error).__name__}: {error}") from None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assets = assets_of(folder / "assets") or assets_of(folder)
    return Summary(f"Hugging Face folder ({name})", tensors, size, ours, ours.pop("step", None), assets)


def _run(path: Path) -> Summary:
    found = find(path)
    try:
        state = json.loads((found.folder / "state.json").read_text())
        layout = (
            f"{state['ranks']} ranks, ZeRO {state['zero_stage']}, tensor parallel {state['tensor_parallel']}, "
            f"trained in {state['precision']}"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{found.folder / 'state.json'} is damaged: {type(error).__name__}: {error}") from None
    try:
        shapes = {name: (shape, "float32") for name, shape in whole_shapes(found.folder, MASTER).items()}
        shapes |= {f"teacher.{name}": (shape, "float32") for name, shape in whole_shapes(found.folder, TEACHER).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{found.folder}: {' '.join(str(error).split())[:200]}") from None
    size = sum(file.stat().st_size for file in files(found.folder))
    form = f"checkpoint of a run, {found.folder.name}, with the optimizer's state"
    return Summary(form, shapes, size, found.settings, found.step, assets_of(found.run), layout)
