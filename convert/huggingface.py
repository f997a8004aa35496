"""Hugging Face folders, which transformers loads: the full form to one, and back (docs/checkpoints.md).

Text is RoBERTa, a class that transformers has. Images and speech come with `modeling_data2vec2.py`, whose parameters
have our names; it is loaded with `trust_remote_code=True`.

    config.json                  what transformers reads; under `data2vec2` our own settings of model and head
    model.safetensors            one encoder, and the head of a fine-tuned model
    preprocessor_config.json     of images and speech; tokenizer.json or vocab.json of text and letters
    assets/NAME                  the tokenizer and the labels as the run has them
    data2vec2_rest.safetensors   if everything was asked for: weights that transformers has no use for, all settings
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert import data2vec2, fast_tokenizer, roberta
from convert.authors import COPY_TEACHER
from models.config import RATE, HeadConfig, ModelConfig, problems
from models.data2vec import Data2Vec, Encoder
from models.heads import FineTuned
from models.masks import without_padding
from pretrain.checkpoint import CheckpointError
from pretrain.data.sources import DataError
from pretrain.data.tokenizer import Tokenizer, tokenizer_among
from pretrain.eager import shapes_only
from pretrain.files import flush
from pretrain.full import Full, head_of, model_of
from pretrain.settings import ConfigError, to_tree

BOUND = 1e-5  # on features, which the last LayerNorm has made about 1, and on logits, as a share of the largest
WEIGHTS, REST, ASSETS = "model.safetensors", "data2vec2_rest.safetensors", "assets"
OURS = "data2vec2"
OUTSIDER = Path(__file__).with_name("outsider.py")
FINE_TUNED = {
    "image": "AutoModelForImageClassification",
    "audio": "AutoModelForCTC",
    "text": "AutoModelForSequenceClassification",
}


def export(full: Full, folder: str | Path, which: str = "student", everything: bool = False) -> str:
    """Writes a folder with the student, or the teacher, and the head of a fine-tuned model; `everything`: beside it
    what `read` needs to give all of `full` back. Loads it through transformers in a process of its own and compares.

    Whole or not at all, and never over a folder that is there. Returns what to tell; raises ConfigError or
    CheckpointError, in one line, if the model has no such form, or another one comes out.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise ConfigError(f"{folder} is there already; choose another name, or delete it")
    tensors = full.encoder(which) | {n: t for n, t in full.tensors.items() if n.startswith("head.")}
    with _replacing(folder) as beside:
        tokenizer = _write(full, tensors, beside)
        if everything:
            _write_rest(full, which, beside / REST)
        back = _read_tensors(beside, full.model, full.head)
        if lost := [name for name in tensors if name not in back or not torch.equal(back[name], tensors[name])]:
            raise CheckpointError(f"{folder}: {', '.join(lost)} would not come back bit for bit")
        error, loaded, texts = _check(full, tensors, beside, tokenizer, folder)
    told = f"{folder}: {loaded}, {len(tensors)} tensors of the {which}; loaded by transformers, {error:.1e} off"
    return told + (f"; its tokenizer agrees on {texts} texts" if texts else "")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside `folder`, which it becomes unless an exception is raised."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
            flush(path)
        os.replace(beside, folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _form(model: ModelConfig) -> Any:
    """What knows names and config: `roberta` or `data2vec2`."""
    return roberta if model.modality == "text" else data2vec2


def _write(full: Full, tensors: dict[str, Tensor], folder: Path) -> Tokenizer | None:
    """All files but the rest; -> the tokenizer of a model of text, if it has one."""
    model, head, labels = full.model, full.head, full.labels
    for name, content in full.assets.items():
        (folder / ASSETS).mkdir(exist_ok=True)
        (folder / ASSETS / name).write_bytes(content)
    config = _form(model).config(model, head) | {"dtype": "float32"}
    tokenizer = None
    if model.modality != "text":
        data2vec2.write_processors(folder, model, labels)
    elif tokenizer := _tokenizer(full):
        fast_tokenizer.write(tokenizer, folder, model.text.tokens)
        config |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    if head is not None:
        names = labels or [f"LABEL_{i}" for i in range(head.outputs)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    config[OURS] = {"model": to_tree(model), "step": full.step} | ({} if head is None else {"head": to_tree(head)})
    data2vec2.write_json(folder / "config.json", config)
    save_file(_form(model).theirs(tensors, model, head), folder / WEIGHTS, {"format": "pt"})
    return tokenizer


def _tokenizer(full: Full) -> Tokenizer | None:
    """The one among the files that travel. Raises CheckpointError if it is not one, or not that of the model."""
    try:
        return tokenizer_among(full.assets, full.model.text)
    except (ConfigError, DataError) as error:
        raise CheckpointError(str(error)) from None


def _write_rest(full: Full, which: str, path: Path) -> None:
    rest = {n: t for n, t in full.tensors.items() if not n.startswith((f"{which}.", "head."))}
    settings = yaml.safe_dump(full.settings, sort_keys=False, width=110)
    save_file(rest, path, {"format": "pt", "config": settings, "which": which})


def read(folder: str | Path, teacher_from_student: bool = False) -> Full:
    """The full form of a folder that `export` wrote, bit for bit if everything is in it. Of a pre-trained encoder alone
    there is one only with `teacher_from_student`: the teacher is a copy, the decoder is as before its first step.

    Nothing that the folder brings is run. Raises CheckpointError, in one line, if it is no such folder.
    """
    folder = Path(folder).expanduser()
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))[OURS]
        model, head, step = model_of(settings), head_of(settings), int(settings.pop("step"))
        assets = {path.name: path.read_bytes() for path in sorted((folder / ASSETS).glob("*"))}
        if wrong := problems(model):
            raise ValueError("; ".join(wrong))
        tensors = _read_tensors(folder, model, head)
        which = "student"
        rest: dict[str, Tensor] = {}
        if whole := (folder / REST).exists():
            rest = load_file(folder / REST)
            with safe_open(folder / REST, "pt") as file:
                settings, which = yaml.safe_load(file.metadata()["config"]), file.metadata()["which"]
            model, head = model_of(settings), head_of(settings)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{folder} is no Hugging Face folder that python -m convert wrote ({words})") from None
    owned = {name if name.startswith("head.") else f"{which}.{name}": tensor for name, tensor in tensors.items()}
    if which == "teacher":  # it came with what it shares with the student, which is in the rest
        with shapes_only():
            own = Data2Vec(model).state_dict()
        owned = {n: t for n, t in owned.items() if n in own or n.replace("teacher", "student", 1) not in rest}
    elif head is None and not whole:
        if not teacher_from_student:
            raise CheckpointError(
                f"{folder} holds an encoder alone, and no teacher and decoder; {COPY_TEACHER} has the teacher start as "
                "a copy of it, and the decoder anew"
            )
        rest = _started(owned, model)
    try:
        return Full(owned | rest, settings, step, assets)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _read_tensors(folder: Path, model: ModelConfig, head: HeadConfig | None) -> dict[str, Tensor]:
    """An encoder, and `head.*`, under our names, in fp32."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return {name: tensor.float() for name, tensor in _form(model).ours(found, model, head).items()}


def _started(student: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Decoder and teacher of a pre-training that starts from `student.*`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = Data2Vec(model).state_dict()
    rest = {name: tensor for name, tensor in fresh.items() if name.startswith("decoder.")}
    for name in fresh:
        twin = name.replace("teacher", "student", 1)
        if name.startswith("teacher.") and twin in student:
            rest[name] = student[twin].clone()
    return rest


def _check(
    full: Full, tensors: Mapping[str, Tensor], folder: Path, tokenizer: Tokenizer | None, name: Path
) -> tuple[float, str, int]:
    """Loads `folder`, to be called `name`, as somebody does who has transformers alone -> how far outputs are off, what
    was loaded, and on how many texts the tokenizer agrees. Raises CheckpointError if it is another model."""
    model, head = full.model, full.head
    inputs, lengths, arguments = _sample(model)
    texts = fast_tokenizer.texts(tokenizer) if tokenizer is not None else []
    options = {"add_pooling_layer": False} if model.modality == "text" and head is None else {}
    request = {"auto": "AutoModel" if head is None else FINE_TUNED[model.modality], "options": options, "texts": texts}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        data2vec2.write_json(work / "request.json", request)
        save_file(arguments, work / "inputs.safetensors")
        quiet = {
            "HF_HOME": place,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        command = [sys.executable, "-P", str(OUTSIDER), str(folder), place]
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
        if ran.returncode:
            words = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
            raise CheckpointError(f"transformers cannot load {name}: {words[-1][:300]}")
        found = load_file(work / "outputs.safetensors")["output"]
        answer = json.loads((work / "answer.json").read_text())
    if answer["strange"]:
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in answer["strange"].items())
        raise CheckpointError(f"transformers finds in {name} another model's weights; {told}")
    expected = _outputs(model, head, tensors, inputs, lengths)
    if lengths is not None and expected.dim() == 3:  # what stands for padding means nothing
        expected, found = (without_padding(x, lengths) for x in (expected, found))
    error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1))
    if not error <= BOUND:
        raise CheckpointError(
            f"{name} is another model: transformers' outputs are {error:.1e} off, at most {BOUND:.0e} is allowed"
        )
    if tokenizer is not None:
        fast_tokenizer.refuse_other_ids(tokenizer, texts, answer["ids"], answer["pad"])
    return error, answer["class"], len(texts)


def _sample(model: ModelConfig) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Two fixed random inputs, of speech and text the second shorter: as the encoder takes them, (inputs, lengths in
    positions), and as transformers does, by the names of its arguments."""
    generator = torch.Generator().manual_seed(0)
    if model.modality == "image":
        pixels = torch.randn(2, model.image.channels, model.image.size, model.image.size, generator=generator)
        return pixels, None, {"pixel_values": pixels}
    size = min(model.length, RATE if model.modality == "audio" else 64)
    sizes = torch.tensor([size, max(1, 2 * size // 3)])
    mask = torch.arange(size) < sizes[:, None]
    lengths = torch.tensor([model.grid(int(n))[0] for n in sizes])
    if model.modality == "audio":
        waveforms = torch.randn(2, size, generator=generator) * mask
        return waveforms, lengths, {"input_values": waveforms, "attention_mask": mask.long()}
    pad, vocabulary = model.text.pad, model.text.vocabulary
    ids = (pad + torch.randint(1, vocabulary, (2, size), generator=generator)) % vocabulary
    ids = ids.masked_fill(~mask, pad)
    return ids, lengths, {"input_ids": ids, "attention_mask": mask.long()}


@torch.inference_mode()
def _outputs(
    model: ModelConfig, head: HeadConfig | None, tensors: Mapping[str, Tensor], inputs: Tensor, lengths: Tensor | None
) -> Tensor:
    """The encoder's (B, E+T, D), or what the head makes of it."""
    if head is not None:
        network = FineTuned(model, head).eval()
        network.load_state_dict({n if n.startswith("head.") else f"student.{n}": t for n, t in tensors.items()})
        return network(inputs, lengths)
    encoder = Encoder(model).eval()
    encoder.load_state_dict(tensors)
    features = encoder.local(inputs, lengths)
    return encoder(without_padding(features, lengths), lengths=lengths, ends=lengths)
