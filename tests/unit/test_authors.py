"""The authors' files, read, written and described; against what their own program computed and wrote."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from convert import __main__ as program
from convert import authors, check
from convert.describe import described
from convert.keymaps import SETTINGS, Unfit, our_settings, their_name, their_settings
from models.config import MODALITIES, ModelConfig
from models.data2vec import Data2Vec
from models.image import sincos_positions
from pretrain import full, pieces
from pretrain.checkpoint import CheckpointError
from pretrain.config import Config, load
from pretrain.full import Full
from pretrain.pieces import Piece
from pretrain.settings import ConfigError, flat, to_tree, to_yaml
from tests.parity.reference import our_config, renamed

PARITY = Path(__file__).parents[1] / "parity"
CASES = sorted((PARITY / "golden").glob("*.json"))
every_modality = pytest.mark.parametrize("modality", MODALITIES)


def authors_file(modality: str) -> Path:
    return PARITY / "checkpoints" / f"{modality}.pt"


def authors_state(modality: str) -> dict[str, Any]:
    return torch.load(authors_file(modality), weights_only=False)


def saved(state: dict[str, Any], path: Path) -> Path:
    torch.save(state, path)
    return path


def refused(call: Callable[[], Any], *words: str, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as told:
        call()
    message = str(told.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def golden(modality: str) -> tuple[dict[str, Tensor], Tensor]:
    """What the authors' program computes with its file, and the inputs."""
    vectors = load_file(PARITY / "checkpoints" / f"{modality}_features.safetensors")
    source = vectors["input.source"]
    return vectors, source.long() if modality == "text" else source


@every_modality
def test_features_are_the_authors(modality: str) -> None:
    found, notes = authors.read(authors_file(modality))
    assert notes == [] and found.step == 3 and found.head is None
    network = found.network()
    network.load_state_dict(found.tensors)
    network.eval()
    vectors, source = golden(modality)
    with torch.inference_mode():
        x, bias = network.student.context(network.student.local(source))
        layers = list(network.student.layers(x, bias))
    for i, (_, ffn) in enumerate(layers):
        torch.testing.assert_close(ffn, vectors[f"layer_result.{i}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(layers[-1][0], vectors["features"], atol=1e-5, rtol=0)
    assert len(layers) == found.model.depth == 2


@every_modality
def test_the_teacher_is_the_average_not_the_student(modality: str) -> None:
    found, _ = authors.read(authors_file(modality))
    averages = authors_state(modality)["model"]["_ema"]
    name = ("" if modality == "text" else "blocks.") + "1.mlp.fc1.weight"
    assert torch.equal(found.tensors["teacher.blocks.1.mlp.fc1.weight"], averages[name])
    assert not torch.equal(averages[name], found.tensors["student.blocks.1.mlp.fc1.weight"])


def identical(found: Full, expected: Full) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
    assert (found.settings, found.step, found.assets) == (expected.settings, expected.step, expected.assets)


@every_modality
def test_there_and_back_is_bit_for_bit(modality: str, tmp_path: Path) -> None:
    first, _ = authors.read(authors_file(modality))
    full.write(first, tmp_path / "a.safetensors")
    authors.write(full.read(tmp_path / "a.safetensors"), tmp_path / "b.pt")
    identical(authors.read(tmp_path / "b.pt")[0], first)
    theirs, ours = authors_state(modality), torch.load(tmp_path / "b.pt", weights_only=True)  # plain containers
    for owner in (lambda state: state["model"], lambda state: state["model"].pop("_ema")):
        expected, found = owner(theirs), owner(ours)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert name == "_ema" or (found[name].shape == value.shape and torch.equal(found[name], value)), name
    assert theirs.keys() <= ours.keys()
    assert ours["optimizer_history"][-1]["num_updates"] == 3 and ours["last_optimizer_state"] is None


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: value for key, item in tree.items() for path, value in leaves(item, f"{prefix}.{key}").items()}


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_settings_come_back_as_the_authors_wrote_them(case: Path) -> None:
    """All that the reference knows of the model, in its ten cases: every key, and every value."""
    content = json.loads(case.read_text())
    modality = content["modality"].lower()
    written = our_settings(content["config"], modality)
    found, expected = leaves(their_settings(written, modality)["model"]), leaves(content["config"]["model"])
    other = re.compile(rf"\.modalities\.(?!{modality}|_name)")
    expected = {key: value for key, value in expected.items() if not other.match(key)}
    assert found.keys() == expected.keys()
    spec, group = ".modalities.audio.feature_encoder_spec", ".decoder_group"
    assert {k: v for k, v in found.items() if k not in (spec, group)} == {
        k: v for k, v in expected.items() if k not in (spec, group)
    }
    assert eval(found.get(spec, "0")) == eval(expected.get(spec, "0"))


def test_what_the_cases_have_at_zero_is_mapped_as_the_glossary_says() -> None:
    cfg = authors_state("text")["cfg"]
    cfg["model"] |= {"encoder_dropout": 0.1, "attention_dropout": 0.2, "post_mlp_drop": 0.3, "layerdrop": 0.4}
    cfg["model"]["modalities"]["text"] |= {"prenet_dropout": 0.5, "dropout": 0.7, "mask_noise_std": 0.8}
    cfg["model"]["modalities"]["text"]["decoder"]["input_dropout"] = 0.6
    found = our_settings(cfg, "text")["model"]
    assert found["mask"]["noise_std"] == 0.8
    assert found["dropout"] == {
        **{"residual": 0.1, "attention": 0.2, "mlp": 0.3, "layer": 0.4},
        **{"prenet": 0.5, "decoder": 0.6, "embedding": 0.7},
    }


def test_every_setting_of_ours_is_one_of_the_models() -> None:
    known = {f"model.{key}" for key in flat(ModelConfig())} | set(flat(Config()))
    ours = [path for key in SETTINGS for path in key.ours]
    assert set(ours) <= known
    twice = {path for path in ours if ours.count(path) > 1}
    assert twice == {"model.num_masks"}


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_names_are_one_to_one(case: Path) -> None:
    """Every tensor of the reference's student and teacher, and no other."""
    model = our_config(json.loads(case.read_text()), 1e-3, "0", exempt_1d=True).model
    tensors, theirs = load_file(case.with_suffix(".safetensors")), set()
    for prefix, place in (("state.", ""), ("teacher.", f"{authors.EMA}.")):
        theirs |= {place + name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    names = authors.expected_names({"model": to_tree(model)})
    assert names.keys() == theirs and len(theirs) > 40
    ours = [name for name, _ in names.values() if name is not None]
    assert sorted(ours) == sorted(Data2Vec(model).state_dict())
    assert len(names) - len(ours) == 2 * (model.modality == "image")


@pytest.mark.parametrize(
    "name", ["modality_encoders.AUDIO.extra", "decoder.x", "modality_encoders.TEXT.alibi_scale", ""]
)
def test_a_name_that_is_nobodys_is_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        their_name(f"student.{name}", "text")
    with pytest.raises(KeyError):
        renamed({f"state.{name}": torch.zeros(1)}, "state.", "student", Config().model)


@pytest.mark.parametrize(("width", "grid"), [(768, 14), (1024, 14), (1280, 16), (192, 7)])
def test_positions_are_those_that_the_authors_compute(width: int, grid: int) -> None:
    """MAE's table, by its own steps in NumPy, bit for bit."""
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    first, second = np.meshgrid(np.arange(grid, dtype=np.float32), np.arange(grid, dtype=np.float32))
    halves = [np.einsum("m,d->md", axis.reshape(-1).astype(np.float64), omega) for axis in (first, second)]
    expected = np.concatenate([f(half) for half in halves for f in (np.sin, np.cos)], axis=1)
    assert torch.equal(sincos_positions(width, grid), torch.from_numpy(expected).float())


@pytest.mark.parametrize("case", [case for case in CASES if "image" in case.stem], ids=lambda path: path.stem)
def test_positions_of_the_golden_cases_are_derived(case: Path) -> None:
    expected = load_file(case.with_suffix(".safetensors"))[
        "state.modality_encoders.IMAGE.fixed_positional_encoder.positions"
    ]
    _, positions, width = expected.shape
    assert torch.equal(sincos_positions(width, round(positions**0.5)), expected[0])


def test_every_name_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    state = authors_state("audio")
    model = state["model"]
    del model["blocks.0.norm1.weight"], model["_ema"]["blocks.1.norm2.bias"]
    model["blocks.7.norm1.weight"] = torch.zeros(32)
    model["_ema"]["strange"] = torch.zeros(1)
    model["blocks.1.attn.qkv.weight"] = torch.zeros(32, 32)
    message = refused(
        lambda: authors.read(saved(state, tmp_path / "x.pt")), "missing: _ema.blocks.1.norm2.bias, blocks.0"
    )
    assert "unexpected: _ema.strange, blocks.7.norm1.weight" in message
    assert "blocks.1.attn.qkv.weight [32, 32], not [96, 32]" in message


def test_many_names_are_listed_below_the_line(tmp_path: Path, monkeypatch, capsys) -> None:
    state = authors_state("image")
    lost = sorted(name for name in state["model"] if name.startswith("blocks.1."))
    for name in lost:
        del state["model"][name]
    state["model"]["blocks.9.x"] = torch.zeros(1)
    path = saved(state, tmp_path / "x.pt")
    monkeypatch.setattr("sys.argv", ["convert", str(path), str(tmp_path / "x.safetensors")])
    assert program.main() == 2 and not (tmp_path / "x.safetensors").exists()
    first, *rest = capsys.readouterr().err.splitlines()
    assert rest == [*(f"  missing: {name}" for name in lost), "  unexpected: blocks.9.x"] and len(lost) > 9
    assert first == (
        f"error: cannot take {path}: the weights do not fit the model; missing: {', '.join(lost[:3])} and "
        f"{len(lost) - 3} more; unexpected: blocks.9.x"
    )


def test_what_is_no_weight_is_refused(tmp_path: Path) -> None:
    state = authors_state("text")
    state["model"]["blocks.0.norm1.weight"] = torch.zeros(32, dtype=torch.int64)
    state["model"]["version"] = 3
    refused(lambda: authors.read(saved(state, tmp_path / "x.pt")), "no floating-point tensors: ", "version", "norm1")


@every_modality
def test_without_a_teacher_a_flag_has_to_be_given(modality: str, tmp_path: Path) -> None:
    state = authors_state(modality)
    del state["model"]["_ema"]
    path = saved(state, tmp_path / "x.pt")
    refused(lambda: authors.read(path), "has no teacher", "--teacher-from-student")
    found, notes = authors.read(path, teacher_from_student=True)
    assert len(notes) == 1 and "copy of the student" in notes[0]
    copies = [name for name in found.tensors if name.startswith("teacher.")]
    assert len(copies) > 20
    for name in copies:
        student = found.tensors[name.replace("teacher", "student", 1)]
        assert torch.equal(found.tensors[name], student) and found.tensors[name].data_ptr() != student.data_ptr()
    full.write(found, tmp_path / "x.safetensors")
    assert "without a teacher" in described(path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_said_so(kind: torch.dtype, tmp_path: Path) -> None:
    state = authors_state("image")
    averages = state["model"].pop("_ema")
    state["model"] = {name: value.to(kind) for name, value in state["model"].items()} | {"_ema": averages}
    path = saved(state, tmp_path / "x.pt")
    found, notes = authors.read(path)
    name = str(kind).removeprefix("torch.")
    assert notes == [f"46 of 88 tensors are {name} in {path}; written as float32"] or name in notes[0]
    weight = "blocks.0.attn.qkv.weight"
    assert torch.equal(found.tensors[f"student.{weight}"], state["model"][weight].float())
    assert torch.equal(found.tensors[f"teacher.{weight}"], averages[weight])
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert f"{name} (" in described(path) and "float32 (41 tensors)" in described(path)


def test_positions_that_are_not_fixed_are_refused(tmp_path: Path) -> None:
    state = authors_state("image")
    state["model"]["modality_encoders.IMAGE.fixed_positional_encoder.positions"][0, 3, 5] += 1e-3
    refused(lambda: authors.read(saved(state, tmp_path / "x.pt")), "fixed_positional_encoder.positions", "1.0e-03 off")


def test_older_alibi_scales_are_taken(tmp_path: Path) -> None:
    state = authors_state("audio")
    expected = state["model"]["modality_encoders.AUDIO.alibi_scale"].clone()
    state["model"]["modality_encoders.AUDIO.alibi_scale"] = expected[0]
    assert torch.equal(
        authors.read(saved(state, tmp_path / "x.pt"))[0].tensors["student.alibi.scale"], expected.flatten()
    )


def test_settings_that_cannot_be_had_are_listed() -> None:
    cfg = authors_state("audio")["cfg"]
    cfg["model"] |= {"layer_norm_first": True, "recon_loss": 0.5}
    cfg["model"]["modalities"]["audio"] |= {"learned_alibi": True, "feature_encoder_spec": "__import__('os')"}
    del cfg["model"]["num_heads"], cfg["task"]["max_sample_size"]
    cfg["model"]["embed_dim"] = "???"
    words = (
        *("model.layer_norm_first is True, only False", "model.recon_loss is 0.5", "learned_alibi is True"),
        *("feature_encoder_spec cannot be read", "model.num_heads is missing", "model.embed_dim is missing"),
    )
    message = refused(lambda: our_settings(cfg, "audio"), *words, error=Unfit)
    assert message.count(";") == 5
    assert "recon_loss" not in refused(lambda: our_settings(cfg, "audio", fine_tuned=True), error=Unfit)


def test_interpolations_are_followed() -> None:
    cfg = authors_state("image")["cfg"]
    cfg["model"]["ema_anneal_end_step"] = "${optimization.max_update}"
    assert our_settings(cfg, "image")["ema"]["anneal_steps"] == cfg["optimization"]["max_update"] == 375300


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["cfg"]["model"].update(_name="data2vec_audio"), ("called 'data2vec_audio'", "data2vec_multi")),
        (lambda s: s.pop("cfg"), ("no checkpoint of the authors' program",)),
        (lambda s: s.pop("model"), ("no checkpoint of the authors' program",)),
        (lambda s: s["model"].update(_ema=[1]), ("have no names",)),
        (lambda s: s["model"].update({3: torch.ones(1)}), ("have no names",)),
        (lambda s: s["cfg"]["model"].update(depth=10**9), ("tensors for 1000000000 layers",)),
        (lambda s: s["cfg"]["model"].update(embed_dim="wide"), ("model.width='wide' should be a whole number",)),
        (lambda s: s["cfg"]["model"].update(num_heads=0), ("model.heads=0 must be at least 1",)),
        (lambda s: s.update(settings={"model": {"wdth": 1}}), ("unknown key model.wdth",)),
        (lambda s: s["model"].update({"modality_encoders.TEXT.x": torch.ones(1)}), ("encoders of image, text",)),
        (lambda s: s.update(assets={"../x": torch.zeros(1, dtype=torch.uint8)}), ("'../x' among its assets",)),
    ],
)
def test_other_files_are_refused(
    change: Callable[[dict[str, Any]], Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    state = authors_state("image")
    change(state)
    refused(lambda: authors.read(saved(state, tmp_path / "x.pt")), *words)


# Fine-tuned files, as the reference's classes name things: mae_image_classification.py, wav2vec2_asr.py and
# data2vec_text_classification.py. The encoder is that of the pre-trained file, the head's numbers are new.

LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "Ž"]


def fine_tuned_state(modality: str) -> dict[str, Any]:
    state, random = authors_state(modality), torch.Generator().manual_seed(1)
    prefix = "w2v_encoder.w2v_model." if modality == "audio" else "model."
    weights = {
        prefix + name: value for name, value in state["model"].items() if name != "_ema" and ".decoder." not in name
    }
    sentence = "classification_heads.sentence_classification_head"
    heads = {
        "image": {"fc_norm.weight": (32,), "fc_norm.bias": (32,), "head.weight": (5, 32), "head.bias": (5,)},
        "audio": {"w2v_encoder.proj.weight": (7, 32), "w2v_encoder.proj.bias": (7,)},
        "text": {
            f"{sentence}.{layer}": shape
            for layer, shape in (
                *(("dense.weight", (32, 32)), ("dense.bias", (32,))),
                *(("out_proj.weight", (3, 32)), ("out_proj.bias", (3,))),
            )
        },
    }
    weights |= {name: torch.randn(shape, generator=random) for name, shape in heads[modality].items()}
    own: dict[str, Any] = {
        "image": {"_name": "mae_image_classification", "use_fc_norm": True, "prediction_mode": "MEAN_POOLING"},
        "audio": {"_name": "wav2vec_ctc", "final_dropout": 0.1, "normalize": "${task.normalize}", "blank_weight": 0},
        "text": {"_name": "data2vec_text_classification", "pooler_dropout": 0.2, "pooler_activation_fn": "tanh"},
    }[modality]
    if modality == "audio":  # fine-tuning overrides what pre-training had
        state["cfg"]["model"]["modalities"]["audio"] |= {"local_grad_mult": 0.0, "mask_channel_prob": 0.25}
        state["task_state"] = {"target_dictionary": {"symbols": LETTERS}}
    own["w2v_args" if modality == "audio" else "pretrained_model_args"] = state["cfg"]
    return state | {"model": weights, "cfg": {"model": own, "task": {"_name": "x", "normalize": True}}}


def expected_outputs(modality: str, weights: dict[str, Tensor]) -> Tensor:
    """The head on the authors' own features."""
    features = golden(modality)[0]["features"]
    if modality == "image":
        pooled = F.layer_norm(features[:, 1:].mean(1), (32,), weights["fc_norm.weight"], weights["fc_norm.bias"], 1e-6)
        return pooled @ weights["head.weight"].T + weights["head.bias"]
    if modality == "audio":
        return features @ weights["w2v_encoder.proj.weight"].T + weights["w2v_encoder.proj.bias"]
    name = "classification_heads.sentence_classification_head."
    hidden = (features[:, 0] @ weights[name + "dense.weight"].T + weights[name + "dense.bias"]).tanh()
    return hidden @ weights[name + "out_proj.weight"].T + weights[name + "out_proj.bias"]


@every_modality
def test_a_fine_tuned_file_computes_what_it_should_and_goes_back(modality: str, tmp_path: Path) -> None:
    state = fine_tuned_state(modality)
    found, notes = authors.read(saved(state, tmp_path / "x.pt"))
    assert notes == [] and found.step == 3 and found.head is not None
    assert (found.head.outputs, found.head.dropout) == {"image": (5, 0), "audio": (7, 0.1), "text": (3, 0.2)}[modality]
    network = found.network()
    network.load_state_dict(found.tensors)
    with torch.inference_mode():
        outputs = network.eval()(golden(modality)[1])
    torch.testing.assert_close(outputs, expected_outputs(modality, state["model"]), atol=3e-5, rtol=0)
    authors.write(found, tmp_path / "y.pt")
    identical(authors.read(tmp_path / "y.pt")[0], found)
    written = torch.load(tmp_path / "y.pt", weights_only=True)
    assert written["model"].keys() == state["model"].keys()
    assert all(torch.equal(written["model"][name], value) for name, value in state["model"].items())
    inner = "w2v_args" if modality == "audio" else "pretrained_model_args"
    assert (
        leaves(written["cfg"]["model"][inner]["model"]).keys() <= leaves(state["cfg"]["model"][inner]["model"]).keys()
    )
    del written["settings"]  # and without what we put beside it
    again = authors.read(saved(written, tmp_path / "z.pt"))[0]
    assert again.model == found.model and again.head == found.head
    assert f"fine-tuned, {found.head.outputs} outputs, {modality}: " in described(tmp_path / "y.pt")


def test_letters_travel(tmp_path: Path) -> None:
    found, _ = authors.read(saved(fine_tuned_state("audio"), tmp_path / "x.pt"))
    assert json.loads(found.assets["labels.json"]) == LETTERS
    authors.write(found, tmp_path / "y.pt")
    assert authors.read(tmp_path / "y.pt")[0].assets == found.assets
    assert "<s>, <pad>, </s>, <unk>, |, E, ... (7 in all)" in described(tmp_path / "y.pt")
    state = fine_tuned_state("audio")
    state["task_state"]["target_dictionary"]["symbols"] = LETTERS[:-1]
    refused(lambda: authors.read(saved(state, tmp_path / "x.pt")), "6 symbols for 7 outputs")


def test_fine_tuned_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    state = fine_tuned_state("image")
    state["cfg"]["model"]["prediction_mode"] = "CLS_TOKEN"
    refused(
        lambda: authors.read(saved(state, tmp_path / "x.pt")), "prediction_mode is 'CLS_TOKEN', only 'MEAN_POOLING'"
    )
    state = fine_tuned_state("image")
    del state["model"]["head.weight"], state["model"]["fc_norm.bias"]
    refused(lambda: authors.read(saved(state, tmp_path / "x.pt")), "missing: fc_norm.bias, head.weight")


# Our own runs


@pytest.fixture
def ours() -> Full:
    """A pre-trained model of this project, with settings that the reference has no words for."""
    config = load("tests/tiny.yaml", ["model.image.mean=[0.1]", "model.image.std=[0.2]"])
    settings = to_tree(config)
    network = full.network_of(settings)
    for tensor in network.state_dict().values():
        tensor.add_(torch.randn(tensor.shape) / 10)
    assets = {"tokenizer.model": bytes(range(256)), "labels.json": b'["a", "b"]', "my.tokenizer.json": b""}
    return Full(network.state_dict(), settings, 7, assets)


def test_our_model_comes_back_with_all_its_settings_and_files(ours: Full, tmp_path: Path) -> None:
    authors.write(ours, tmp_path / "x.pt")
    found, _ = authors.read(tmp_path / "x.pt")
    identical(found, ours)
    assert our_settings(torch.load(tmp_path / "x.pt")["cfg"], "image")["model"]["width"] == ours.model.width


def converted(monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> int:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    return program.main()


def test_the_program_goes_by_the_targets_name(
    ours: Full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full.write(ours, tmp_path / "a.safetensors")
    assert converted(monkeypatch, tmp_path / "a.safetensors", tmp_path / "b.pt") == 0
    assert converted(monkeypatch, tmp_path / "b.pt", tmp_path / "c.safetensors") == 0
    assert capsys.readouterr().out.count("read again, its features are 0.0e+00 off") == 2
    identical(full.read(tmp_path / "c.safetensors"), ours)
    for target, words in (
        ("a.safetensors", "is there already"),
        ("a.ckpt", ".ckpt is no form"),
        ("no/a.pt", "cannot write"),
    ):
        assert converted(monkeypatch, tmp_path / "b.pt", tmp_path / target) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1 and told.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.pt", "c.safetensors"]


def test_the_flag_reaches_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = authors_state("text")
    del state["model"]["_ema"]
    path = saved(state, tmp_path / "x.pt")
    assert converted(monkeypatch, path, tmp_path / "x.safetensors") == 2
    assert "--teacher-from-student" in capsys.readouterr().err
    assert converted(monkeypatch, path, tmp_path / "x.safetensors", "--teacher-from-student") == 0
    assert "it starts as a copy of the student" in capsys.readouterr().out


def test_a_target_that_computes_otherwise_is_deleted(
    ours: Full, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.write(ours, tmp_path / "a.safetensors")
    write = authors.write
    for name in ("student.blocks.0.mlp.fc1.weight", "teacher.blocks.0.mlp.fc1.weight", "decoder.proj.bias"):
        off = dict(ours.tensors) | {name: ours.tensors[name] * 1.1}
        monkeypatch.setattr(authors, "write", lambda found, path, off=off: write(Full(off, found.settings), path))
        refused(lambda: program.convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.pt")), "is another model")
        assert not (tmp_path / "b.pt").exists()
    not_a_number = dict(ours.tensors) | {"decoder.proj.bias": ours.tensors["decoder.proj.bias"] * float("nan")}
    with pytest.raises(CheckpointError, match="nan off"):
        check.refuse_other(ours, Full(not_a_number, ours.settings), "x")


def test_what_a_run_folder_is_is_told(ours: Full, tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step_00000007"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text(step.name)
    state = {"step": 7, "ranks": 16, "zero_stage": 2, "tensor_parallel": 4, "precision": "bf16"}
    (step / "state.json").write_text(json.dumps(state))
    (step / "config.yaml").write_text(to_yaml(load("tests/tiny.yaml")))
    (tmp_path / "my.model").write_bytes(bytes(1500))
    found = [
        Piece(
            name.replace("teacher.", "teacher/") if name.startswith("teacher.") else f"master/{name}",
            tuple(tensor.shape),
            0,
            tensor.flatten(),
        )
        for name, tensor in ours.tensors.items()
    ]
    pieces.write(pieces.file(step, 0), found)
    told = described(tmp_path)
    count = sum(tensor.numel() for name, tensor in ours.tensors.items() if name.startswith("student."))
    for words in (
        *("16 ranks, ZeRO 2, tensor parallel 4, trained in bf16", "step       7", "my.model (1.5 kB)"),
        *(f"student {count:,}", "pre-trained, image:", "step_00000007"),
    ):
        assert words in told
    (step / "state.json").write_text('{"step": 7}')
    refused(lambda: described(tmp_path), "state.json is damaged")


def test_other_forms_are_told(ours: Full, tmp_path: Path) -> None:
    full.write(ours, tmp_path / "a.safetensors")
    told = described(tmp_path / "a.safetensors")
    assert "full (safetensors)" in told and "tokenizer.model (256 B)" in told and "labels     a, b" in told
    folder = tmp_path / "hf"
    folder.mkdir()
    (tmp_path / "a.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "roberta", "architectures": ["M"]}')
    told = described(folder)
    assert "Hugging Face folder (roberta, M)" in told and "student " in told and "step       unknown" in told
    own = json.dumps({"model_type": "data2vec2", "data2vec2": {"model": ours.settings["model"], "step": 7}})
    (folder / "config.json").write_text(own)
    told = described(folder)
    assert "pre-trained, image: 28 pixels" in told and "step       7" in told and "float32 (" in told
    (folder / "config.json").write_text("[]")
    refused(lambda: described(folder), "config.json is damaged")
    (folder / "model.safetensors").write_bytes(b"short")
    refused(lambda: described(folder), "cannot read")
    refused(lambda: described(tmp_path), "neither a run folder nor a checkpoint", error=ConfigError)
    refused(lambda: described(tmp_path / "none.safetensors"), "cannot read")
    refused(lambda: described(tmp_path / "none.pt"), "No such file")
