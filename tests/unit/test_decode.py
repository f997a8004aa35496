"""Decoding against every path there is; n-gram models against their definition and KenLM's own reading."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune import ngram
from finetune.config import load
from finetune.decode import (
    Beam,
    BeamDecoder,
    WordDecoder,
    build_decoder,
    read_lexicon,
    read_recogniser,
)
from finetune.ngram import BEGIN, END, Gram, arpa, estimate
from finetune.predict import predict
from finetune.speech import BLANK, error_rates, greedy
from models.config import HeadConfig
from models.heads import FineTuned
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.data.sources import DataError
from pretrain.full import Full
from pretrain.settings import ConfigError, to_tree

LABELS = ["<blank>", "|", "a", "b"]
LEXICON = ["a", "b", "ab", "bab"]
SENTENCES = [line.split() for line in ("a b", "ab ab a", "b a b ab", "a", "bab a b", "a b ab", "b b", "ab")]


def random_log_probs(frames: int, seed: int, sharp: float = 1.5) -> Tensor:
    return (torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed)) * sharp).log_softmax(-1)


def collapsed(path: Sequence[int]) -> str:
    """By the definition: repetitions first, then blanks."""
    return "".join(LABELS[label] for label, _ in itertools.groupby(path) if label != BLANK)


def scores(log_probs: Tensor) -> dict[str, list[float]]:
    """Of every path, by what it spells after the end of a word, as which the library sees the beginning."""
    found: dict[str, list[float]] = defaultdict(list)
    rows = log_probs.double().tolist()
    for path in itertools.product(range(4), repeat=len(rows)):
        found[collapsed((1, *path))[1:]].append(sum(row[label] for row, label in zip(rows, path, strict=True)))
    return found


def log_sum(values: Sequence[float]) -> float:
    return float(np.logaddexp.reduce(values))


def backed_off(model: list[dict[Gram, tuple[float, float]]], gram: Gram) -> float:
    """log10 of the probability of an n-gram's last word, as ARPA files are read."""
    if gram in model[len(gram) - 1]:
        return model[len(gram) - 1][gram][0]
    if len(gram) == 1:
        return model[0][(ngram.UNKNOWN,)][0]
    weight = model[len(gram) - 2].get(gram[:-1], (0.0, 0.0))[1]
    return weight + backed_off(model, gram[1:])


def sentence_score(model: list[dict[Gram, tuple[float, float]]], words: Sequence[str]) -> float:
    line, order = (BEGIN, *words, END), len(model)
    return sum(backed_off(model, line[max(0, i - order + 1) : i + 1]) for i in range(1, len(line)))


def test_greedy_takes_out_repetitions_and_then_blanks() -> None:
    labels = [*LABELS, "c"]
    assert greedy(np.array([1, 0, 2, 2, 0, 2, 3, 3, 1, 1, 0, 1, 4, 0]), labels) == "aab c"
    assert greedy(np.array([0, 0]), labels) == greedy(np.array([], np.int64), labels) == ""


def test_error_rates_by_hand() -> None:
    """4 of 7 words (substituted, deleted, inserted twice), 1 + 4 + 4 letters of 11 + 10 + 1."""
    said = ["the cat sat", "on the mat", "x"]
    heard = ["the bat sat", "on mat", "x y z"]
    rates = error_rates(said, heard)
    assert rates["wer"] == pytest.approx(4 / 7)
    assert rates["cer"] == pytest.approx((1 + 4 + 4) / (11 + 10 + 1))
    assert error_rates(["a"], [""]) == {"wer": 1.0, "cer": 1.0}


def test_a_beam_of_one_is_greedy_and_a_wide_one_adds_up_paths() -> None:
    narrow, wide = BeamDecoder(LABELS, Beam(1)), BeamDecoder(LABELS, Beam(500, threshold=1e4))
    differing = 0
    for seed in range(40):
        log_probs = random_log_probs(5, seed)
        best = greedy(log_probs.argmax(dim=-1).numpy(), LABELS)
        assert narrow(log_probs) == best
        by_text = scores(log_probs)
        exact = max(by_text, key=lambda text: log_sum(by_text[text]))
        assert wide(log_probs) == " ".join(exact.replace("|", " ").split())
        differing += wide(log_probs) != best
    assert differing > 3


@pytest.mark.parametrize(("lm_weight", "word_score"), [(0.0, 0.0), (2.0, -1.0), (4.0, 2.0)])
def test_words_are_the_best_of_all_paths(tmp_path: Path, lm_weight: float, word_score: float) -> None:
    model = estimate(SENTENCES, 3)
    (tmp_path / "lm.arpa").write_text(arpa(model))
    beam = Beam(2000, threshold=1e4, lm_weight=lm_weight, word_score=word_score)
    decoder = WordDecoder(LABELS, LEXICON, str(tmp_path / "lm.arpa"), beam)
    heard = set()
    for seed in range(25):
        log_probs = random_log_probs(6, seed)
        best, exact = -math.inf, ""
        for text, found in scores(log_probs).items():
            words = text.replace("|", " ").split()
            if (text.endswith("|") or not text) and set(words) <= set(LEXICON):
                score = max(found) + lm_weight * sentence_score(model, words) + word_score * len(words)
                best, exact = max((best, exact), (score, " ".join(words)))
        assert decoder(log_probs) == exact, seed
        heard.add(exact)
    assert len(heard) > 3


def test_lexica(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(arpa(estimate(SENTENCES, 2)))
    assert sorted(read_lexicon(str(tmp_path / "lm.arpa"))) == sorted(LEXICON)
    (tmp_path / "words.txt").write_text("ab\ta b |\nb\tb |\n\n")
    assert read_lexicon(str(tmp_path / "words.txt")) == ["ab", "b"]
    lm = str(tmp_path / "lm.arpa")
    assert WordDecoder(LABELS, ["ab", "xy", "ab"], lm, Beam()).left_out == 1
    for make, words in (
        (lambda: WordDecoder(LABELS, ["xy", "z"], lm, Beam()), "none of the lexicon's 2 words"),
        (lambda: WordDecoder(LABELS, ["a"], str(tmp_path / "words.txt"), Beam()), "KenLM cannot read"),
        (lambda: read_lexicon(str(tmp_path / "none.txt")), "cannot read the words of"),
        (lambda: build_decoder(LABELS, "lm.bin", "", False, Beam()), "does not tell its words"),
        (lambda: build_decoder(LABELS, "", "words.txt", False, Beam()), "--lexicon is for --lm"),
        (lambda: build_decoder(LABELS, "lm.arpa", "", True, Beam()), "--greedy takes no --lm"),
    ):
        with pytest.raises((ConfigError, DataError), match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


def counted(order: int) -> list[dict[Gram, int]]:
    """By the definition: different words before an n-gram, or how often it occurs if it is of full length or begins a
    sentence."""
    lines = [(BEGIN, *words, END) for words in SENTENCES]
    every = [
        gram for line in lines for n in range(1, order + 2) for gram in zip(*(line[i:] for i in range(n)), strict=False)
    ]
    tables: list[dict[Gram, int]] = []
    for n in range(1, order + 1):
        grams = {gram for gram in every if len(gram) == n}
        whole = {gram: every.count(gram) for gram in grams}
        before = {gram: len({g[0] for g in every if len(g) == n + 1 and g[1:] == gram}) for gram in grams}
        tables.append({g: whole[g] if n == order or g[0] == BEGIN else before[g] for g in grams})
    return tables


@pytest.mark.parametrize("order", [2, 3, 4])
def test_n_grams_are_interpolated_as_defined(order: int) -> None:
    model, tables = estimate(SENTENCES, order), counted(order)
    vocabulary = sorted({word for words in SENTENCES for word in words} | {END})

    def discount(n: int, count: int) -> float:
        having = [sum(c == i for c in tables[n - 1].values()) for i in range(5)]
        taken = ngram.FALLBACK
        if all(having[1:]):
            y = having[1] / (having[1] + 2 * having[2])
            own = tuple(i - (i + 1) * y * having[i + 1] / having[i] for i in (1, 2, 3))
            taken = own if all(0 < d < i for i, d in enumerate(own, 1)) else taken
        return taken[min(count, 3) - 1] if count else 0.0

    def probability(word: str, history: Gram) -> float:
        n = len(history) + 1
        rest = 1 / (len(vocabulary) + 1) if n == 1 else probability(word, history[1:])
        following = {w: tables[n - 1].get((*history, w), 0) for w in vocabulary}
        total = sum(following.values())
        if not total:
            return rest
        weight = sum(discount(n, c) for c in following.values()) / total
        return (following.get(word, 0) - discount(n, following.get(word, 0))) / total + weight * rest

    histories = [gram for table in tables[:-1] for gram in table if gram[-1] != END]
    for history in [(), *histories, ("b", "ab", "a")[: order - 1]]:
        ours = {word: 10 ** backed_off(model, (*history, word)) for word in (*vocabulary, "unheard")}
        assert sum(ours.values()) == pytest.approx(1, abs=1e-9)
        for word, value in ours.items():
            assert value == pytest.approx(probability(word, history), rel=1e-9), (history, word)


def test_kenlm_reads_what_is_written(tmp_path: Path) -> None:
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    model = estimate(SENTENCES, 3)
    (tmp_path / "lm.arpa").write_text(arpa(model))
    words = Dictionary([*LEXICON, "<unk>"])
    lm = KenLM(str(tmp_path / "lm.arpa"), words)
    for line in itertools.product(LEXICON, repeat=3):
        state, total = lm.start(False), 0.0
        for word in line:
            state, score = lm.score(state, words.get_index(word))
            total += score
        total += lm.finish(state)[1]
        assert total == pytest.approx(sentence_score(model, line), abs=1e-5)


def test_the_program_writes_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words).upper() + "!" for words in SENTENCES))
    out = tmp_path / "lm.arpa"
    monkeypatch.setattr("sys.argv", ["ngram", str(tmp_path / "text.txt"), "--order", "2", "--out", str(out)])
    assert ngram.main() == 0 and out.read_text() == arpa(estimate(SENTENCES, 2))
    assert "7 1-grams" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ngram", str(tmp_path / "none.txt"), "--out", str(out)])
    assert ngram.main() == 2 and capsys.readouterr().err.startswith("error: cannot read")


def test_of_a_run_the_best_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000006").mkdir(parents=True)
    for name, content in (("latest", "step_00000006"), ("best", "step_00000003"), ("step_00000006/state.json", "{}")):
        (tmp_path / "checkpoints" / name).write_text(content)
    for read in (lambda: read_recogniser(str(tmp_path), []), lambda: predict(tmp_path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="best names step_00000003, which is not there"):
            read()


def test_a_recogniser_is_read_from_a_file(tmp_path: Path) -> None:
    config = load("tests/tiny_speech.yaml")
    head = HeadConfig(outputs=len(LABELS))
    settings = to_tree(config) | {"head": to_tree(head)}
    assets = {full.LABELS: json.dumps(LABELS).encode()}
    written = Full(FineTuned(config.model, head).state_dict(), settings, 3, assets)
    full.write(written, tmp_path / "speech.safetensors")
    weights, found, labels = read_recogniser(str(tmp_path / "speech.safetensors"), ["eval.batch_size=3"])
    assert weights.tensors.keys() == written.tensors.keys() and labels == LABELS
    assert found.eval.batch_size == 3 and found.model == config.model
