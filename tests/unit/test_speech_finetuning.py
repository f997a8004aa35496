"""Transcripts of every layout, the loss against all paths, masks, padding, what is frozen; a network learns tones."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from finetune.config import Config, load
from finetune.optim import learning_rate, parameter_groups
from finetune.speech import Heard, SpeechTask, Spoken, collected_labels, frames_for, spelt
from finetune.transcripts import Spelling, open_transcribed
from models.config import AudioConfig, DropoutConfig, HeadConfig, ModelConfig
from models.heads import FineTuned
from models.masks import draw_spans, row_keys
from pretrain import full
from pretrain.config import batch_plan
from pretrain.data.sources import DataError, Sample
from pretrain.settings import ConfigError, to_tree
from tests.tones import TEXTS, write_tones

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    modality="audio",
    width=32,
    heads=4,
    prenet_depth=1,
    depth=2,
    norm_eps=1e-5,
    extra_tokens=0,
    audio=AudioConfig(seconds=2, channels=16, position_layers=4, position_groups=4),
)


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path / "cache"))


def clip(path: Path, seconds: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, int(seconds * 16_000)), 16_000)
    return path


def said(path: Path, split: str, language: str = "") -> dict[str, str]:
    """What each file says, by its path below `path`."""
    source, texts, _ = open_transcribed(str(path), split, language, Spelling(), progress=False)
    names = [str(Path(source.name(i)).relative_to(path)) for i in range(len(source))]
    return dict(zip(names, texts, strict=True))


def task(path: Path, *overrides: str) -> SpeechTask:
    return SpeechTask(load(ROOT / "tests/tiny_speech.yaml", [f"data.path={path}", *overrides]), progress=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HE HOPED THERE'S STEW", "he hoped there's stew"),
        ("Němý  svědek tragédie... - a zůstalo?", "němý svědek tragédie a zůstalo"),
        ("e\N{COMBINING ACUTE ACCENT}e\N{COMBINING DIAERESIS}n", "éën"),
        ("'s Ochtends, 't LC-10 \N{RIGHT SINGLE QUOTATION MARK}n ' | 1.5 %", "'s ochtends 't lc 10 'n 1 5"),
        ("?!...", ""),
    ],
)
def test_spelling(text: str, expected: str) -> None:
    assert Spelling()(text) == expected


def test_spelling_as_configured() -> None:
    assert Spelling("upper")("naïve, ok") == "NAÏVE OK" and Spelling("keep")("Ja, Ön") == "Ja Ön"
    assert Spelling(punctuation=True)("Ja|nee,  toch?") == "ja nee, toch?"


def test_librispeech(tmp_path: Path) -> None:
    for subset, speaker in (
        ("train-clean-100", "1"),
        ("train-other-500", "2"),
        ("test-clean", "3"),
        ("dev-other", "4"),
    ):
        stem = f"{subset}/{speaker}/10/{speaker}-10"
        for i in range(2):
            clip(tmp_path / f"{stem}-000{i}.flac")
        text = f"{speaker}-10-0000 FIRST LINE\n{speaker}-10-0001 SECOND {'ABCD'[int(speaker) - 1]}\n"
        (tmp_path / f"{stem}.trans.txt").write_text(text)
    assert said(tmp_path, "test-clean") == {
        "test-clean/3/10/3-10-0000.flac": "first line",
        "test-clean/3/10/3-10-0001.flac": "second c",
    }
    assert sorted(said(tmp_path, "train").values()) == ["first line", "first line", "second a", "second b"]
    joined = said(tmp_path, "train-clean-100+dev-other")
    assert sorted(joined.values()) == ["first line", "first line", "second a", "second d"]
    clip(tmp_path / "test-clean/3/10/untold.flac")
    *_, notes = open_transcribed(str(tmp_path), "test-clean", "", Spelling(), progress=False)
    assert notes == ("left out 1 recordings without a transcript",)


def test_libri_light(tmp_path: Path) -> None:
    for folder in ("1h/0/clean", "1h/0/other", "1h/5/clean", "9h/other"):
        clip(tmp_path / folder / "7/8/7-8-0000.flac")
        (tmp_path / folder / "7/8/7-8.trans.txt").write_text(f"7-8-0000 {folder.replace('/', ' ')}\n")
    assert [sorted(said(tmp_path, split).values()) for split in ("10m", "1h", "10h")] == [
        ["1h 0 clean", "1h 0 other"],
        ["1h 0 clean", "1h 0 other", "1h 5 clean"],
        ["1h 0 clean", "1h 0 other", "1h 5 clean", "9h other"],
    ]


def test_text_files_beside_recordings(tmp_path: Path) -> None:
    for name in ("train/x/a.wav", "train/b.ogg", "test/c.wav"):
        clip(tmp_path / name).with_suffix(".txt").write_text(f"Says {Path(name).stem}!\n")
    assert said(tmp_path, "train") == {"train/b.ogg": "says b", "train/x/a.wav": "says a"}
    assert said(tmp_path, "test") == {"test/c.wav": "says c"}


def test_tables(tmp_path: Path) -> None:
    for name in ("1.wav", "d/2.wav", "3.wav"):
        clip(tmp_path / name)
    rows = ["text\tfile\tseconds\tsplit", "Eén\t1.wav\t0.1\ttrain", "Twee\td/2.wav\t0.1\ttest", "x\t3.wav\t0.1\tval"]
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    assert said(tmp_path, "train") == {"1.wav": "eén"} and said(tmp_path, "test") == {"d/2.wav": "twee"}
    (tmp_path / "manifest.tsv").unlink()
    (tmp_path / "train.tsv").write_text("file\ttext\nd/2.wav\tother\n")
    assert said(tmp_path, "train") == {"d/2.wav": "other"}


@pytest.mark.parametrize(("ending", "lines"), [("wrd", "HELLO WORLD\nA\n"), ("ltr", "H E L L O | W O R L D |\nA |\n")])
def test_manifests_with_transcripts_beside_them(tmp_path: Path, ending: str, lines: str) -> None:
    clip(tmp_path / "clips/a.wav"), clip(tmp_path / "clips/b.wav")
    (tmp_path / "train.tsv").write_text(f"{tmp_path}/clips\nb.wav\t1600\na.wav\t1600\n")
    (tmp_path / f"train.{ending}").write_text(lines)
    assert said(tmp_path, "train") == {"clips/b.wav": "hello world", "clips/a.wav": "a"}


def test_dialogues_have_one_language_and_no_line_in_both_splits(tmp_path: Path) -> None:
    rows = [("test/nl_a/1.ogg", "nl", "Ja!"), ("train/nl_a/2.ogg", "nl", "ja"), ("train/nl_b/3.ogg", "nl", "Nee, jij.")]
    rows += [("train/cs_a/4.ogg", "cs", "Ja"), ("test/cs_a/5.ogg", "cs", "Ne")]
    for name, *_ in rows:
        clip(tmp_path / name)
    table = "".join(f"{name}\t{language}\tsmall\t{text}\n" for name, language, text in rows)
    (tmp_path / "transcripts.tsv").write_text(table)
    assert said(tmp_path, "train", "nl") == {"train/nl_b/3.ogg": "nee jij"}
    assert said(tmp_path, "train", "cs") == {"train/cs_a/4.ogg": "ja"}
    assert said(tmp_path, "test", "nl") == {"test/nl_a/1.ogg": "ja"}
    with pytest.raises(DataError, match=r"speech.language=: .* has cs, nl"):
        said(tmp_path, "train")


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        ({"a.wav": None}, "train", "no transcripts"),
        ({"a.wav": None, "a.txt": "..."}, "train", "no recordings with a transcript"),
        ({"manifest.tsv": "name\ttext\nx\ty\n"}, "train", "has columns name, text; it needs file and text"),
        ({"manifest.tsv": "file\ttext\na.wav\n"}, "train", "line 2: 1 values for the 2 columns"),
        ({"manifest.tsv": "file\ttext\na.wav\thi\n"}, "test", "no column split"),
        ({"manifest.tsv": "file\ttext\tsplit\na.wav\thi\ttrain\n"}, "test", "has the splits train, but not test"),
        ({"manifest.tsv": ""}, "train", "is empty"),
        ({"a.wav": None, "train.tsv": ".\na.wav\t1600\n"}, "train", "manifest without transcripts"),
        ({"a.wav": None, "train.tsv": ".\na.wav\t1600\n", "train.wrd": "a\nb\n"}, "train", "2 lines for the 1 rec"),
    ],
)
def test_unusable_transcripts_are_one_line(
    tmp_path: Path, files: dict[str, str | None], split: str, words: str
) -> None:
    for name, text in files.items():
        clip(tmp_path / name) if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        said(tmp_path, split)
    assert "\n" not in str(caught.value)


def test_letters_and_the_frames_they_need() -> None:
    labels = collected_labels(["abba cd", "één"])
    assert labels == ["<blank>", "|", "a", "b", "c", "d", "n", "é"]
    number = {label: i for i, label in enumerate(labels)}
    letters = spelt("abba n", number)
    assert [labels[i] for i in letters] == [*"abba|n|"]
    assert frames_for(letters) == 8 and not len(spelt("xa", number))


def test_what_cannot_be_learned_is_left_out_and_counted(tmp_path: Path) -> None:
    write_tones(tmp_path)
    clip(tmp_path / "train/long.wav", 2.5).with_suffix(".txt").write_text("a")
    clip(tmp_path / "train/crowded.wav", 0.2).with_suffix(".txt").write_text("abcdabcc")  # 9 frames, letters, a blank
    clip(tmp_path / "train/fits.wav", 0.2).with_suffix(".txt").write_text("abcdabcd")
    found = task(tmp_path)
    names = {Path(found.train.dataset.dataset.name(i)).stem for i in found.train.dataset.indices}
    assert names == {*map(str, range(8)), "fits"}
    notes = " ".join(found.train.dataset.notes)
    assert "1 clips longer than model.audio.seconds=2: " in notes and "1 clips with more letters than frames" in notes
    assert found.labels == ["<blank>", "|", *"abcd"] and found.resolved.head.outputs == 6


def test_minutes_are_drawn_by_the_seed_and_lie_in_each_other(tmp_path: Path) -> None:
    write_tones(tmp_path)
    chosen = {}
    for seed, minutes in itertools.product((1, 2), (0.03, 0.06, 0.1)):
        dataset = task(tmp_path, f"data.minutes={minutes}", f"train.seed={seed}").train.dataset
        assert dataset.lengths.sum() <= minutes * 60 * 16_000
        chosen[seed, minutes] = set(dataset.indices.tolist())
    assert chosen[1, 0.03] < chosen[1, 0.06] < chosen[1, 0.1] and chosen[1, 0.06] != chosen[2, 0.06]
    *_, note, held_out = task(tmp_path, "data.minutes=5").train.dataset.notes
    assert note.startswith("data.minutes=5 is more than there are") and held_out.startswith("test: 8 recordings")


def test_a_recogniser_to_start_from_gives_its_letters(tmp_path: Path) -> None:
    write_tones(tmp_path / "data")
    clip(tmp_path / "data/train/other.wav", 1).with_suffix(".txt").write_text("axe")
    config = task(tmp_path / "data").resolved
    weights = FineTuned(config.model, HeadConfig(7)).state_dict()
    settings = to_tree(replace(config, head=HeadConfig(7)))
    labels = ["<blank>", "|", *"dbca", "z"]
    full.write(full.Full(weights, settings, 1, {full.LABELS: json.dumps(labels).encode()}), tmp_path / "a.safetensors")
    found = task(tmp_path / "data", f"train.init_from={tmp_path / 'a.safetensors'}")
    assert found.labels == labels and len(found.train.dataset) == len(TEXTS)
    assert any("1 clips with letters that the network has no output for" in note for note in found.train.dataset.notes)
    full.write(full.Full(weights, settings, 1, {full.LABELS: b'["cat"]'}), tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="fine-tuned for something else"):
        task(tmp_path / "data", f"train.init_from={tmp_path / 'b.safetensors'}")


def log_likelihood(log_probs: Tensor, letters: list[int]) -> float:
    """Over every path that spells them, in float64."""
    total, rows = -math.inf, log_probs.double().tolist()
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(rows)):
        spells = [label for label, _ in itertools.groupby(path) if label]
        if spells == letters:
            total = np.logaddexp(total, sum(row[label] for row, label in zip(rows, path, strict=True)))
    return float(total)


def test_the_loss_is_that_of_all_paths_and_skips_stand_ins(tmp_path: Path) -> None:
    outputs = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([[1, 2, 0], [2, 2, 0], [1, 0, 0], [0, 0, 0]])
    frames, letters = (5, 4, 3, 5), (2, 2, 1, 0)
    genuine = torch.tensor([True, True, True, False])
    examples = Spoken(torch.zeros(4, 1), targets, 5, None, (), frames, letters, genuine)
    loss = task(write_tones(tmp_path)).loss(outputs, examples)
    own = outputs.detach().log_softmax(-1)
    exact = -sum(log_likelihood(own[i, : frames[i]], targets[i, : letters[i]].tolist()) for i in range(3))
    assert loss.item() == pytest.approx(exact, rel=1e-6)
    loss.backward()
    assert outputs.grad is not None
    moved = outputs.grad.abs().sum(-1) > 0
    assert moved.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 3 + [False] * 2, [False] * 5]


def test_batches_of_clips(tmp_path: Path) -> None:
    found = task(write_tones(tmp_path))
    dataset, references = found.train
    samples = [dataset[0, place] for place in range(len(dataset))]
    batch = found.collate(references, samples)
    assert batch.letters == tuple(len(text) + 1 for text in TEXTS) and batch.count == sum(batch.letters)
    labels = [found.labels[i] for i in batch.targets[0, : batch.letters[0]]]
    assert labels == [*"ab|cd|"] and batch.lengths is not None and batch.lengths.tolist() == list(batch.frames)
    assert batch.hidden is not None and batch.hidden.shape == (8, max(batch.frames))
    broken = [samples[0], replace(samples[1], inputs=torch.zeros(99_999), failures=("1.wav: lost",))]
    batch = found.collate(references, broken)
    assert batch.inputs.shape[1] == len(samples[0].inputs) and batch.letters == (len(TEXTS[0]) + 1, 0)
    assert batch.genuine is not None and batch.genuine.tolist() == [True, False] and batch.failures == ("1.wav: lost",)
    outputs = torch.zeros(2, max(batch.frames), 6)
    outputs[..., 2] = 1
    heard, lost = found.predict(outputs, batch)
    assert heard is not None and (heard.text, heard.letters) == ("a", len(TEXTS[0]) + 1) and lost is None
    dataset, references = found.evaluated["test"]
    batch = found.collate(references, [dataset[0, 0]])
    assert batch.hidden is None and batch.channels is None
    right = [Heard(text, 1.0, 2) for text in references.texts[1:]]
    assert found.score("test", [None, *right]) == {"wer": 0.0, "cer": 0.0, "loss": 0.5}
    assert found.score("test", [Heard("", 1.0, 2), *right])["wer"] > 0
    weighed = [Heard("", 1.0, 2), Heard("", 6.0, 3), Heard("", math.inf, 5)]
    assert found.judge("test", [0, 1, 2], weighed)["loss"] == pytest.approx(7 / 5)
    assert math.isnan(found.judge("test", [0, 1], [Heard("", math.nan, 2), Heard("", 6.0, 3)])["loss"])


def test_the_held_out_loss_is_that_of_all_paths_by_letter(tmp_path: Path) -> None:
    found = task(write_tones(tmp_path))
    outputs = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    targets, frames, letters = torch.tensor([[1, 2], [2, 2], [1, 2], [0, 0]]), (5, 2, 3, 5), (2, 2, 2, 0)
    genuine = torch.tensor([True, True, False, True])  # the second has fewer frames than it needs, the last no letters
    heard = found.predict(outputs, Spoken(torch.zeros(4, 1), targets, 4, None, (), frames, letters, genuine))
    found.evaluated["test"].references.texts[:] = ["a b"] * 4
    exact = -log_likelihood(outputs[0].log_softmax(-1), [1, 2]) / 2
    assert found.score("test", heard)["loss"] == pytest.approx(exact, rel=1e-6)


def test_masks_are_functions_of_seed_epoch_and_clip(tmp_path: Path) -> None:
    found = task(write_tones(tmp_path), "speech.frame_prob=0.5")
    dataset, references = found.train
    alone = [found.collate(references, [dataset[3, i]]) for i in range(8)]
    whole = found.collate(references, [dataset[3, i] for i in (5, 2, 7, 0)])
    for row, i in enumerate((5, 2, 7, 0)):
        expected = alone[i]
        assert expected.hidden is not None and whole.hidden is not None and whole.channels is not None
        assert torch.equal(whole.hidden[row, : expected.frames[0]], expected.hidden[0])
        assert not whole.hidden[row, expected.frames[0] :].any()
        assert expected.channels is not None and torch.equal(whole.channels[row], expected.channels[0])
    other = found.collate(references, [dataset[4, 5]])
    assert other.hidden is not None and alone[5].hidden is not None
    assert not torch.equal(other.hidden, alone[5].hidden)


def test_spans_are_as_many_as_said_and_evenly_spread() -> None:
    """Of n distinct places out of P, a position's 10 possible ones hold none with probability C(P-10, n) / C(P, n)."""
    rows, size, prob, length = 4000, 100, 0.65, 10
    keys = row_keys(1, np.zeros(rows, int), np.arange(rows), 1)
    spans = draw_spans(keys, np.full(rows, size), size, prob, length)
    places = size - length + 1
    shares = {n: math.comb(places - length, n) / math.comb(places, n) for n in (6, 7)}  # 6.5 on average
    expected = 1 - (shares[6] + shares[7]) / 2
    inner = spans[:, length:-length].mean(0)
    assert abs(inner.mean() - expected) < 0.005 and np.abs(inner - expected).max() < 5 * (0.25 / rows) ** 0.5
    edges = np.diff(np.pad(spans, ((0, 0), (1, 1))).astype(int), axis=1)
    for begin, end in zip(np.argwhere(edges == 1), np.argwhere(edges == -1), strict=True):
        assert end[1] - begin[1] >= length
    lengths = np.array([0, 9, 10, 25])
    few = draw_spans(keys[:4], lengths, size, 0.0, length, least=2)
    assert not few[:2].any() and few[2].sum() == 10 and 11 <= few[3].sum() <= 20
    assert not few[np.arange(size) >= lengths[:, None]].any()
    assert draw_spans(keys[:1], np.array([size]), size, 1.0, 1).all()


def clips(*frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(400 + 320 * (n - 1), generator=generator) for n in frames]


def test_what_is_made_of_a_clip_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    network = FineTuned(MODEL, HeadConfig(5)).eval()
    each = clips(12, 40, 97)
    inputs = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
    with torch.no_grad():
        together = network(inputs, torch.tensor([12, 40, 97]))
        for row, inputs in enumerate(each):
            alone = network(inputs[None])[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_masks_hide_features() -> None:
    """Nothing of a hidden frame's features is left, and channels are zero in all frames."""
    torch.manual_seed(0)
    network = FineTuned(MODEL, HeadConfig(5)).eval()
    seen: list[Tensor] = []
    network.student.positions.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden, channels = torch.zeros(2, 20, dtype=torch.bool), torch.zeros(2, 32, dtype=torch.bool)
    hidden[0, 3:9], channels[1, 5:7] = True, True
    inputs, lengths = torch.nn.utils.rnn.pad_sequence(clips(20, 15), batch_first=True), torch.tensor([20, 15])
    with torch.no_grad():
        features = network.student.local(inputs)
        network(inputs, lengths, hidden=hidden, channels=channels)
    assert features[0, 3:9].any() and not seen[0][0, 3:9].any()
    assert torch.equal(seen[0][0, 9:], features[0, 9:]) and torch.equal(seen[0][0, :3], features[0, :3])
    assert not seen[0][1, :, 5:7].any() and not seen[0][1, 15:].any()
    assert torch.equal(seen[0][1, :15, 7:], features[1, :15, 7:])


def test_what_is_frozen_gets_no_gradient() -> None:
    network, inputs = FineTuned(MODEL, HeadConfig(5)), torch.stack(clips(20, 20))

    def learning(**how: bool) -> set[str]:
        network.zero_grad(set_to_none=True)
        network(inputs, **how).sum().backward()
        return {name for name, p in network.named_parameters() if p.grad is not None}

    every = {name for name, _ in network.named_parameters()}
    local = {name for name in every if name.startswith(("student.local.convs", "student.local.norms"))}
    assert learning() == every and len(local) == 21
    assert learning(frozen_local=True) == every - local and learning(frozen=True) == {
        "head.linear.weight",
        "head.linear.bias",
    }
    config = load(ROOT / "tests/tiny_speech.yaml", ["optim.freeze_local=true"]).optim
    ids = {id(p): name for name, p in network.named_parameters()}
    still = {ids[id(p)] for g in parameter_groups(network, config) if g["lr_scale"] == 0 for p in g["params"]}
    heads = {ids[id(p)] for g in parameter_groups(network, config) if g["head"] for p in g["params"]}
    assert still == local and heads == {"head.linear.weight", "head.linear.bias"}


def test_layer_drop_and_activation_dropout_belong_to_training() -> None:
    torch.manual_seed(0)
    network = FineTuned(replace(MODEL, depth=6, dropout=DropoutConfig(layer=0.5)), HeadConfig(5)).train()
    inputs, ran = torch.stack(clips(20)), []
    for i, block in enumerate(network.student.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    counts = []
    for seed in range(40):
        network(inputs, seed=seed)
        counts.append(len(ran))
        ran.clear()
    assert 2 < np.mean(counts) < 4 and len(set(counts)) > 3
    network.eval()(inputs, seed=1)
    assert ran == list(range(6))
    network = FineTuned(replace(MODEL, dropout=DropoutConfig(activation=0.5)), HeadConfig(5)).train()
    assert not torch.equal(network(inputs), network(inputs))
    assert torch.equal(network.eval()(inputs), network(inputs))


def test_the_tri_stage_schedule() -> None:
    """The published phases of 10, 40 and 50 %, from a hundredth to the peak to a twentieth of it."""
    settings = ["optim.warmup_steps=100", "optim.hold=0.4", "optim.final_scale=0.05", "optim.lr=1", "train.steps=1000"]
    config = load(ROOT / "tests/tiny_speech.yaml", settings).optim
    rates = [learning_rate(step, config, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and rates[50] == pytest.approx(0.505)
    assert rates[100:501] == [1.0] * 401 and rates[750] == pytest.approx(0.05**0.5)
    assert rates[1000] == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="leave none of train"):
        load(ROOT / "tests/tiny_speech.yaml", ["optim.warmup_steps=61", "train.steps=100"])


def learn(config: Config, steps: int) -> dict[str, float]:
    """The task's figures after so many steps without an engine."""
    found = SpeechTask(config, progress=False)
    torch.manual_seed(1)
    network = FineTuned(config.model, found.resolved.head)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.optim.lr, betas=config.optim.betas)
    dataset, references = found.train
    cache = {i: dataset[0, i] for i in range(len(dataset))}
    for _, keys in zip(range(steps), found.sampler(batch_plan(config.train, 1), 0, 0), strict=False):
        batch = found.collate(references, [replace(cache[i], epoch=epoch) for epoch, i, _ in keys])
        outputs = network(batch.inputs, batch.lengths, **found.arguments(batch))
        (found.loss(outputs, batch) / batch.count).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    dataset, references = found.evaluated["test"]
    samples: list[Sample] = [dataset[0, i] for i in range(len(dataset))]
    batch = found.collate(references, samples)
    with torch.no_grad():
        outputs = network.eval()(batch.inputs, batch.lengths)
    return found.score("test", found.predict(outputs, batch))


def test_a_small_network_learns_tones(tmp_path: Path) -> None:
    whole = ["train.batch_size=160000", "train.micro_batch=160000", "optim.lr=5e-3", "speech.frame_prob=0.05"]
    config = load(ROOT / "tests/tiny_speech.yaml", [f"data.path={write_tones(tmp_path)}", *whole])
    assert learn(config, 130)["cer"] < 0.1


@pytest.mark.parametrize("path", sorted((ROOT / "configs/finetune").glob("librispeech_*.yaml")), ids=lambda p: p.stem)
def test_configs_have_the_published_phases(path: Path) -> None:
    """10% of the steps up; 25,600,000 samples a step on any number of GPUs (large with 960 h: 30,720,000)."""
    config = load(path)
    assert config.optim.warmup_steps * 10 == config.train.steps and config.optim.hold == 0.4
    assert config.train.batch_size == (30_720_000 if path.stem == "librispeech_large_960h" else 25_600_000)
    assert config.optim.freeze_local and config.optim.freeze_steps < config.train.steps
    assert config.model.dropout.layer == (0.05 if path.stem == "librispeech_base_10h" else 0.1)


def test_configs_of_speech_load() -> None:
    for name, language, case in (
        ("fillets_nl", "nl", "lower"),
        ("fillets_cs", "cs", "lower"),
        ("amazon_queen", "", "lower"),
        ("speech_table", "", "lower"),
    ):
        config = load(ROOT / f"configs/finetune/{name}.yaml", ["train.init_from=''"])
        assert (config.task, config.speech.language, config.speech.case) == ("speech", language, case)
