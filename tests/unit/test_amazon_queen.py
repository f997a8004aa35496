"""The speech of Flight of the Amazon Queen out of archives in the game's formats, written here."""

import functools
import hashlib
import io
import struct
import subprocess

import numpy as np
import pytest
import soundfile

from finetune.transcripts import Spelling, open_transcribed
from models.config import RATE
from pretrain.data import amazon_queen
from pretrain.data import fetch as fetching
from pretrain.data.fetch import DebianData, fetch
from pretrain.data.recordings import open_audio
from pretrain.data.sources import DataError

HEADER = b"made for a test 1234"
SAID = {  # text by the name of its clip, as the game's formats define it
    "07SSSSJ1": "Good day to you.",
    "07002AJ1": "I count back doors.",
    "07002AJ2": "Would you like to, too?",
    "07002AJ3": "It is a hobby, you see.",
    "0701BCP1": "What a strange hobby!",
    "07XXXXP1": "Back again so soon?",
    "07XXXXJ1": "Back again for more.",
    "12SSSSJ1": "Anyone at home here?",
    "C5A__011": "Over here, I say!",
    "C5A__022": "Walk with me then",
    "C5A__023": "to the temple.",
    "BLUEP101": "It is the tenth line.",
    "JOE00411": "It looks nice and clean",
    "JOE00421": "That is one long rope!",
}


def archive(files):
    """queen.1c: the table of `files`, a dictionary, and them."""
    head = struct.pack(">4s6s3sH", b"QTBL", b"CEM10", bytes([0, 0, 1]), len(files))
    table, body, begin = b"", b"", len(head) + 21 * len(files)
    for name, content in files.items():
        table += struct.pack(">12sBII", name.encode(), 1, begin + len(body), len(content))
        body += content
    return head + table + body


def string(content, text, step):
    """`content` with the string behind it, filled up to a multiple of `step` bytes if there is one."""
    content += bytes([len(text)]) + text.encode()
    return content + b"?" * (-len(content) % step if text else 0)


def listed(content, lines):
    for number, text in lines:
        content = string(content + struct.pack(">HH", 7, number), text, 4)
    return content


def dialogue(key, joe, partner, farewells, levels=-1):
    answers = listed(b"t" * (32 + 96 * abs(levels)), joe)
    remarks = listed(answers, partner)
    places = len(answers), 0xFFFF, len(remarks)
    head = struct.pack(">5h12x3H", levels, 99, key, len(joe), len(partner), *places)
    return HEADER + head + functools.reduce(lambda content, text: string(content, text, 2), farewells, remarks)[28:]


def scene(*sentences, sign=1):
    head = struct.pack(">HhhHHH", 0, sign * len(sentences), -1, 0xFFFF, 60, 0xFFFF).ljust(60, b"o")
    return HEADER + functools.reduce(lambda content, text: string(content, text, 2), ("*FLunspoken", *sentences), head)


def clip(seconds=2.0):
    """A sine in the game's kind of MP3, 16 kbit/s at 11,025 Hz: 0.1 s more than these."""
    file = io.BytesIO()
    sine = 0.3 * np.sin(np.arange(round(seconds * 11025)) * 0.2)
    soundfile.write(file, sine, 11025, format="MP3", bitrate_mode="CONSTANT", compression_level=0.8)
    return file.getvalue()


def game(voices=SAID):
    """A game's files: its scripts, by which all of SAID is said, and a clip for each of the `voices`."""
    answers = [
        (0, "Good day to you."),
        (0x2A, "I count  back doors.*02Would you like to, too?*XY00(237,112)It is a hobby, you see."),
        (0x2A, "Never spoken, too late!"),
    ]
    files = {
        "P.DOG": dialogue(
            7, answers, [(1, ""), (0x1BC, "What a strange hobby!*24")], [SAID["07XXXXP1"], SAID["07XXXXJ1"]]
        ),
        "LEVELS.DOG": dialogue(12, [(0, "Anyone at home here?")], [], ["", ""], levels=3),
        "C5A.CUT": scene("Over here, I say!", "*FLWalk with me then*GDto the temple.", "*", sign=-1),
        "BLUEP.CUT": scene(*["*"] * 9, "It is the tenth line."),
        "QUEEN.JAS": HEADER + struct.pack(">4H", 9, 9, 9, 2),
        "QUEEN2.JAS": b"It looks nice and clean*24\r\nThat is one long rope!\r\na name, which nobody says\r\n",
    }
    return files | dict.fromkeys((f"{name}.SB" for name in voices), clip())


def unpack(folder, content):
    """What dpkg leaves of a package whose archive is `content`."""
    for path, what in ((amazon_queen._ARCHIVE, content), (amazon_queen._README, b"licence")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(what)


def prepared(folder, files):
    """{split: {file: text}} as the tables say that are made of a game."""
    unpack(folder / "unpacked", archive(files))
    amazon_queen.prepare(folder / "unpacked", folder / "prepared")
    found = {}
    for split in ("train", "test"):
        head, *lines = (folder / "prepared" / f"{split}.tsv").read_text("utf-8").splitlines()
        assert head == "file\ttext" and lines == sorted(lines)
        found[split] = dict(line.split("\t") for line in lines)
    return found


def test_each_clip_has_its_text(tmp_path):
    found = prepared(tmp_path, game())
    assert {file.split("/")[1]: text for rows in found.values() for file, text in rows.items()} == {
        f"{name}.mp3": text for name, text in SAID.items()
    }
    for split, rows in found.items():
        below = {file.relative_to(tmp_path / "prepared").as_posix() for file in (tmp_path / "prepared").rglob("*.mp3")}
        assert set(rows) == {file for file in below if file.startswith(f"{split}/")}
        assert all((tmp_path / "prepared" / file).read_bytes() == clip() for file in rows)
    assert (tmp_path / "prepared/readme.txt.gz").read_bytes() == b"licence"


def test_of_two_answers_of_one_number_the_first_is_said(tmp_path):
    files = game(voices=()) | {
        "P.DOG": dialogue(7, [(5, "This one is spoken."), (5, "This one is not.")], [], ["", ""])
    }
    found = prepared(tmp_path, files | {"070005J1.SB": clip()})
    assert (found["train"] | found["test"]).popitem()[1] == "This one is spoken."


def test_what_begins_alike_is_on_one_side(tmp_path):
    """60 dialogues of two clips each; 26 of 256 first bytes of a hash are for testing."""
    files = game(voices=())
    for key in range(40, 100):
        files[f"D{key}.DOG"] = dialogue(key, [(2, f"Who has room {key}?")], [(3, f"Only friend {key}.")], ["", ""])
        files |= {f"{key}0002J1.SB": clip(), f"{key}0003P1.SB": clip()}
    found = prepared(tmp_path, files)
    sides = {split: {file.split("/")[1][:2] for file in rows} for split, rows in found.items()}
    assert not sides["train"] & sides["test"] and sum(map(len, sides.values())) == 60
    assert (
        sides["test"] == {str(key) for key in range(40, 100) if hashlib.sha256(str(key).encode()).hexdigest() < "1a"}
        and sum(map(len, found.values())) == 120
    )


def test_what_is_said_in_test_is_not_learned(tmp_path):
    files = game(voices=())
    for key in range(40, 100):
        files[f"D{key}.DOG"] = dialogue(key, [(2, "who is THERE?" if key % 2 else "Who is there?")], [], ["", ""])
        files[f"{key}0002J1.SB"] = clip()
    found = prepared(tmp_path, files)
    assert found["test"] and not found["train"]
    assert len(list((tmp_path / "prepared/train").iterdir())) == 60 - len(found["test"])  # to be heard without its text


@pytest.mark.parametrize(
    ("seconds", "text", "kept"),
    [
        (0.8, "Sure thing", False),
        (1.0, "Sure thing", True),
        (11.5, "It is a very long story " * 5, True),
        (12.5, "It is a very long story " * 5, False),
        (3.0, "That is slow", False),
        (3.0, "That is slow.", True),
        (2.0, "x" * 47, True),
        (2.0, "x" * 48, False),
        (2.0, "1940... 1941!", False),
    ],
)
def test_clips_of_other_lengths_or_rates_are_left_out(tmp_path, seconds, text, kept):
    """MP3 adds about 0.1 s: what is at a bound here is between the clip's length and that."""
    files = game(voices=()) | {"C9A.CUT": scene(text), "C9A__011.SB": clip(seconds)}
    assert sum(map(len, prepared(tmp_path, files).values())) == kept


def test_it_trains_and_recognises(tmp_path):
    files = game() | {f"D{key}.DOG": dialogue(key, [(2, f"Who is {key}?")], [], ["", ""]) for key in range(40, 100)}
    found = prepared(tmp_path, files | {f"{key}0002J1.SB": clip() for key in range(40, 100)})
    assert found["test"]
    path = str(tmp_path / "prepared")
    for split, rows in found.items():
        source = open_audio(path, split)
        assert [source.name(i) for i in range(len(source))] == [f"{path}/{file}" for file in rows]
        assert not source.skipped and all(abs(source.lengths / RATE - 2.1) < 0.1)
        said = open_transcribed(path, split, "", Spelling("keep", punctuation=True))
        assert said.texts == list(rows.values())


def damaged(name, change):
    files = game()
    return archive(files | {name: change(files[name])})


BROKEN = {
    "another kind": (lambda: b"QTBX" + archive(game())[4:], ["queen.1c", "QTBX", "QTBL"]),
    "empty": (lambda: b"", ["queen.1c", "QTBL"]),
    "the table is cut": (lambda: archive(game())[:100], ["queen.1c", "byte 100"]),
    "the files are cut": (lambda: archive(game())[:-1], ["queen.1c", "ends"]),
    "a name is no name": (lambda: archive(game()).replace(b"P.DOG", b"\xff.DOG"), ["queen.1c", "ASCII"]),
    "a dialogue is cut": (lambda: damaged("P.DOG", lambda content: content[:-5]), ["P.DOG", "ends"]),
    "a dialogue is a header": (lambda: damaged("P.DOG", lambda content: content[:30]), ["P.DOG", "ends"]),
    "a scene is cut": (lambda: damaged("BLUEP.CUT", lambda content: content[:-4]), ["BLUEP.CUT", "ends"]),
    "no descriptions": (lambda: archive({k: v for k, v in game().items() if k != "QUEEN2.JAS"}), ["QUEEN2.JAS"]),
    "few descriptions": (lambda: damaged("QUEEN2.JAS", lambda content: content[:20]), ["QUEEN2.JAS", "1", "2"]),
    "no count": (lambda: damaged("QUEEN.JAS", lambda content: content[:22]), ["QUEEN.JAS"]),
    "no MP3": (lambda: damaged("07002AJ1.SB", lambda content: b"RIFF" + content), ["07002AJ1.SB", "16 kbit/s"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_archive_is_one_line(tmp_path, monkeypatch, what):
    make, words = BROKEN[what]
    content = make()
    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching.shutil, "which", lambda program: f"/usr/bin/{program}")

    def run(command, cwd=None, **_):
        if command[:2] == ["apt-get", "download"]:
            (cwd / "p_1.0_all.deb").write_text("")
        if command[0] == "dpkg":
            unpack(command[-1], content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", run)
    monkeypatch.setitem(fetching.KNOWN, "toy", DebianData(("p",), amazon_queen.prepare, {}, "bring your own"))
    with pytest.raises(DataError, match="the packages of toy hold something else than expected") as caught:
        fetch("toy")
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "cache" / "toy").exists()
