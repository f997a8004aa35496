"""Tokenizers: SentencePiece models and Hugging Face `tokenizer.json` files behind one interface.

python -m pretrain.data.tokenizer train FILES... --vocabulary 8000 --out X.model
python -m pretrain.data.tokenizer roberta encoder.json vocab.bpe dict.txt OUT.json
python -m pretrain.data.tokenizer check TOKENIZER.json encoder.json dict.txt
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from models.config import TextConfig
from pretrain.data.documents import TextReader, find_text
from pretrain.data.sources import DataError
from pretrain.files import write_atomically
from pretrain.progress import Progress
from pretrain.settings import ConfigError

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3: bos, pad, eos, unk
_ALIASES = ("[CLS]", "[PAD]", "[SEP]", "[UNK]")
_MASK = "<mask>"
_SENTENCE = 4096  # bytes


class Tokenizer(ABC):
    """Text to ids and back. Picklable; safe to fork with."""

    vocabulary: int
    """Number of ids, special ones included."""
    bos: int
    pad: int
    eos: int
    unk: int

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def __reduce__(self) -> tuple:
        return open_tokenizer, (self.path, self.content)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special ones: `</s>` within a text is text. One thread."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bos, pad and eos are left out."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; bos, pad or eos that it lacks get ids behind its vocabulary, in this order."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(path, content)
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(content)
            self.vocabulary = self._model.get_piece_size()
        except RuntimeError as error:
            raise DataError(f"{path} is no SentencePiece model, or damaged") from error
        self.unk = self._model.unk_id()
        self.bos, self.pad, self.eos = map(self._id, (self._model.bos_id(), self._model.pad_id(), self._model.eos_id()))

    def _id(self, known: int) -> int:
        if known < 0:
            known, self.vocabulary = self.vocabulary, self.vocabulary + 1
        return known

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        specials = (self.bos, self.pad, self.eos)
        return self._model.decode([int(i) for i in ids if i not in specials])


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; truncation and padding that it may ask for are switched off."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(path, content)
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing more precise
            raise DataError(f"{path} is no tokenizer.json, or damaged: {' '.join(str(error).split())}") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # as text
        pairs = tuple(zip(SPECIALS, _ALIASES, strict=True))
        ids = [next((i for i in map(self._model.token_to_id, pair) if i is not None), None) for pair in pairs]
        missing = [" or ".join(pair) for pair, i in zip(pairs, ids, strict=True) if i is None]
        if missing:
            raise DataError(f"{path} lacks the special tokens {', '.join(missing)}")
        self.bos, self.pad, self.eos, self.unk = (i for i in ids if i is not None)
        self.vocabulary = max(self._model.get_vocab().values()) + 1  # there may be gaps

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The library's own batches use every core, and none of them after a fork.
        return [self._model.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        specials = (self.bos, self.pad, self.eos)
        return self._model.decode([int(i) for i in ids if i not in specials], skip_special_tokens=False)

    def tokens(self) -> list[str | None]:
        """The token of every id, None where there is none."""
        tokens: list[str | None] = [None] * self.vocabulary
        for token, i in self._model.get_vocab().items():
            tokens[i] = token
        return tokens


def open_tokenizer(path: str | Path, content: bytes | None = None) -> Tokenizer:
    """The tokenizer in a SentencePiece `.model` or a Hugging Face `.json` file, or in its `content`, if that is at
    hand; raises `DataError` in one line."""
    path = Path(path).expanduser()
    try:
        content = path.read_bytes() if content is None else content
    except OSError as error:
        raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from error
    return (HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer)(path, content)


TOKENIZERS = ("*.model", "*tokenizer.json")  # what their files are called among others


def is_tokenizer(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in TOKENIZERS)


def tokenizer_among(files: Mapping[str, bytes], text: TextConfig) -> Tokenizer | None:
    """The one among the files, by name, that came with a model's weights; None if none did.

    Raises ConfigError or DataError, in one line, if there are several, or it is no tokenizer, or another model's.
    """
    names = sorted(filter(is_tokenizer, files))
    if len(names) > 1:
        raise ConfigError(f"the weights come with several tokenizers: {', '.join(names)}; leave their own")
    return fitting(open_tokenizer(names[0], files[names[0]]), text) if names else None


def fitting(tokenizer: Tokenizer, text: TextConfig) -> Tokenizer:
    """The tokenizer; raises ConfigError if its ids are not those of the model."""
    if (tokenizer.vocabulary, tokenizer.pad) != (text.vocabulary, text.pad):
        raise ConfigError(
            f"{tokenizer.path} has {tokenizer.vocabulary:,} ids with padding {tokenizer.pad}, the model "
            f"{text.vocabulary:,} with padding {text.pad}: it is not this model's tokenizer"
        )
    return tokenizer


def train_tokenizer(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    vocabulary: int = 8000,
    kind: str = "bpe",
    character_coverage: float = 1.0,
    sentences: int = 2_000_000,
    progress: str = "",
) -> TextReader:
    """Train a SentencePiece model (`kind` bpe or unigram, bytes as the last resort) on text, and write it to `out`.

    The same text gives the same file. Lines are cut to 4 KB; of more than `sentences` such, that many are drawn at
    random. Returns the reader, which knows what was left out; raises `DataError` in one line, also for a
    `vocabulary` that the text is too small or too rich for. `progress` labels a progress line.
    """
    if vocabulary < 1 or not 0 < character_coverage <= 1 or sentences <= 100:
        raise DataError(
            f"a vocabulary of {vocabulary}, a character coverage of {character_coverage} and {sentences} sentences: "
            "give 1 id or more, a coverage above 0 up to 1, and more than 100 sentences"
        )
    reader = TextReader(find_text(paths), piece=_SENTENCE)
    failures: list[BaseException] = []

    def texts() -> Iterator[str]:
        try:
            with Progress(progress, reader.bytes) as bar:
                for text, _, _ in reader:
                    if (news := reader.consumed - bar.done) > 0:
                        bar.advance(news)
                    if text:
                        yield text
        except BaseException as error:  # the trainer would wrap it
            failures.append(error)
            raise

    model = io.BytesIO()
    ids: dict[str, Any] = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts(),
            model_writer=model,
            vocab_size=vocabulary,
            model_type=kind,
            character_coverage=character_coverage,
            byte_fallback=True,
            input_sentence_size=sentences,
            max_sentence_length=2 * _SENTENCE,
            minloglevel=2,
            **ids,
        )
    except (RuntimeError, OSError) as error:
        if failures:
            raise failures[0] from None
        raise DataError(_training_problem(str(error), vocabulary, reader)) from error
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model.getvalue())
    return reader


def _training_problem(message: str, vocabulary: int, reader: TextReader) -> str:
    if "sentences_.empty()" in message:
        left_out = f": {reader.summary()}" if reader.skipped else ""
        return f"no text in {len(reader.files)} file(s) to train a tokenizer on{left_out}"
    if most := re.search(r"<= (\d+)\.", message):
        return f"a vocabulary of {vocabulary:,} is too large for this text, which gives at most {int(most[1]):,}"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        needed = f"which needs at least {int(least[1]):,}: its characters, 256 bytes and 4 special ones"
        return f"a vocabulary of {vocabulary:,} is too small for this text, {needed} (or a lower character coverage)"
    return f"SentencePiece cannot train on this text: {' '.join(message.split())}"


def roberta_tokenizer(encoder_json: Path, vocab_bpe: Path, dict_txt: Path, out: Path) -> None:
    """Write RoBERTa's tokenizer.json from the published files: GPT-2's byte-level BPE in the dictionary's order.

    As in the reference, no space is put in front of a text. Raises `DataError` in one line.
    """
    order = published_order(encoder_json, dict_txt)
    merges = [tuple(line.split(" ")) for line in _read(vocab_bpe).split("\n")[1:] if line]
    if bad := next((pair for pair in merges if len(pair) != 2), None):
        raise DataError(f"{vocab_bpe} has {' '.join(bad)!r} where a pair of tokens to merge should be")
    ids = {token: i for i, token in enumerate(order)}
    parts = {part for pair in merges for part in (*pair, "".join(pair))}
    if lost := sorted(parts - ids.keys()):
        raise DataError(f"{dict_txt} lacks {len(lost)} tokens that {vocab_bpe} merges, one is {lost[0]!r}")
    model = tokenizers.models.BPE(ids, merges, unk_token=SPECIALS[3])  # type: ignore[arg-type]
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([*SPECIALS, _MASK])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, tokenizer.to_str())


def published_order(encoder_json: Path, dict_txt: Path) -> list[str]:
    """The tokens in the order of their ids: specials, the dictionary's lines `<GPT-2 id> <count>`, `<mask>`."""
    try:
        encoder: dict[str, int] = json.loads(_read(encoder_json))
        tokens = {str(int(i)): token for token, i in encoder.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{encoder_json} is no JSON object of tokens and ids") from error
    order = list(SPECIALS)
    for number, line in enumerate(_read(dict_txt).splitlines(), start=1):
        word, space, count = line.rstrip().rpartition(" ")
        if not (space and count.isdigit()):
            raise DataError(f"{dict_txt} line {number} is {line!r}, not '<GPT-2 id> <count>'")
        if word.isdigit() and word not in tokens:
            raise DataError(f"{dict_txt} line {number}: GPT-2 id {word} is not in {encoder_json}")
        order.append(tokens.get(word, word))
    order.append(_MASK)
    if len(set(order)) != len(order):
        raise DataError(f"{dict_txt} lists a token twice: {next(t for t in order if order.count(t) > 1)!r}")
    return order


def check_roberta(tokenizer_json: Path, encoder_json: Path, dict_txt: Path) -> int:
    """Check a tokenizer.json against the published order; returns the number of ids.

    Raises `DataError` that names the first difference.
    """
    tokenizer = open_tokenizer(tokenizer_json)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise DataError(f"{tokenizer_json} is no tokenizer.json")
    order = published_order(encoder_json, dict_txt)
    for i, (found, expected) in enumerate(zip_longest(tokenizer.tokens(), order)):
        if found != expected:
            raise DataError(f"{tokenizer_json}: id {i} is {found!r}, in the published order it is {expected!r}")
    if tokenizer.encode_batch(["a"]) != [[order.index("a")]]:
        raise DataError(f"{tokenizer_json} does not encode 'a' as itself: set add_prefix_space to false")
    return len(order)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pretrain.data.tokenizer", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a SentencePiece model on your own text")
    train.add_argument("files", nargs="+", help=".txt or .jsonl, also .gz, .xz and .bz2, or folders of them")
    train.add_argument("--vocabulary", type=int, default=8000, help="number of ids (%(default)s)")
    train.add_argument("--out", type=Path, required=True, metavar="X.model")
    train.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="(%(default)s)")
    train.add_argument("--character-coverage", type=float, default=1.0, help="share of characters kept (%(default)s)")
    train.add_argument("--sentences", type=int, default=2_000_000, help="lines used at most (%(default)s)")
    roberta = commands.add_parser("roberta", help="build RoBERTa's tokenizer.json from the published files")
    check = commands.add_parser("check", help="check a tokenizer.json against the published files")
    check.add_argument("tokenizer_json", type=Path)
    published: dict[Any, tuple[str, ...]] = {
        roberta: ("encoder_json", "vocab_bpe", "dict_txt", "out_json"),
        check: ("encoder_json", "dict_txt"),
    }
    for command, names in published.items():
        for name in names:
            command.add_argument(name, type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.command == "train":
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the trainer would not notice for minutes
            reader = train_tokenizer(
                given.files,
                given.out,
                vocabulary=given.vocabulary,
                kind=given.type,
                character_coverage=given.character_coverage,
                sentences=given.sentences,
                progress="reading bytes of text",
            )
            left_out = f"; left out: {reader.summary()}" if reader.skipped else ""
            print(f"{given.out}: {given.vocabulary:,} ids{left_out}")
        elif given.command == "roberta":
            roberta_tokenizer(given.encoder_json, given.vocab_bpe, given.dict_txt, given.out_json)
            print(f"{given.out_json}: {open_tokenizer(given.out_json).vocabulary:,} ids")
        else:
            count = check_roberta(given.tokenizer_json, given.encoder_json, given.dict_txt)
            print(f"{given.tokenizer_json}: all {count:,} ids are in the published order")
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
