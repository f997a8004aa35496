"""English speech of many actors: the dialogues of Flight of the Amazon Queen, and what is said in each clip.

The game (John Passfield and Steve Stamatiadis, 1995; given away by them since 2004, with its readme) is one archive of
big-endian numbers. Its head:

    "QTBL", 9 bytes of version, u16 count, and count times: name (12 bytes, zeros behind), u8, u32 offset, u32 size

Files NAME.SB are the clips: MP3 at 11,025 Hz and 16 kbit/s, a segment of a sentence each. Sentences hold commands for
the actors, `*` and two characters (`*XY`: eleven more, a place to go to), which end a segment. A clip is called like
its sentence, with the number of the segment behind it, in hexadecimal and from 1. Strings are a u8 length and so many
characters; behind one that is not empty the file goes on at an even place, in lists of dialogues at one divisible by
four. Places count from behind a header of 20 bytes. What is said where, and what it is called:

    *.DOG  dialogues: i16 levels, key, answers, remarks at 0, 4, 6, 8; u16 places of remarks and farewells at 22, 26.
           Joe's answers begin at 32 + 96 levels. Answer and remark are u16, u16 number, string: key (two digits),
           number (four, hexadecimal; SSSS for 0), J for Joe or P for his partner. Of several of one number the first
           is spoken. Farewells are two strings, the partner's and Joe's, with XXXX for the number.
    *.CUT  scenes: i16 count at 2, the place of their strings, u16, at 8. Behind the first string, which is not spoken,
           sentence 1, 2, ...: the file's name, `_` behind it up to five characters, and the sentence's number (two).
    QUEEN2.JAS  lines of text, of which the first are Joe's descriptions, as many as the u16 at 6 in QUEEN.JAS says:
           JOE and the line's number + 40 (four digits). JOE0001 to JOE0040 are stock answers and buttons: not used.

The formats are as ScummVM reads them (engines/queen: resource.cpp, sound.cpp, talk.cpp, cutaway.cpp, logic.cpp).
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from pretrain.data.sources import DataError

_ARCHIVE = "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
_README = "usr/share/doc/flight-of-the-amazon-queen/readme.txt.gz"
_COMMAND = re.compile(r"\*(?:XY.{11}|.{0,2})")
_MP3 = b"\xff\xe3\x20"  # MPEG 2.5, layer III, 16 kbit/s, 11,025 Hz
_BYTES = 2000  # of that, a second
_STOCK_ANSWERS = 40

Said = Iterator[tuple[str, str]]
"""A sentence's name, which the names of its clips begin with, and the sentence."""


def prepare(unpacked: Path, target: Path) -> None:
    """Clips of 1 to 12 s with 4 to 22 characters a second in train/ and test/, their texts in train.tsv and test.tsv.

    Clips whose names have the first two characters in common, as those of a dialogue, are all in train or all in
    test; test is 8 % of the speech. train.tsv leaves out what is said in test, too. Raises DataError if the archive is
    damaged or another one.
    """
    files = _files((unpacked / _ARCHIVE).read_bytes())
    tables: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for split in tables:
        (target / split).mkdir(parents=True)
    for name, text in sorted(_texts(files).items()):
        clip = files.get(f"{name}.SB", b"")
        seconds = len(clip) / _BYTES
        if 1 <= seconds <= 12 and 4 <= len(text) / seconds <= 22 and re.search("[A-Za-z]", text):
            if not clip.startswith(_MP3):
                raise DataError(f"{name}.SB is no MP3 of 16 kbit/s at 11,025 Hz")
            split = "test" if hashlib.sha256(name[:2].encode()).digest()[0] < 26 else "train"
            (target / split / f"{name}.mp3").write_bytes(clip)
            tables[split].append((f"{split}/{name}.mp3", text))
    held_out = {text.casefold() for _, text in tables["test"]}
    tables["train"] = [(file, text) for file, text in tables["train"] if text.casefold() not in held_out]
    for split, rows in tables.items():
        lines = (f"{file}\t{text}\n" for file, text in [("file", "text"), *rows])
        (target / f"{split}.tsv").write_text("".join(lines), "utf-8")
    (unpacked / _README).rename(target / "readme.txt.gz")


def _files(archive: bytes) -> dict[str, bytes]:
    if archive[:4] != b"QTBL":
        raise DataError(f"queen.1c begins with {archive[:4]!r}, not with its table of files, b'QTBL'")
    files = {}
    try:
        for i in range(*struct.unpack_from(">H", archive, 13)):
            name, offset, size = struct.unpack_from(">12sxII", archive, 15 + 21 * i)
            (files[name.rstrip(b"\0").decode("ascii")],) = struct.unpack_from(f"{size}s", archive, offset)
    except UnicodeDecodeError:
        raise DataError("queen.1c's table has a name that is not ASCII") from None
    except struct.error:
        raise DataError(f"queen.1c ends at byte {len(archive):,}, before the files that its table lists") from None
    return files


def _texts(files: dict[str, bytes]) -> dict[str, str]:
    """What is said in each clip, by its name without ending; also in clips that do not exist."""
    texts: dict[str, str] = {}
    for file, content in files.items():
        stem, _, kind = file.rpartition(".")
        try:
            said = {"DOG": _dialogue, "CUT": _scene}[kind](stem, content[20:]) if kind in ("DOG", "CUT") else ()
            for name, sentence in said:
                _add(texts, name, sentence)
        except struct.error:
            raise DataError(f"{file} ends at byte {len(content):,}, before all of its sentences") from None
    for name, sentence in _descriptions(files):
        _add(texts, name, sentence)
    return texts


def _add(texts: dict[str, str], name: str, sentence: str) -> None:
    for number, segment in enumerate(_COMMAND.split(sentence), start=1):
        texts.setdefault(f"{name}{number:X}", " ".join(segment.split()))


def _dialogue(stem: str, content: bytes) -> Said:
    levels, key, answers, remarks = struct.unpack_from(">h2x3h", content)
    remarks_at, farewells_at = struct.unpack_from(">H2xH", content, 22)
    for speaker, count, place in (("J", answers, 32 + 96 * abs(levels)), ("P", remarks, remarks_at)):
        for _ in range(count):
            (number,) = struct.unpack_from(">2xH", content, place)
            sentence, place = _string(content, place + 4, 4)
            yield f"{key:02d}{f'{number:04X}' if number else 'SSSS'}{speaker}", sentence
    farewell, place = _string(content, farewells_at)
    yield f"{key:02d}XXXXP", farewell
    yield f"{key:02d}XXXXJ", _string(content, place)[0]


def _scene(stem: str, content: bytes) -> Said:
    count, place = struct.unpack_from(">2xh4xH", content)
    _, place = _string(content, place)
    for number in range(1, abs(count) + 1):
        sentence, place = _string(content, place)
        yield f"{stem:_<5}{number:02d}", sentence


def _descriptions(files: dict[str, bytes]) -> Said:
    try:
        (count,) = struct.unpack_from(">H", files["QUEEN.JAS"], 20 + 6)
        lines = files["QUEEN2.JAS"].decode("latin-1").splitlines()
    except (KeyError, struct.error):
        raise DataError("queen.1c lacks QUEEN.JAS or QUEEN2.JAS, or they are cut short") from None
    if len(lines) < count:
        raise DataError(f"QUEEN2.JAS has {len(lines):,} lines, fewer than the {count:,} that QUEEN.JAS counts")
    for number, sentence in enumerate(lines[:count], start=_STOCK_ANSWERS + 1):
        yield f"JOE{number:04d}", sentence


def _string(content: bytes, place: int, step: int = 2) -> tuple[str, int]:
    """The string at `place`, and where the file goes on."""
    (length,) = struct.unpack_from("B", content, place)
    (text,) = struct.unpack_from(f"{length}s", content, place + 1)
    place += 1 + length
    return text.decode("latin-1"), -(-place // step) * step if length else place
