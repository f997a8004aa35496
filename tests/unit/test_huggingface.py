"""Hugging Face folders: a process that has transformers and not this project computes what we compute, reads the same
ids, and what went out comes back bit for bit. That process is started once, for all folders."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import models as token_models
from tokenizers import pre_tokenizers

from convert import authors, data2vec2, fast_tokenizer, huggingface, roberta
from finetune.features import load_encoder
from models.config import HeadConfig, ModelConfig, TextConfig
from models.data2vec import Data2Vec
from models.heads import FineTuned
from models.image import sincos_positions
from models.masks import real_positions
from pretrain import full as forms
from pretrain.checkpoint import CheckpointError
from pretrain.config import load
from pretrain.data.tokenizer import open_tokenizer, train_tokenizer
from pretrain.full import Full
from pretrain.settings import ConfigError, to_tree
from tests.unit.test_imports import NAMES, imported

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests/parity/checkpoints"
REFERENCE = {"image": "pixel_values", "audio": "input_values", "text": "input_ids"}
PLAIN = ["model.extra_tokens=0", "model.norm_eps=1e-5", "model.loss.cls=0"]
AUDIO = ["model.modality=audio", "train.micro_batch=64000", "train.batch_size=64000", "data.audio.min_seconds=1"]
AUDIO += [
    "model.audio={seconds: 2, channels: 16, position_layers: 2, position_groups: 4}",
    "model.width=48",
    "model.heads=6",
]
TEXT = ["model.modality=text", "model.prenet_depth=0", "model.text={vocabulary: 600, tokens: 24}"]
LETTERS = ["<blank>", "|", "a", "b", "c"]
CLASSES = ["boot", "coat"]
LINES = ["a lovely, warm film", "  Dreadful </s> it was <pad> ", "náïve Æther \u2581 100% \u4f60\u597d", "<s>", "x"]
STRANGER = """
import json, sys
from importlib.util import find_spec
import numpy as np, torch, transformers
from safetensors.torch import load_file, save_file

assert not any(find_spec(name) for name in ("models", "pretrain", "convert")), "the project is within reach"
transformers.utils.logging.disable_progress_bar()
jobs, answers, outputs = json.load(open("jobs.json")), {}, {}
for name, job in jobs.items():
    trust = {"trust_remote_code": True}
    model, info = getattr(transformers, job["auto"]).from_pretrained(
        name, output_loading_info=True, **trust, **job["options"])
    with torch.no_grad():
        found = model(**load_file(name + ".inputs.safetensors"), output_hidden_states=True)
    answers[name] = {"strange": [str(v) for v in info.values() if v], "class": type(model).__name__}
    outputs |= {f"{name}.{i}": state.contiguous().clone() for i, state in enumerate(found.hidden_states)}
    outputs |= {f"{name}.{k}": found[k].clone() for k in ("logits", "last_hidden_state", "pooler_output") if k in found}
    if job["lines"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        pair = tokenizer("x", "x")
        answers[name] |= {"ids": tokenizer(job["lines"])["input_ids"], "pad": tokenizer.pad_token_id,
                          "pair": pair["input_ids"], "back": tokenizer.decode(tokenizer("a film")["input_ids"],
                          skip_special_tokens=True), "longest": tokenizer.model_max_length}
    if name == "image":
        module = sys.modules[type(model).__module__]
        for size, grid in (("same", 4), ("double", 8)):
            outputs[f"positions.{size}"] = module.sincos_positions(32, grid, grid, 4, torch.device("cpu"))
    if name == "audio_fine":
        loaded = load_file(name + ".inputs.safetensors")
        letters = torch.tensor([[2, 3, 3, -100], [4, 1, -1, -1], [2, 2, -1, -1]])
        outputs["ctc"] = model(**loaded, labels=letters).loss.detach()
        hear = transformers.pipeline("automatic-speech-recognition", model=name, **trust)
        answers["heard"] = hear(loaded["input_values"][0].numpy() * 3 + 2)["text"]
    if name == "image_fine":
        see = transformers.pipeline("image-classification", model=name, **trust)
        answers["seen"] = see("grey.png")
json.dump(answers, open("answers.json", "w"))
save_file(outputs, "outputs.safetensors")
"""


class Case(NamedTuple):
    """What a folder is made of, and how it is to be loaded."""

    full: Full
    which: str
    auto: str


def small(*overrides: str) -> ModelConfig:
    return load(ROOT / "tests/tiny.yaml", list(overrides)).model


def made(model: ModelConfig, labels: list[str] | None = None, assets: dict[str, bytes] | None = None) -> Full:
    """A model of which no two parameters are alike."""
    torch.manual_seed(len(labels or ()))
    head = HeadConfig(len(labels), 0.1) if labels else None
    network = Data2Vec(model) if head is None else FineTuned(model, head)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if network.student.alibi is not None:
            network.student.alibi.scale[1] = -1
        if labels and model.modality == "image":  # little enough for the epsilon of the head to be seen
            network.student.blocks[-1].norm2.weight *= 0.01
            network.student.blocks[-1].norm2.bias *= 0.01
    settings: dict[str, Any] = {"model": to_tree(model), "train": {"seed": 3}}
    settings |= {"head": to_tree(head)} if head else {}
    assets = dict(assets or {}) | ({"labels.json": json.dumps(labels).encode()} if labels else {})
    return Full(dict(network.state_dict()), settings, 7, assets)


def word_pieces() -> bytes:
    """A tokenizer.json whose padding is id 0."""
    words = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        *"abcdefghilmnorstuvwx",
        "film",
        "lovely",
        "warm",
        "100",
        "%",
        ",",
        "</s>",
    ]
    tokenizer = tokenizers.Tokenizer(token_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    tokenizer.enable_truncation(4)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizers")
    reviews = gzip.decompress((ROOT / "data/movie_reviews/train.tsv.gz").read_bytes()).decode().splitlines()
    (folder / "t.txt").write_text("\n".join(line.split("\t")[1] for line in reviews[:800]))
    for kind in ("bpe", "unigram"):
        train_tokenizer([folder / "t.txt"], folder / f"{kind}.model", vocabulary=600, kind=kind)
    with open(folder / "late.model", "wb") as late:  # neither padding nor bytes
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "t.txt"), model_writer=late, vocab_size=599, model_type="unigram", minloglevel=2
        )
    return {path.name: path.read_bytes() for path in folder.glob("*.model")} | {"tokenizer.json": word_pieces()}


@pytest.fixture(scope="module")
def cases(tokenizer_files) -> dict[str, Case]:
    audio, text = small(*PLAIN, *AUDIO), small(*PLAIN, *TEXT)
    files = {name: {name: content} for name, content in tokenizer_files.items()}
    vocabulary = tokenizers.Tokenizer.from_str(tokenizer_files["tokenizer.json"].decode()).get_vocab_size()
    first = replace(text, text=TextConfig(vocabulary, 24, 0))
    late = replace(text, text=TextConfig(600, 24, 599))
    grade = made(text, ["grade"], files["unigram.model"])
    return {
        "image": Case(made(small()), "student", "AutoModel"),
        "image_teacher": Case(made(small("model.image.positions=6")), "teacher", "AutoModel"),
        "image_fine": Case(made(small(), CLASSES), "student", "AutoModelForImageClassification"),
        "audio": Case(made(audio), "student", "AutoModel"),
        "audio_teacher": Case(made(replace(audio, heads=4, prenet_depth=0)), "teacher", "AutoModel"),
        "audio_fine": Case(made(audio, LETTERS), "student", "AutoModelForCTC"),
        "text": Case(made(text, assets=files["bpe.model"]), "student", "AutoModel"),
        "text_teacher": Case(made(first, assets=files["tokenizer.json"]), "teacher", "AutoModel"),
        "text_late": Case(made(late, assets=files["late.model"]), "student", "AutoModel"),
        "text_fine": Case(made(text, CLASSES, files["bpe.model"]), "student", "AutoModelForSequenceClassification"),
        "text_grade": Case(grade, "student", "AutoModelForSequenceClassification"),
    }


KINDS = ["image", "image_teacher", "image_fine", "audio", "audio_teacher", "audio_fine"]
TEXTS = ["text", "text_teacher", "text_late", "text_fine", "text_grade"]
every_kind = pytest.mark.parametrize("kind", [*KINDS, *TEXTS])


def inputs_of(model: ModelConfig) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """Arguments for transformers; the same for us, and lengths in positions. Three samples, two of them padded."""
    torch.manual_seed(5)
    if model.modality == "image":
        pixels = torch.randn(3, 1, 28, 28)
        return {"pixel_values": pixels}, pixels, None
    size = 16_000 if model.modality == "audio" else 20
    sizes = torch.tensor([size, size // 2, size // 4])
    mask = torch.arange(size) < sizes[:, None]
    lengths = torch.tensor([model.grid(int(n))[0] for n in sizes])
    if model.modality == "audio":
        waves = torch.stack([F.layer_norm(w, w.shape) for w in torch.randn(3, size)]) * mask
        return {"input_values": waves, "attention_mask": mask.long()}, waves, lengths
    ids = torch.randint(4, 30, (3, size)).masked_fill(~mask, model.text.pad)
    return {"input_ids": ids, "attention_mask": mask.long()}, ids, lengths


class Told(NamedTuple):
    folder: Path
    answers: dict[str, Any]
    outputs: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def told(cases, tmp_path_factory) -> Told:
    """All cases, and the authors' checkpoints, written without our own check; what a stranger makes of them."""
    folder = tmp_path_factory.mktemp("folders")
    jobs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "_check", lambda *_: (0.0, "", 0))
        for name, (full, which, auto) in cases.items():
            huggingface.export(full, folder / name, which)
            save_file(inputs_of(full.model)[0], folder / f"{name}.inputs.safetensors")
            text = full.model.modality == "text"
            options = {"add_pooling_layer": False} if text and full.head is None else {}
            jobs[name] = {"auto": auto, "options": options, "lines": LINES if text else []}
        for modality, argument in REFERENCE.items():
            full, _ = authors.read(CHECKPOINTS / f"{modality}.pt")
            huggingface.export(full, folder / f"reference_{modality}")
            source = load_file(CHECKPOINTS / f"{modality}_features.safetensors")["input.source"]
            inputs = {argument: source.long() if modality == "text" else source}
            save_file(inputs, folder / f"reference_{modality}.inputs.safetensors")
            options = {"add_pooling_layer": False} if modality == "text" else {}
            jobs[f"reference_{modality}"] = {"auto": "AutoModel", "options": options, "lines": []}
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save(folder / "grey.png")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "stranger.py").write_text(STRANGER)
    run_alone([folder / "stranger.py"], folder)
    return Told(folder, json.loads((folder / "answers.json").read_text()), load_file(folder / "outputs.safetensors"))


def run_alone(line: list[Any], folder: Path) -> None:
    own = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-I", *map(str, line)],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


@every_kind
def test_a_stranger_computes_what_we_compute(kind, cases, told, tmp_path):
    full, which, _ = cases[kind]
    _, inputs, lengths = inputs_of(full.model)
    assert told.answers[kind]["strange"] == []
    if full.head is None:
        forms.write(full, tmp_path / "full.safetensors")
        ours = load_encoder(tmp_path / "full.safetensors", which).features(inputs, lengths=lengths)
        positions = told.outputs[f"{kind}.last_hidden_state"][:, full.model.extra_tokens :]
        real = real_positions(positions, lengths)
        pairs = [(ours.positions * real, positions * real)]
        if full.model.modality != "text":
            pairs.append((ours.pooled, told.outputs[f"{kind}.pooler_output"]))
    else:
        network = FineTuned(full.model, full.head).eval()
        network.load_state_dict(full.tensors)
        with torch.no_grad():
            logits = network(inputs, lengths)
        found = told.outputs[f"{kind}.logits"]
        real = real_positions(logits, lengths) if logits.dim() == 3 else 1
        pairs = [(logits * real, found * real)]
    for expected, found in pairs:
        assert expected.abs().max() > 0.1
        assert (expected - found).abs().max() < 1e-5


@pytest.mark.parametrize("modality", REFERENCE)
def test_a_stranger_computes_what_the_authors_program_computes(modality, told):
    expected = load_file(CHECKPOINTS / f"{modality}_features.safetensors")["features"]
    assert (expected - told.outputs[f"reference_{modality}.last_hidden_state"]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["audio_fine", "text_fine"])
def test_padding_changes_nothing(kind, cases, told):
    full = cases[kind].full
    network = FineTuned(full.model, full.head).eval()
    network.load_state_dict(full.tensors)
    arguments, inputs, _ = inputs_of(full.model)
    for i, size in enumerate(arguments["attention_mask"].sum(1).tolist()):
        with torch.no_grad():
            alone = network(inputs[i : i + 1, :size])[0]
        found = told.outputs[f"{kind}.logits"][i]
        assert (alone - (found[: len(alone)])).abs().max() < 1e-5


def test_hidden_states_are_those_of_all_blocks(cases, told):
    full, _, _ = cases["image"]
    _, inputs, _ = inputs_of(full.model)
    network = full.network()
    network.load_state_dict(full.tensors)
    encoder = network.student.eval()
    with torch.no_grad():
        x = encoder.context_norm(encoder.extra_tokens(encoder.positions(encoder.local(inputs), None)))
        states = [x]
        for block in (*encoder.prenet, *encoder.blocks):
            x = block(x)[0]
            states.append(x)
    assert f"image.{len(states)}" not in told.outputs
    for i, state in enumerate(states):
        assert (state - told.outputs[f"image.{i}"]).abs().max() < 1e-5


@every_kind
def test_everything_comes_back_bit_for_bit(kind, cases, tmp_path, monkeypatch):
    full, which, _ = cases[kind]
    monkeypatch.setattr(huggingface, "_check", lambda *_: (0.0, "", 0))
    huggingface.export(full, tmp_path / "all", which, everything=True)
    refuse_difference(huggingface.read(tmp_path / "all"), full)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all"]


def refuse_difference(found: Full, full: Full) -> None:
    assert found.tensors.keys() == full.tensors.keys()
    for name, tensor in full.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor), name
    assert (found.settings, found.step, found.assets) == (full.settings, full.step, full.assets)


@pytest.mark.parametrize("kind", ["image_fine", "audio_fine", "text_fine"])
def test_a_fine_tuned_model_needs_no_rest(kind, cases, told):
    full = cases[kind].full
    settings = {key: full.settings[key] for key in ("model", "head")}
    assert not (told.folder / kind / huggingface.REST).exists()
    refuse_difference(huggingface.read(told.folder / kind), Full(full.tensors, settings, 7, full.assets))


def test_an_encoder_alone_is_no_pre_training_unless_it_is_asked_for(cases, told):
    with pytest.raises(CheckpointError, match="--teacher-from-student") as error:
        huggingface.read(told.folder / "audio")
    assert "\n" not in str(error.value)
    found, full = huggingface.read(told.folder / "audio", teacher_from_student=True), cases["audio"].full
    for name, tensor in found.tensors.items():
        student = name.replace("teacher.", "student.")
        assert torch.equal(tensor, full.tensors[student]) or name.startswith("decoder.")


@pytest.mark.parametrize("kind", TEXTS)
def test_ids_are_those_of_our_tokenizer(kind, cases, told):
    (name,) = cases[kind].full.assets.keys() - {"labels.json"}
    ours, answers = open_tokenizer(told.folder / kind / "assets" / name), told.answers[kind]
    assert answers["ids"] == [[ours.bos, *ids, ours.eos] for ids in ours.encode_batch(LINES)]
    (x,) = ours.encode_batch(["x"])
    assert answers["pair"] == [ours.bos, *x, ours.eos, ours.eos, *x, ours.eos]
    assert (answers["pad"], answers["longest"]) == (ours.pad, 24)
    assert answers["back"] == "a film"


def test_positions_at_the_trained_size_are_ours_and_others_lie_between_them(told):
    assert torch.equal(told.outputs["positions.same"], sincos_positions(32, 4))
    double = told.outputs["positions.double"].view(8, 8, 32)
    centres = (np.arange(8) - 0.5) / 2  # (i + 1/2) / 2 - 1/2
    np.testing.assert_allclose(double[0, :, 0], np.sin(centres), atol=1e-6)
    np.testing.assert_allclose(double[:, 0, 16], np.sin(centres), atol=1e-6)
    np.testing.assert_allclose(double[0, :, 8], np.cos(centres), atol=1e-6)


def test_the_ctc_loss_counts_frames_and_letters_that_are_no_padding(cases, told):
    logits = told.outputs["audio_fine.logits"]
    lengths = inputs_of(cases["audio_fine"].full.model)[2]
    each = [
        F.ctc_loss(logits[i, :n].log_softmax(-1)[:, None], torch.tensor([letters]), [int(n)], [len(letters)])
        for i, (n, letters) in enumerate(zip(lengths, ([2, 3, 3], [4, 1], [2, 2]), strict=True))
    ]
    assert float(told.outputs["ctc"]) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def test_pipelines_prepare_inputs_as_we_do(cases, told):
    full = cases["audio_fine"].full
    network = FineTuned(full.model, full.head).eval()
    network.load_state_dict(full.tensors)
    with torch.no_grad():
        best = network(inputs_of(full.model)[1][:1])[0].argmax(-1)
    letters = [LETTERS[i] for i in best.unique_consecutive().tolist() if i]
    assert told.answers["heard"] == "".join(letters).replace("|", " ").strip()
    assert len(set(letters)) > 1

    full = cases["image_fine"].full
    network = FineTuned(full.model, full.head).eval()
    network.load_state_dict(full.tensors)
    pixels = torch.from_numpy(np.array(Image.open(told.folder / "grey.png")))
    with torch.no_grad():
        shares = network(pixels[None, None]).softmax(-1)[0]
    seen = {one["label"]: one["score"] for one in told.answers["seen"]}
    assert [seen[label] for label in CLASSES] == pytest.approx(shares.tolist(), abs=1e-5)


def test_an_export_is_checked_and_one_that_differs_is_deleted(cases, tmp_path, monkeypatch):
    full = cases["audio_fine"].full
    told = huggingface.export(full, tmp_path / "good")
    assert "Data2Vec2ForCTC" in told and "\n" not in told

    def swapped(tensors, model, head):
        out = dict(data2vec2_theirs(tensors, model, head))
        name = "encoder.blocks.0.attn.qkv.weight"
        q, k, v = out[name].chunk(3)
        out[name] = torch.cat([q, v, k])
        return out

    data2vec2_theirs = data2vec2.theirs
    monkeypatch.setattr(data2vec2, "theirs", swapped)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight would not come back"):
        huggingface.export(full, tmp_path / "bad")
    monkeypatch.setattr(huggingface, "_read_tensors", lambda *_: full.encoder() | full.tensors)
    with pytest.raises(CheckpointError, match="another model"):
        huggingface.export(full, tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    with pytest.raises(ConfigError, match="is there already"):
        huggingface.export(full, tmp_path / "good")


@pytest.mark.parametrize(
    ("strange", "off", "status", "words"),
    [
        ({}, 0, 0, ""),
        ({"missing_keys": ["encoder.x"]}, 0, 0, "missing_keys: encoder.x"),
        ({}, 1e-4, 0, "1.0e-04 off"),
        ({}, math.nan, 0, "nan off"),
        ({}, 0, 1, "ImportError: no such module"),
    ],
)
def test_what_a_stranger_finds_is_heeded(strange, off, status, words, cases, tmp_path, monkeypatch):
    full = cases["image_fine"].full
    network = FineTuned(full.model, full.head).eval()
    network.load_state_dict(full.tensors)

    def run(command, **_):
        assert Path(command[-2]).is_dir() and command[-3] == str(ROOT / "convert/outsider.py")
        work = Path(command[-1])
        with torch.no_grad():
            logits = network(load_file(work / "inputs.safetensors")["pixel_values"])
        save_file({"output": logits + off * logits.abs().max().clamp(min=1)}, work / "outputs.safetensors")
        (work / "answer.json").write_text(json.dumps({"class": "X", "strange": strange}))
        return subprocess.CompletedProcess(command, status, "", "Traceback\n  a line\nImportError: no such module\n")

    monkeypatch.setattr(huggingface.subprocess, "run", run)
    if not words:
        assert ": X, " in huggingface.export(full, tmp_path / "out")
        return
    with pytest.raises(CheckpointError, match=words) as error:
        huggingface.export(full, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_what_has_no_such_form_is_refused_in_a_line(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "_check", lambda *_: (0.0, "", 0))
    text = small(*PLAIN, *TEXT)

    def refused(full: Full, words: str, *arguments: str) -> None:
        with pytest.raises((ConfigError, CheckpointError), match=words) as error:
            huggingface.export(full, tmp_path / "out", *arguments)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())

    refused(made(replace(text, norm_eps=1e-6)), "norm_eps")
    refused(cases["text_fine"].full, "no teacher", "teacher")
    fine = cases["image_fine"].full
    refused(replace(fine, assets={"labels.json": b'["one"]'}), "labels.json")
    refused(replace(cases["audio_fine"].full, assets={"labels.json": b'["a", "a", "b", "c", "d"]'}), "more than once")
    refused(replace(cases["text"].full, assets={"a.model": b"", "b.model": b""}), "several tokenizers")
    refused(replace(cases["text"].full, assets={"a.model": b"?"}), "no SentencePiece model")
    refused(replace(cases["text"].full, assets=cases["text_late"].full.assets), "not this model's tokenizer")


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "{}"), ("config.json", "["), ("model.safetensors", "short"), ("config.json", '{"data2vec2": 3}')],
)
def test_a_folder_that_is_damaged_or_another_is_refused_in_a_line(file, content, told, tmp_path):
    folder = shutil.copytree(told.folder / "image_fine", tmp_path / "folder")
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError) as error:
        huggingface.read(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_names_that_do_not_belong_are_listed(told, tmp_path):
    folder = shutil.copytree(told.folder / "text_fine", tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    tensors["roberta.pooler.dense.weight"] = tensors.pop("roberta.encoder.layer.1.attention.self.key.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: student.blocks.1.attn.qkv.weight; unexpected: .*key|pooler"):
        huggingface.read(folder)


def test_a_tokenizer_that_would_give_other_ids_is_refused(tokenizer_files, tmp_path):
    (tmp_path / "t.model").write_bytes(tokenizer_files["bpe.model"])
    ours = open_tokenizer(tmp_path / "t.model")
    texts = fast_tokenizer.texts(ours)
    ids = [[ours.bos, *ids, ours.eos] for ids in ours.encode_batch(texts)]
    fast_tokenizer.refuse_other_ids(ours, texts, ids, ours.pad)
    with pytest.raises(CheckpointError, match="padding"):
        fast_tokenizer.refuse_other_ids(ours, texts, ids, ours.pad + 1)
    ids[2][3] += 1
    with pytest.raises(CheckpointError, match="quick brown"):
        fast_tokenizer.refuse_other_ids(ours, texts, ids, ours.pad)


@pytest.mark.parametrize("pad", [0, 1, 2, 40])
def test_positions_find_the_way_to_robertas_rows_and_back(pad):
    model = replace(small(*PLAIN, *TEXT), text=TextConfig(600, 24, pad))
    tensors = {name: torch.randn_like(tensor) for name, tensor in Data2Vec(model).student.state_dict().items()}
    table = roberta.theirs(tensors, model, None)["embeddings.position_embeddings.weight"]
    assert len(table) == roberta.config(model, None)["max_position_embeddings"]
    assert torch.equal(table[pad + 1 : pad + 1 + 24], tensors["local.positions.weight"][2:])
    back = roberta.ours(roberta.theirs(tensors, model, None), model, None)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_transformers_is_imported_by_baselines_and_by_what_runs_alone():
    users = {
        name for name in NAMES for top in imported((ROOT / name).read_text(), name) if top.startswith("transformers")
    }
    alone = {"convert/modeling_data2vec2.py", "convert/outsider.py"}
    assert {name for name in users if not name.startswith(("models/baselines/", "tests/"))} == alone
    for name in alone:
        tops = {module.split(".")[0] for module in imported((ROOT / name).read_text(), name)}
        assert tops <= set(sys.stdlib_module_names) | {"torch", "transformers", "safetensors"}
