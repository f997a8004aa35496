"""What a recogniser hears, by beam search, with a lexicon and a language model or without; and how wrong that is.

python -m finetune.decode RUN --split test --lm lm.arpa        also: NAME.safetensors; section.key=value of the config
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.config import Config, check
from finetune.evaluate import predictions
from finetune.speech import BETWEEN, BLANK, LABELS, Heard, SpeechTask, greedy
from pretrain import full
from pretrain.checkpoint import CheckpointError
from pretrain.data.sources import DataError
from pretrain.files import write_atomically
from pretrain.full import Full
from pretrain.saved import find
from pretrain.settings import ConfigError, build, merge, overridden

UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Beam:
    """How far to look: at `size` hypotheses that are no more than `threshold` behind the best, each continued by its
    `letters` likeliest labels. With a language model a hypothesis' score is the log probability of its best path,
    `lm_weight` times the log10 of its words' probability, and `word_score` for each word (wav2vec 2.0's program)."""

    size: int = 50
    letters: int = 50
    threshold: float = 50.0
    lm_weight: float = 2.0
    word_score: float = -1.0


class Decoder(Protocol):
    def __call__(self, log_probs: Tensor) -> str:
        """(T, C) fp32 on the host -> words."""


class BeamDecoder:
    """The likeliest of any letters: over all paths that lead to them."""

    def __init__(self, labels: Sequence[str], beam: Beam) -> None:
        decoder = flashlight()
        self.labels = labels
        options = decoder.LexiconFreeDecoderOptions(
            beam_size=beam.size,
            beam_size_token=min(beam.letters, len(labels)),
            beam_threshold=beam.threshold,
            lm_weight=0.0,
            sil_score=0.0,
            log_add=True,
            criterion_type=decoder.CriterionType.CTC,
        )
        self._decoder = decoder.LexiconFreeDecoder(options, decoder.ZeroLM(), BETWEEN, BLANK, [])

    def __call__(self, log_probs: Tensor) -> str:
        log_probs = log_probs.float().contiguous()
        found = self._decoder.decode(log_probs.data_ptr(), *log_probs.shape)
        return greedy(torch.tensor(found[0].tokens).numpy(), self.labels) if found else ""


class WordDecoder:
    """The best hypothesis of words of a lexicon, by the network and a word model that KenLM reads.

    Raises ConfigError or DataError, in one line, for what it cannot be made of.
    """

    def __init__(self, labels: Sequence[str], words: Sequence[str], lm: str, beam: Beam) -> None:
        decoder = flashlight()
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary

        number = {label: i for i, label in enumerate(labels)}
        different = list(dict.fromkeys(words))
        spellable = [word for word in different if all(letter in number for letter in word)]
        if not spellable:
            raise DataError(f"none of the lexicon's {len(words):,} words is made of the network's letters")
        self.left_out = len(different) - len(spellable)
        self._words = Dictionary()
        for word in (*spellable, UNKNOWN):
            self._words.add_entry(word)
        try:
            self._lm = KenLM(lm, self._words)
        except RuntimeError as error:
            raise DataError(f"KenLM cannot read {lm}: {' '.join(str(error).split())[:200]}") from None
        trie, start = decoder.Trie(len(labels), BETWEEN), self._lm.start(False)
        for index, word in enumerate(spellable):
            _, score = self._lm.score(start, index)
            trie.insert([*(number[letter] for letter in word), BETWEEN], index, score)
        trie.smear(decoder.SmearingMode.MAX)
        options = decoder.LexiconDecoderOptions(
            beam_size=beam.size,
            beam_size_token=min(beam.letters, len(labels)),
            beam_threshold=beam.threshold,
            lm_weight=beam.lm_weight,
            word_score=beam.word_score,
            unk_score=-math.inf,
            sil_score=0.0,
            log_add=False,
            criterion_type=decoder.CriterionType.CTC,
        )
        unknown = self._words.get_index(UNKNOWN)
        self._decoder = decoder.LexiconDecoder(options, trie, self._lm, BETWEEN, BLANK, unknown, [], False)

    def __call__(self, log_probs: Tensor) -> str:
        log_probs = log_probs.float().contiguous()
        found = self._decoder.decode(log_probs.data_ptr(), *log_probs.shape)
        return " ".join(self._words.get_entry(i) for i in found[0].words if i >= 0) if found else ""


def flashlight() -> Any:
    """Raises ConfigError if the library is not here."""
    try:
        import flashlight.lib.text.decoder as decoder
    except ImportError as error:
        raise ConfigError(f"beam search needs flashlight-text ({error}): pip install flashlight-text") from None
    return decoder


def read_lexicon(path: str) -> list[str]:
    """The words of an ARPA file; of any other, the first in each line. Raises DataError if there are none."""
    words: list[str] = []
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig") as file:
            lines = (line.split() for line in file)
            if path.endswith(".arpa"):
                for line in lines:
                    if line[:1] == ["\\1-grams:"]:
                        break
                for line in lines:
                    if len(line) < 2:
                        break
                    words.append(line[1])
                words = [word for word in words if word not in ("<s>", "</s>", UNKNOWN)]
            else:
                words = [line[0] for line in lines if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the words of {path}: {' '.join(str(error).split())}") from None
    if not words:
        raise DataError(f"{path} has no words")
    return words


class Decoding(SpeechTask):
    """Evaluates a trained network by a decoder; greedily without."""

    def __init__(self, config: Config, labels: list[str], decoder: Decoder | None) -> None:
        super().__init__(config, progress=True, labels=labels)
        self.decoder = decoder

    def hear(self, log_probs: Tensor, frames: Sequence[int]) -> list[str]:
        if self.decoder is None:
            return super().hear(log_probs, frames)
        rows = zip(log_probs.cpu(), frames, strict=True)
        return [self.decoder(row[:count]) if count else "" for row, count in rows]


def read_recogniser(path: str, overrides: Sequence[str]) -> tuple[Full, Config, list[str]]:
    """The best checkpoint of a run, or else its newest; or the checkpoint or full form that `path` is. Its config, and
    what its outputs are called. Raises ConfigError or CheckpointError."""
    weights = full.read(path, best=True)
    if weights.head is None or weights.settings.get("task") != "speech":
        raise ConfigError(f"{path} is no recogniser: it was not fine-tuned with task: speech")
    labels = weights.labels
    if labels is None or labels[:2] != LABELS:
        raise CheckpointError(f"{path} has no labels.json that names its {weights.head.outputs} outputs")
    return weights, build(Config, merge(weights.settings, overridden({}, overrides)), source=path), labels


def write_heard(path: Path, task: Decoding, split: str, heard: Sequence[Heard | None]) -> None:
    """A table of files, what is said in them, and what is heard."""
    dataset, references = task.evaluated[split]
    names = (dataset.name(i) for i in range(len(dataset)))
    rows = zip(names, references.texts, (found.text if found else "" for found in heard), strict=True)
    write_atomically(path, "".join("\t".join(row) + "\n" for row in (("file", "said", "heard"), *rows)))


def build_decoder(labels: list[str], lm: str, lexicon: str, greedily: bool, beam: Beam) -> Decoder | None:
    if lm and greedily:
        raise ConfigError("--greedy takes no --lm: leave one out")
    if lm:
        if not (lexicon or lm.endswith(".arpa")):
            raise ConfigError(f"--lm {lm} does not tell its words: give --lexicon FILE, or a NAME.arpa")
        return WordDecoder(labels, read_lexicon(lexicon or lm), str(Path(lm).expanduser()), beam)
    if lexicon:
        raise ConfigError("--lexicon is for --lm: give both")
    return None if greedily else BeamDecoder(labels, beam)


def main() -> int:
    parser = argparse.ArgumentParser("finetune.decode", description="Word error rates by beam search.")
    parser.add_argument("path", help="a run folder, one of its checkpoints/step_*, or NAME.safetensors")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--split", nargs="+", default=[], help="default: eval.splits of the run")
    parser.add_argument("--lm", default="", metavar="FILE", help="a word model that KenLM reads, NAME.arpa or binary")
    parser.add_argument("--lexicon", default="", metavar="FILE", help="a word a line; default: the words of NAME.arpa")
    parser.add_argument("--greedy", action="store_true", help="no beam search: the likeliest label of each frame")
    parser.add_argument("--beam", type=int, default=Beam.size, metavar="N", help="hypotheses that are kept")
    parser.add_argument("--beam-threshold", type=float, default=Beam.threshold, metavar="X")
    parser.add_argument("--lm-weight", type=float, default=Beam.lm_weight, metavar="X")
    parser.add_argument("--word-score", type=float, default=Beam.word_score, metavar="X")
    parser.add_argument("--out", default="", metavar="FOLDER", help="default: the run folder")
    args = parser.parse_intermixed_args()
    beam = Beam(args.beam, threshold=args.beam_threshold, lm_weight=args.lm_weight, word_score=args.word_score)
    try:
        if beam.size < 1:
            raise ConfigError(f"--beam {beam.size} must be at least 1")
        weights, config, labels = read_recogniser(args.path, args.overrides)
        if args.split:
            config = replace(config, eval=replace(config.eval, splits=tuple(args.split)))
        check(config)
        decoder = build_decoder(labels, args.lm, args.lexicon, args.greedy, beam)
        if isinstance(decoder, WordDecoder) and decoder.left_out:
            print(f"left out {decoder.left_out:,} words of the lexicon that the network's letters do not spell")
        task = Decoding(config, labels, decoder)
        for note in task.notes:
            print(f"data: {note}")
        heard = predictions(weights, task)
        folder = Path(args.out or (Path(args.path).parent if args.path.endswith(full.SUFFIX) else find(args.path).run))
        for split, found in heard.items():
            rates = task.score(split, found)
            file = folder / f"heard_{split}.tsv"
            write_heard(file, task, split, found)
            print(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in rates.items()) + f"  ({file})")
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
