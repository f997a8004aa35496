"""An n-gram model of words in ARPA's format: interpolated modified Kneser-Ney (Chen & Goodman 1998), as a decoder asks.

python -m finetune.ngram TEXTS ... --order 3 --out lm.arpa    a line is a sentence; a config's training transcripts, too

Everything is counted in memory: texts of some hundred megabytes take a larger program, such as KenLM's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune.config import CASES, load
from finetune.transcripts import Spelling, open_transcribed
from pretrain.checkpoint import CheckpointError
from pretrain.data.fetch import resolve
from pretrain.data.sources import DataError
from pretrain.files import write_atomically
from pretrain.settings import ConfigError

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
FALLBACK = (0.5, 1.0, 1.5)  # where counts are too few to say what to take off of them
MOST = 6  # words a KenLM reader takes

Gram = tuple[str, ...]


def estimate(sentences: Iterable[Sequence[str]], order: int) -> list[dict[Gram, tuple[float, float]]]:
    """For n from 1 to `order`, every n-gram's log10 of its last word's probability after the others, and of what
    the probability of a word that is not seen after all of it is multiplied by. Raises DataError without a word."""
    counts = _counts(sentences, order)
    vocabulary = [gram for gram in counts[0] if gram != (BEGIN,)]
    if len(vocabulary) < 2:
        raise DataError("no words to estimate probabilities of")
    probability: dict[Gram, float] = {}
    weights: dict[Gram, float] = {}  # of shorter histories' probabilities
    for n, table in enumerate(counts, start=1):
        discounts = _discounts(table.values())
        total: defaultdict[Gram, int] = defaultdict(int)
        taken: defaultdict[Gram, float] = defaultdict(float)
        for gram, count in table.items():
            if gram != (BEGIN,):
                total[gram[:-1]] += count
                taken[gram[:-1]] += discounts[min(count, 3)]
        for history, count in total.items():
            weights[history] = taken[history] / count
        for gram, count in table.items():
            if gram != (BEGIN,):
                shorter = probability[gram[1:]] if n > 1 else 1 / (len(vocabulary) + 1)  # and the unknown word
                own = (count - discounts[min(count, 3)]) / total[gram[:-1]]
                probability[gram] = own + weights[gram[:-1]] * shorter
    probability[(UNKNOWN,)] = weights[()] / (len(vocabulary) + 1)
    probability[(BEGIN,)] = 0.0  # nothing is followed by it
    counts[0][(UNKNOWN,)] = 0
    return [{gram: (_log(probability[gram]), _log(weights.get(gram, 1.0))) for gram in table} for table in counts]


def _counts(sentences: Iterable[Sequence[str]], order: int) -> list[Counter[Gram]]:
    """Occurrences of what begins a sentence and of the longest; of all others, after how many words they occur."""
    tables: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for words in sentences:
        line = (BEGIN, *words, END)
        for n in range(1, min(order, len(line) + 1)):
            tables[n - 1][line[:n]] += 1
        tables[-1].update(line[i : i + order] for i in range(len(line) - order + 1))
    for shorter, longer in zip(tables[-2::-1], tables[:0:-1], strict=True):
        shorter.update(gram[1:] for gram in longer)
    return tables


def _discounts(counts: Iterable[int]) -> tuple[float, ...]:
    """What is taken off of counts of 0, 1, 2, and 3 or more."""
    n = Counter(count for count in counts if count <= 4)
    if all(n[i] for i in (1, 2, 3, 4)):
        y = n[1] / (n[1] + 2 * n[2])
        found = tuple(i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3))
        if all(0 < taken < i for i, taken in enumerate(found, start=1)):
            return (0.0, *found)
    return (0.0, *FALLBACK)


def _log(x: float) -> float:
    return math.log10(x) if x > 0 else -99.0


def arpa(model: Sequence[dict[Gram, tuple[float, float]]]) -> str:
    """The text of an ARPA file."""
    lines = ["\\data\\", *(f"ngram {n}={len(table)}" for n, table in enumerate(model, start=1))]
    for n, table in enumerate(model, start=1):
        lines += ["", f"\\{n}-grams:"]
        for gram, (probability, weight) in sorted(table.items()):
            ending = f"\t{weight:.7f}" if n < len(model) else ""
            lines.append(f"{probability:.7f}\t{' '.join(gram)}{ending}")
    return "\n".join([*lines, "", "\\end\\", ""])


def read_sentences(path: str, spell: Spelling) -> list[list[str]]:
    """Of a text file; of a config of speech recognition, its training transcripts, spelt as it says."""
    if path.endswith((".yaml", ".yml")):
        config = load(path)
        speech, data = config.speech, config.data
        spell = Spelling(speech.case, speech.punctuation)
        return [text.split() for text in open_transcribed(resolve(data.path), data.split, speech.language, spell).texts]
    try:
        lines = Path(path).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    return [words for line in lines if (words := spell(line).split())]


def main() -> int:
    parser = argparse.ArgumentParser("finetune.ngram", description="An n-gram model of words, in ARPA's format.")
    parser.add_argument("texts", nargs="+", help="text files, a sentence a line; or a config of speech recognition")
    parser.add_argument("--order", type=int, default=3, choices=range(2, MOST + 1))
    parser.add_argument("--out", required=True, help="the file to write, NAME.arpa")
    parser.add_argument("--case", choices=CASES, default="lower", help="of text files' words, as the network's")
    args = parser.parse_args()
    try:
        sentences = [words for path in args.texts for words in read_sentences(path, Spelling(args.case))]
        model = estimate(sentences, args.order)
        write_atomically(args.out, arpa(model))
    except OSError as error:
        print(f"error: cannot write {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = ", ".join(f"{len(table):,} {n}-grams" for n, table in enumerate(model, start=1))
    print(f"{args.out}: {sizes} of {len(sentences):,} sentences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
