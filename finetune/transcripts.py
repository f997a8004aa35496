"""Recordings and what is said in them, wherever they lie, told apart by `open_transcribed`."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.data.recordings import EXTENSIONS, AudioSource, open_recordings, read_manifest, split_folders
from pretrain.data.sources import HELD_OUT, DataError, listing, split_names, walk
from pretrain.progress import Progress

Spell = Callable[[str], str]

_DIALOGUES = ("file", "language", "speaker", "text")  # columns of fetch:fillets, whose table does not name them
_LIMITED = {"10m": ("1h/0",), "1h": ("1h",), "10h": ("1h", "9h")}  # Libri-light's limited supervision
_TRANS = ".trans.txt"
_MANY = 5000  # text files


@dataclass(frozen=True)
class Spelling:
    """Words with one space between them: in Unicode's composed form, the `case` lower, upper or as it is. Without
    `punctuation`, all that is no letter, digit or apostrophe in a word separates words."""

    case: str = "lower"
    punctuation: bool = False

    def __call__(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text).replace("|", " ")  # which is written between words
        text = {"lower": text.lower(), "upper": text.upper(), "keep": text}[self.case]
        if not self.punctuation:
            text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
            text = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
            text = " ".join(word for word in text.split() if word.strip("'"))
        return " ".join(text.split())


class Transcribed(NamedTuple):
    """`texts[i]`, spelt and not empty, is said in recording i of the source."""

    source: AudioSource
    texts: list[str]
    notes: tuple[str, ...]
    """What is left out, in sentences for the user."""


class _Found(NamedTuple):
    """Pairs of a path below `root` and what is said there; `key` tells which they are."""

    root: str
    pairs: list[tuple[str, str]]
    key: str
    silent: int = 0
    """Recordings that nothing is written for."""


def open_transcribed(path: str, split: str, language: str, spell: Spell, *, progress: bool = True) -> Transcribed:
    """The transcribed recordings of `split` at `path`, whose layout is told from what lies there.

    `path` is a table or a folder with one. A table is tab-separated: either its first line names the columns, `file`
    (below the table's folder) and `text`, perhaps `split` and `language`; or it is a manifest (`pretrain.data.
    recordings`), beside which NAME.wrd or NAME.ltr has a line for each of its recordings. In a folder it is called
    SPLIT.tsv, manifest.tsv or transcripts.tsv. Otherwise `path` is a folder with recordings at any depth, and beside
    them LibriSpeech's *.trans.txt or a NAME.txt for each. Its splits are subfolders, as in `open_audio`; several are
    joined by `+`. In that of Libri-light's limited supervision 10m, 1h and 10h are splits.

    Raises `DataError` if nothing there can be used.
    """
    path = os.path.expanduser(path)
    found = _find(path, split, language, spell, progress)
    spelt = {os.path.join(found.root, name): spell(text) for name, text in found.pairs}
    names = [name for name, _ in found.pairs if spelt[os.path.join(found.root, name)]]
    if not names:
        raise DataError(f"{path}: the {split} split has no recordings with a transcript")
    source = open_recordings(found.root, names, found.key, progress=progress)
    texts = [spelt[source.name(i)] for i in range(len(source))]
    counts = {"recordings without a transcript": found.silent, "transcripts without a letter": len(spelt) - len(names)}
    notes = (f"left out {count:,} {what}" for what, count in counts.items() if count)
    return Transcribed(source, texts, tuple(notes))


def _find(path: str, split: str, language: str, spell: Spell, progress: bool) -> _Found:
    if os.path.isfile(path):
        return _read_table(path, split, language, spell)
    if not os.path.isdir(path):
        raise DataError(f"{path} does not exist: give a folder of recordings and transcripts, or a table (.tsv)")
    there = {entry.name for entry in listing(path)}
    names = (*(f"{name}.tsv" for name in split_names(split)), "manifest.tsv", "transcripts.tsv")
    if table := next((name for name in names if name in there), None):
        return _read_table(os.path.join(path, table), split, language, spell)
    if split in _LIMITED and {"1h", "9h"} <= there:
        folders = [os.path.join(path, *part.split("/")) for part in _LIMITED[split]]
    else:
        folders = []
        for part in split.split("+"):
            root, *subsets = split_folders(path, part)
            folders += [os.path.join(root, subset) for subset in subsets] or [root]
    pairs: list[tuple[str, str]] = []
    silent = 0
    for folder in folders:
        said, recordings = _read_folder(folder, progress)
        below = os.path.relpath(folder, path)
        pairs += [(os.path.normpath(os.path.join(below, name)), said[key]) for name, key in recordings if key in said]
        silent += sum(key not in said for _, key in recordings)
    if not pairs:
        raise DataError(f"no transcripts (*.trans.txt, or NAME.txt beside each recording) in {', '.join(folders)}")
    return _Found(path, pairs, os.path.join(path, split), silent)


def _read_folder(folder: str, progress: bool) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """What is said, by a recording's name without its ending; and (name, name without ending) of all recordings."""
    names = list(walk(folder, (".txt", *EXTENSIONS)))
    written = [name for name in names if name.lower().endswith(".txt")]
    recordings = [(name, os.path.splitext(name)[0]) for name in names if not name.lower().endswith(".txt")]
    said: dict[str, str] = {}
    label = f"transcripts in {folder}" if progress and len(written) >= _MANY else ""
    with Progress(label, len(written)) as told:
        for name in written:
            text = _text(os.path.join(folder, name))
            if name.endswith(_TRANS):
                lines = (line.partition(" ") for line in text.splitlines())
                said |= {os.path.join(os.path.dirname(name), key): words for key, _, words in lines}
            else:
                said[os.path.splitext(name)[0]] = text
            told.advance(1)
    return said, recordings


def _read_table(path: str, split: str, language: str, spell: Spell) -> _Found:
    lines = _text(path).splitlines()
    if not lines:
        raise DataError(f"{path} is empty")
    if "\t" not in lines[0]:
        return _beside_manifest(path)
    cells = lines[0].split("\t")
    columns, rows = [cell.strip().lower() for cell in cells], lines[1:]
    if os.path.basename(path) == "transcripts.tsv" and len(cells) == len(_DIALOGUES) and "file" not in columns:
        columns, rows = list(_DIALOGUES), lines
    if not {"file", "text"} <= set(columns):
        raise DataError(f"{path}, line 1: has columns {', '.join(columns)}; it needs file and text, separated by tabs")
    table: list[dict[str, str]] = []
    for number, line in enumerate(rows, start=1 + len(lines) - len(rows)):
        if line.strip():
            values = line.split("\t")
            if len(values) != len(columns):
                raise DataError(f"{path}, line {number}: {len(values)} values for the {len(columns)} columns of line 1")
            table.append(dict(zip(columns, values, strict=True)))
    table = _of_language(path, table, language)
    wanted = split_names(split)
    if columns == list(_DIALOGUES):
        return _dialogues(path, table, wanted, spell)
    if "split" in columns:
        there = dict.fromkeys(row["split"] for row in table)
        own = next((name for name in wanted if name in there), None)
        if own is None:
            raise DataError(f"{path} has the splits {', '.join(there)}, but not {' or '.join(wanted)}")
        table = [row for row in table if row["split"] == own]
    elif os.path.splitext(os.path.basename(path))[0] not in wanted and split in HELD_OUT:
        raise DataError(f"{path} has no column split: which of its recordings are for {split}?")
    return _pairs(path, table, split)


def _pairs(path: str, table: Iterable[dict[str, str]], split: str, silent: int = 0) -> _Found:
    root = os.path.dirname(path)
    return _Found(root, [(row["file"], row["text"]) for row in table], f"{path} {split}", silent)


def _of_language(path: str, table: list[dict[str, str]], language: str) -> list[dict[str, str]]:
    there = sorted({row["language"] for row in table if "language" in row})
    if language not in there and (len(there) > 1 or (there and language)):
        raise DataError(f"speech.language={language}: {path} has {', '.join(there)}")
    return [row for row in table if row["language"] == language] if there and language else table


def _dialogues(path: str, table: list[dict[str, str]], wanted: tuple[str, ...], spell: Spell) -> _Found:
    """The split is a file's first folder. Lines that are spoken in both are for the test alone."""
    own = [row for row in table if row["file"].partition("/")[0] in wanted]
    if "train" in wanted:
        held_out = {spell(row["text"]) for row in table if row["file"].partition("/")[0] in HELD_OUT}
        own = [row for row in own if spell(row["text"]) not in held_out]
    return _pairs(path, own, wanted[0])


def _beside_manifest(path: str) -> _Found:
    root, names, _ = read_manifest(path)
    stem = os.path.splitext(path)[0]
    for ending in (".wrd", ".ltr"):
        if os.path.isfile(stem + ending):
            lines = _text(stem + ending).splitlines()
            if len(lines) != len(names):
                raise DataError(f"{stem}{ending} has {len(lines):,} lines for the {len(names):,} recordings of {path}")
            if ending == ".ltr":
                lines = [line.replace(" ", "").replace("|", " ") for line in lines]
            return _Found(root, list(zip(names, lines, strict=True)), path)
    raise DataError(f"{path} is a manifest without transcripts: {stem}.wrd or {stem}.ltr should have a line for each")


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(f"cannot read {path}: {reason}") from error
