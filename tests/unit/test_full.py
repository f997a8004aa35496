"""The full form: what is written is read, and what does not fit is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convert import __main__ as program
from convert.describe import described
from models.config import HeadConfig
from models.data2vec import Data2Vec
from models.heads import FineTuned
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.config import load
from pretrain.full import Full
from pretrain.settings import ConfigError, to_tree

CONFIG = load("tests/tiny.yaml")
TEXT = load("configs/pretrain/text_demo.yaml", ["model.width=32", "model.depth=4", "model.text.vocabulary=50"])


def pretrained(config=CONFIG, assets=None):
    return Full(Data2Vec(config.model).state_dict(), to_tree(config), 7, assets or {})


def finetuned():
    head = HeadConfig(outputs=3)
    settings = {"task": "image", "model": to_tree(CONFIG.model), "head": to_tree(head)}
    return Full(FineTuned(CONFIG.model, head).state_dict(), settings, 9, {"labels.json": b'["a", "b", "c"]'})


@pytest.mark.parametrize("form", [pretrained(assets={"tokenizer.model": bytes(range(256))}), finetuned()])
def test_what_is_written_is_read(tmp_path: Path, form: Full) -> None:
    full.write(form, tmp_path / "a.safetensors")
    found = full.read(tmp_path / "a.safetensors")
    assert found.tensors.keys() == form.tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in form.tensors.items())
    assert (found.settings, found.step, found.assets) == (form.settings, form.step, form.assets)
    assert (found.model, found.head) == (form.model, form.head)
    assert full.settings(tmp_path / "a.safetensors") == form.settings
    found.network().load_state_dict(found.tensors)


def test_every_difference_is_told() -> None:
    tensors = Data2Vec(CONFIG.model).state_dict()
    tensors["surplus"] = torch.zeros(1)
    del tensors["decoder.proj.bias"]
    tensors["student.local.proj.bias"] = torch.zeros(33)
    with pytest.raises(CheckpointError) as told:
        Full(tensors, to_tree(CONFIG))
    for part in (
        "missing: decoder.proj.bias",
        "unexpected: surplus",
        "of another shape: student.local.proj.bias [33], not [32]",
    ):
        assert part in str(told.value)
    assert "\n" not in str(told.value)


def test_of_many_differences_a_line_tells_the_first(tmp_path: Path, monkeypatch, capsys) -> None:
    form = pretrained()
    full.write(form, tmp_path / "a.safetensors")
    settings = to_tree(CONFIG) | {"model": form.settings["model"] | {"depth": 4}}
    save_file(form.tensors, tmp_path / "b.safetensors", {"config": json.dumps(settings)})
    missing = sorted(Data2Vec(replace(CONFIG.model, depth=4)).state_dict().keys() - form.tensors.keys())
    assert len(missing) > 30
    with pytest.raises(CheckpointError) as told:
        full.read(tmp_path / "b.safetensors")
    line = f"{tmp_path}/b.safetensors: the weights do not fit the model; missing: {', '.join(missing[:3])} and "
    line += f"{len(missing) - 3} more"
    assert str(told.value) == line
    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors")])
    assert program.main() == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line}", *(f"  missing: {name}" for name in missing)]


def test_a_teacher_takes_of_the_student_what_it_has_not() -> None:
    form = pretrained(TEXT)
    for tensor in (tensor for name, tensor in form.tensors.items() if name.startswith("teacher.")):
        tensor += 1
    teacher, student = form.encoder("teacher"), form.encoder("student")
    assert teacher.keys() == student.keys()
    shared = [name for name in teacher if torch.equal(teacher[name], student[name])]
    assert shared and all(name.startswith("local.") for name in shared)
    assert sorted(shared) == sorted(name for name in teacher if name.startswith("local."))


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "broken.safetensors", {"config": "model: [", "step": "1"})
    save_file({"a": torch.zeros(1)}, tmp_path / "flat.safetensors", {"config": "3"})
    for name, words in (
        ("plain", "no config in its metadata"),
        ("text", "cannot read"),
        ("none", "cannot read"),
        ("broken", "cannot read"),
        ("flat", "has no sections"),
    ):
        with pytest.raises(CheckpointError, match=words) as told:
            full.read(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(told.value)
    (tmp_path / "other.pt").write_bytes(b"")
    for take in (full.read, full.settings, full.assets):
        with pytest.raises(ConfigError, match=r"python -m convert makes a NAME\.safetensors of it"):
            take(tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="fine-tuned model has no teacher"):
        finetuned().encoder("teacher")
    with pytest.raises(ConfigError, match="know teacher, student"):
        finetuned().encoder("ema")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("model: 3", "model is a section with keys, not 3"),
        ("model: {widht: 3}", "unknown key model.widht"),
        ("model: {width: x}", "model.width='x' should be a whole number"),
        ("model: {width: 32}\nhead: 4", "head is a section with keys, not 4"),
    ],
)
def test_settings_that_are_no_models_are_told_with_their_file(tmp_path: Path, config: str, words: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"config": config, "step": "1"})
    for take in (full.read, full.settings, described):
        with pytest.raises(ConfigError) as told:
            take(path)
        assert str(told.value).startswith(f"{path}: {words}")


def test_weights_that_do_not_fit_are_told_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"config": "model: {width: 32, heads: 4}", "step": "1"})
    with pytest.raises(CheckpointError, match=f"^{path}: the weights do not fit the model; missing: "):
        full.read(path)


@pytest.mark.parametrize("name", ["../../outside", "a/b", ""])
def test_what_travels_has_a_plain_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="is no name of a file"):
        pretrained(assets={name: b""})
