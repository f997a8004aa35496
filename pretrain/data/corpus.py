"""A corpus of token ids in Megatron's indexed format: made from text, and read by memory map.

python -m pretrain.data.corpus FILES_OR_FOLDERS... --tokenizer X --out PREFIX
python -m pretrain.data.corpus adopt PREFIX --tokenizer X

PREFIX.bin holds the ids of all documents one after the other, PREFIX.idx where each begins, PREFIX.json what one has to
know to train on them, and PREFIX.model or PREFIX.tokenizer.json is a copy of the tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.documents import EMPTY, Documents, TextReader, find_text
from pretrain.data.encode import encode
from pretrain.data.names import digest
from pretrain.data.sources import DataError
from pretrain.data.tokenizer import Tokenizer, open_tokenizer
from pretrain.eager import uncompiled
from pretrain.files import write_atomically
from pretrain.progress import Progress

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer[Any]]] = {4: np.int32, 5: np.int64, 8: np.uint16}
_HOW_TO_MAKE = "make one with python -m pretrain.data.corpus FILES --tokenizer X --out PREFIX"
_PROBES, _PROBE = 64, 1024


@dataclass(frozen=True)
class CorpusMeta:
    """What PREFIX.json says."""

    tokenizer: str
    """Name of the tokenizer's file, beside the corpus."""
    fingerprint: str
    """SHA-256 of that file, hexadecimal."""
    vocabulary: int
    bos: int
    pad: int
    eos: int
    unk: int
    documents: int
    tokens: int
    largest_id: int
    skipped: dict[str, int]
    """Reason -> how often."""
    sources: list[str]


class Corpus:
    """One stream of token ids over one or several corpora of the same tokenizer, memory-mapped.

    Picklable (by path); safe to fork or spawn with. Raises `DataError`, in one line, for what cannot be used.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        self.prefixes = tuple(prefixes)
        parts = [_open_part(prefix) for prefix in self.prefixes]
        metas = [meta for _, meta in parts]
        for prefix, meta in zip(self.prefixes, metas, strict=True):
            if meta.fingerprint != metas[0].fingerprint:
                raise DataError(f"{self.prefixes[0]} and {prefix} were made with different tokenizers: keep one kind")
        self._maps = [ids for ids, _ in parts]
        self._ends = np.cumsum([len(ids) for ids in self._maps])
        self.tokens = int(self._ends[-1])
        """Number of ids in the stream."""
        self.tokenizer_path = Path(self.prefixes[0]).parent / metas[0].tokenizer
        self.meta = CorpusMeta(
            **asdict(metas[0])
            | {
                "documents": sum(meta.documents for meta in metas),
                "tokens": self.tokens,
                "largest_id": max(meta.largest_id for meta in metas),
                "skipped": dict(sum((Counter(meta.skipped) for meta in metas), Counter())),
                "sources": [source for meta in metas for source in meta.sources],
            }
        )
        """Of all corpora together."""

    def __reduce__(self) -> tuple:
        return Corpus, (self.prefixes,)

    def fingerprint(self) -> str:
        """Tells this corpus from others, wherever it lies: its sizes, its tokenizer, and some of its ids."""
        starts = np.linspace(0, max(0, self.tokens - _PROBE), _PROBES).astype(np.int64)
        probes = [self.read(int(start), min(int(start) + _PROBE, self.tokens)) for start in starts]
        return digest(self._ends, self.meta.fingerprint.encode(), *probes)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """The ids at [start, stop) of the stream, a copy."""
        part = int(np.searchsorted(self._ends, start, side="right"))
        begin = start - int(self._ends[part - 1] if part else 0)
        found = self._maps[part][begin : begin + stop - start].astype(np.int64)
        missing = stop - start - len(found)
        return np.concatenate([found, self.read(stop - missing, stop)]) if missing else found


def open_corpus(path: str | Path, split: str = "train") -> Corpus:
    """The corpus at a prefix, an .idx or .bin file, or in a folder, all that it holds in order of their names.

    A subfolder named like the split is used if there is one. Raises `DataError` in one line.
    """
    path = os.path.expanduser(path)
    prefix = path.removesuffix(".idx").removesuffix(".bin")
    if os.path.isdir(path) and not os.path.isfile(f"{prefix}.idx"):
        inside = os.path.join(path, split)
        folder = Path(inside if os.path.isdir(inside) else path)
        prefixes = sorted(str(file).removesuffix(".idx") for file in folder.glob("*.idx"))
        if not prefixes:
            raise DataError(f"no corpus in {folder}: {_HOW_TO_MAKE}")
        return Corpus(prefixes)
    return Corpus([prefix])


class _Index(NamedTuple):
    """An .idx file: where sequences, and documents of one or more of them, lie in the .bin file."""

    dtype: type[np.integer[Any]]
    lengths: NDArray[np.int32]
    """(sequences,), in ids"""
    pointers: NDArray[np.int64]
    """(sequences,), in bytes"""
    documents: NDArray[np.int64]
    """(documents + 1,), sequences before each"""


def _read_index(path: str) -> _Index:
    try:
        content = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {_HOW_TO_MAKE}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    head = content[: _HEADER.size].tobytes()
    magic, version, code, sequences, documents = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise DataError(f"{path} is no index of token ids, or damaged: its header is {head.hex()}")
    if content.size != _HEADER.size + 12 * sequences + 8 * documents or documents < 1:
        counts = f"{sequences:,} sequences and {documents - 1:,} documents"
        raise DataError(f"{path} is truncated or damaged: {content.size:,} bytes do not fit {counts}")
    lengths, pointers = _HEADER.size, _HEADER.size + 4 * sequences
    ends = pointers + 8 * sequences
    return _Index(
        _DTYPES[code],
        content[lengths:pointers].view("<i4"),
        content[pointers:ends].view("<i8"),
        content[ends:].view("<i8"),
    )


def _map_ids(prefix: str) -> tuple[NDArray[np.integer[Any]], _Index]:
    index = _read_index(f"{prefix}.idx")
    try:
        size = os.path.getsize(f"{prefix}.bin")
    except OSError as error:
        raise DataError(f"cannot read {prefix}.bin: {error.strerror}") from error
    if not len(index.lengths):
        raise DataError(f"{prefix} is an empty corpus")
    expected = int(index.pointers[-1]) + int(index.lengths[-1]) * np.dtype(index.dtype).itemsize
    if size != expected:
        raise DataError(f"{prefix}.bin is truncated or damaged: {size:,} bytes, {prefix}.idx says {expected:,}")
    return np.memmap(f"{prefix}.bin", index.dtype, mode="r"), index


def _open_part(prefix: str) -> tuple[NDArray[np.integer[Any]], CorpusMeta]:
    ids, _ = _map_ids(prefix)
    file = f"{prefix}.json"
    if not os.path.isfile(file):
        how = f"make it with python -m pretrain.data.corpus adopt {prefix} --tokenizer X"
        raise DataError(f"{file}, which names the corpus's tokenizer, is missing: {how}")
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
        meta = CorpusMeta(**{field.name: content[field.name] for field in fields(CorpusMeta)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {type(error).__name__} {error}") from error
    if meta.tokens != len(ids):
        raise DataError(f"{prefix}.bin has {len(ids):,} ids, {file} says {meta.tokens:,}: they do not belong together")
    starts = np.linspace(0, max(0, len(ids) - _PROBE), _PROBES).astype(np.int64)
    probes = (ids[start : start + _PROBE] for start in starts)
    _check_ids(prefix, [np.array([meta.largest_id]), *probes], meta.vocabulary)
    tokenizer = Path(prefix).parent / meta.tokenizer
    try:
        digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {tokenizer}, the tokenizer of {prefix}: {error.strerror}") from error
    if digest != meta.fingerprint:
        raise DataError(f"{tokenizer} is not the tokenizer that {prefix} was made with: its SHA-256 differs")
    return ids, meta


def _check_ids(prefix: str, parts: Iterable[NDArray[np.integer[Any]]], vocabulary: int) -> int:
    """The largest id; raises `DataError` if one is outside the vocabulary."""
    largest = 0
    for part in parts:
        least, most = int(part.min()), int(part.max())
        if least < 0 or most >= vocabulary:
            wrong = least if least < 0 else most
            raise DataError(f"{prefix} has the id {wrong:,}, outside its tokenizer's vocabulary of {vocabulary:,}")
        largest = max(largest, most)
    return largest


def build_corpus(
    paths: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    documents: Documents = "line",
    workers: int = 1,
    progress: str = "",
) -> TextReader:
    """Tokenise text to a corpus at the prefix `out`, each document ended by eos.

    The result does not depend on `workers`, the number of processes. Memory is bounded but for Megatron's index: 12
    bytes a document, some 60 more while it is written. Files are renamed into place when all is done. Returns the
    reader, which knows what was left out; raises `DataError` in one line. `progress` labels a progress line.
    """
    out = Path(out)
    opened = open_tokenizer(tokenizer)
    _refuse_existing(out, ("bin", "idx", "json"), opened)
    reader = TextReader(find_text(paths), documents)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        scratch = Path(folder) / out.name
        with Progress(progress, reader.bytes) as bar:
            found = _write_ids(scratch, reader, opened, workers, bar)
        if not found["documents"]:
            left_out = f": {reader.summary()}" if reader.skipped else ""
            raise DataError(f"no documents in {len(reader.files)} file(s){left_out}")
        sources = [file.name for file in reader.files]
        _write_meta(scratch, opened, **found, skipped=dict(reader.skipped), sources=sources)
        meta = f"{out.name}.json"  # comes last: it vouches for the others
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == meta):
            file.replace(out.parent / file.name)
    return reader


def _refuse_existing(prefix: Path, endings: Iterable[str], tokenizer: Tokenizer) -> None:
    for ending in endings:
        if os.path.exists(f"{prefix}.{ending}"):
            raise DataError(f"{prefix}.{ending} exists already: remove it or choose another name")
    copy = _tokenizer_copy(prefix, tokenizer)
    if copy.exists() and hashlib.sha256(copy.read_bytes()).hexdigest() != tokenizer.fingerprint:
        raise DataError(f"{copy} exists already and is another tokenizer: remove it or choose another name")


def _tokenizer_copy(prefix: Path, tokenizer: Tokenizer) -> Path:
    return prefix.with_name(prefix.name + (".tokenizer.json" if tokenizer.path.suffix == ".json" else ".model"))


def _write_ids(prefix: Path, reader: TextReader, tokenizer: Tokenizer, workers: int, bar: Progress) -> dict[str, int]:
    """Write .bin and .idx; return the numbers of documents and tokens, and the largest id."""
    builder = None
    documents = tokens = largest = 0
    pending = False  # whether the present document has ids already
    eos = torch.tensor([tokenizer.eos], dtype=torch.int32)
    for batch, lengths, ids in encode(reader, tokenizer, workers):
        builder = builder or _builder(f"{prefix}.bin", tokenizer.vocabulary)  # slow to import: workers are busy now
        start = 0
        for piece, length in zip(batch, lengths.tolist(), strict=True):
            if length:
                builder.add_item(torch.from_numpy(ids[start : start + length]))
                start += length
                pending = True
            elif pending and piece.last:
                builder.add_item(eos)
                tokens += 1
            if piece.last:
                if pending:
                    builder.end_document()
                    documents += 1
                else:
                    reader.skip(EMPTY, piece.where)
                pending = False
        tokens += start
        largest = max(largest, int(ids.max(initial=0)))
        if (news := reader.consumed - bar.done) > 0:
            bar.advance(news)
    if builder:
        builder.finalize(f"{prefix}.idx")
    return {"documents": documents, "tokens": tokens, "largest_id": max(largest, tokenizer.eos)}


def _builder(path: str, vocabulary: int) -> Any:
    with warnings.catch_warnings(action="ignore"), uncompiled():  # about parts of Megatron not for data
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    builder: Any = IndexedDatasetBuilder(path, DType.optimal_dtype(vocabulary))
    builder.sequence_lengths, builder.document_indices = array("i"), array("q", [0])  # lists would take 8 times as much
    return builder


def _write_meta(prefix: Path, tokenizer: Tokenizer, **found: Any) -> None:
    """Copy the tokenizer beside the corpus, and write PREFIX.json."""
    copy = _tokenizer_copy(prefix, tokenizer)
    if not (copy.exists() and copy.samefile(tokenizer.path)):
        shutil.copyfile(tokenizer.path, copy)
    special = {name: getattr(tokenizer, name) for name in ("vocabulary", "bos", "pad", "eos", "unk")}
    meta = CorpusMeta(tokenizer=copy.name, fingerprint=tokenizer.fingerprint, **special, **found)
    write_atomically(f"{prefix}.json", json.dumps(asdict(meta), indent=1, ensure_ascii=False) + "\n")


def adopt_corpus(prefix: str | Path, tokenizer: str | Path, progress: str = "") -> str:
    """Write what a corpus made by Megatron's own tools lacks, once its ids have been checked.

    Returns a warning, empty if there is none. Raises `DataError` if an id is outside the tokenizer's vocabulary.
    """
    prefix = str(prefix).removesuffix(".idx").removesuffix(".bin")
    opened = open_tokenizer(tokenizer)
    _refuse_existing(Path(prefix), ("json",), opened)
    ids, index = _map_ids(prefix)
    parts = np.split(ids, range(1 << 22, len(ids), 1 << 22))
    with Progress(progress, len(ids)) as bar:

        def passing() -> Iterator[NDArray[np.integer[Any]]]:
            for part in parts:
                yield part
                bar.advance(len(part))

        largest = _check_ids(prefix, passing(), opened.vocabulary)
    documents = len(index.documents) - 1
    found = {"documents": documents, "tokens": len(ids), "largest_id": largest, "skipped": {}}
    _write_meta(Path(prefix), opened, **found, sources=[Path(prefix).name])
    last = index.documents[1:1001] - 1  # sequences
    last = last[last >= 0]
    ends = index.pointers[last] // np.dtype(index.dtype).itemsize + index.lengths[last] - 1
    closed = int((ids[ends] == opened.eos).sum())
    if closed == len(last):
        return ""
    return (
        f"of the first {len(last):,} documents only {closed:,} end with </s> (id {opened.eos}): is this the tokenizer?"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    adopting = given[:1] == ["adopt"]
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m pretrain.data.corpus{' adopt' * adopting}", description=summary)
    parser.add_argument("--tokenizer", required=True, metavar="X", help="a SentencePiece .model or a tokenizer.json")
    if adopting:
        parser.add_argument("prefix", help="of a corpus made by Megatron's own tools")
        given = given[1:]
    else:
        parser.epilog = "python -m pretrain.data.corpus adopt -h: use a corpus made by Megatron's own tools"
        parser.add_argument("paths", nargs="+", help=".txt or .jsonl, also .gz, .xz and .bz2, or folders of them")
        parser.add_argument("--out", required=True, metavar="PREFIX", help="files written: PREFIX.bin, PREFIX.idx, ...")
        parser.add_argument(
            "--documents",
            choices=get_args(Documents),
            default="line",
            help="a line each (default), up to a blank line, or a file each; ignored for .jsonl",
        )
        parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    options = parser.parse_args(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # to tidy up
    try:
        if adopting:
            warning = adopt_corpus(options.prefix, options.tokenizer, "checking ids")
            if warning:
                print(f"warning: {warning}", file=sys.stderr)
            corpus = open_corpus(options.prefix)
            left_out = ""
        else:
            reader = build_corpus(
                options.paths,
                options.tokenizer,
                options.out,
                documents=options.documents,
                workers=options.workers,
                progress="tokenising bytes of text",
            )
            corpus = open_corpus(options.out)
            left_out = f"; left out: {reader.summary()}" if reader.skipped else ""
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
    print(f"{corpus.prefixes[0]}: {corpus.tokens:,} tokens in {corpus.meta.documents:,} documents{left_out}")


if __name__ == "__main__":
    main()
