"""Data sets by name, from packages that a pretended apt-get hands out."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from pretrain.data import fetch as fetching
from pretrain.data.fetch import DebianData, digest, fetch, resolve
from pretrain.data.sources import DataError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose apt-get knows the packages in the returned dictionary, name -> {file: content}."""
    packages, calls = {}, []
    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching.shutil, "which", lambda program: f"/usr/bin/{program}")

    def run(command, cwd=None, **_):
        calls.append(list(map(str, command)))
        program, verb, *what = calls[-1]
        if program == "apt-get" and verb == "download":
            for name in what:  # a download that breaks off leaves what it has
                if name not in packages:
                    return subprocess.CompletedProcess(command, 100, "", f"W: x\nE: Unable to locate {name}\n")
                (Path(cwd) / f"{name}_1.0_all.deb").write_text("")
        if program == "dpkg":
            archive, folder = what
            for file, content in packages[Path(archive).name.partition("_")[0]].items():
                target = Path(folder) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", run)
    packages["calls"] = calls
    return packages


def known(monkeypatch, **fields):
    def prepare(unpacked, target):
        (unpacked / "usr").rename(target)

    defaults = {"packages": ("p", "q"), "prepare": prepare, "by_hand": "bring your own", "sha256": {"p.txt": sha(b"p")}}
    monkeypatch.setitem(fetching.KNOWN, "toy", DebianData(**(defaults | fields)))


def sha(content):
    return hashlib.sha256(content).hexdigest()


def failure(*words):
    with pytest.raises(DataError) as caught:
        fetch("toy")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_several_packages_become_one_folder_once(machine, monkeypatch, tmp_path):
    known(monkeypatch)
    machine |= {"p": {"usr/p.txt": b"p"}, "q": {"usr/sub/q.txt": b"q"}}
    target = fetch("toy")
    assert target == tmp_path / "cache" / "toy"
    assert (target / "p.txt").read_bytes() + (target / "sub/q.txt").read_bytes() == b"pq"
    assert sorted(os.listdir(target.parent)) == [".toy.lock", "toy"]
    before = len(machine["calls"])
    assert resolve("fetch:toy") == str(target)
    assert len(machine["calls"]) == before
    assert resolve("~/x") == os.path.expanduser("~/x")


def test_package_lists_are_updated_only_if_need_be(machine, monkeypatch):
    known(monkeypatch)
    machine |= {"p": {"usr/p.txt": b"p"}}
    failure("q", "Unable to locate", "bring your own")
    assert [call[1] for call in machine["calls"]] == ["download", "update", "download"]
    machine["q"] = {}
    machine["calls"].clear()
    fetch("toy")
    assert [call[1] for call in machine["calls"]] == ["download", "-x", "-x"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"usr/p.txt": b"changed"}, ("p.txt", sha(b"changed"), sha(b"p"), "not used")),
        ({"usr/other.txt": b"p"}, ("p.txt", "something else")),
        ({"elsewhere/p.txt": b"p"}, ("something else", "not used")),
    ],
)
def test_other_contents_are_refused_and_not_kept(machine, monkeypatch, tmp_path, files, words):
    known(monkeypatch, packages=("p",))
    machine["p"] = files
    failure("toy", *words)
    assert os.listdir(tmp_path / "cache") == [".toy.lock"]


@pytest.mark.parametrize(
    ("name", "hint"), [("fillets", "your own recordings"), ("fashion_mnist", "dataset-fashion-mni")]
)
def test_without_apt_the_message_says_what_to_do(monkeypatch, tmp_path, name, hint):
    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path))
    monkeypatch.setattr(fetching.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match=hint) as caught:
        fetch(name)
    assert "data.path" in str(caught.value) and "apt-get" in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_line(machine, monkeypatch, tmp_path):
    known(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DATA2VEC_CACHE", str(tmp_path / "file" / "below"))
    failure("cannot write", str(tmp_path / "file"), "bring your own")


def test_unknown_names(monkeypatch):
    with pytest.raises(DataError, match=r"fasion.*fashion_mnist.*fillets"):
        fetch("fasion")


def test_digest_of_a_folder_is_that_of_sha256sum(tmp_path):
    for name in ("b", "a/c", "a.d", "B"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    listing = "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    done = subprocess.run(listing, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert digest(tmp_path) == done.stdout.split()[0]


def dialog(clip, font, text):
    return f'dialogId("{clip}", "{font}", "English")\ndialogStr("{text}")\n\n'


def test_fillets_are_sorted_by_speaker_with_whole_levels_held_out(tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    game = tmp_path / "unpacked" / "usr/share/games/fillets-ng"

    def write(file, content=b""):
        (game / file).parent.mkdir(parents=True, exist_ok=True)
        (game / file).write_bytes(content)

    def speak(file, samples=800):
        write(file)
        soundfile.write(game / file, [0.1, -0.1] * (samples // 2), 22050, format="OGG")

    levels = [f"level{i}" for i in range(60)]
    for level in levels:
        for language in ("cs", "nl"):
            text = dialog("m-x", "font_small", f"Ahoj, {level}!") + dialog("v-x", "font_big", "Hoi")
            write(f"script/{level}/dialogs_{language}.lua", text.encode())
            speak(f"sound/{level}/{language}/m-x.ogg")
            speak(f"sound/{level}/{language}/v-x.ogg")
    odd = (
        dialog("m-none", "font_small", "no such clip")
        + dialog("o-x", "font_octopus", "another speaker")
        + dialog("m-long", "font_small", 'a \\"b\\"\t c:\\\\d')
        + 'dialogId("v-two", "font_big",\n   "English, twice")\n\ndialogStr(\n"on two lines")'
    )
    write("script/odd/dialogs_cs.lua", odd.encode())
    for clip in ("o-x", "m-long", "v-two"):
        speak(f"sound/odd/cs/{clip}.ogg")
    target = tmp_path / "target"
    fetching._fillets(tmp_path / "unpacked", target)

    found = {file.relative_to(target).as_posix() for file in target.rglob("*.ogg")}
    rows = [line.split("\t") for line in (target / "transcripts.tsv").read_text().splitlines()]
    assert sorted(found) == [file for file, *_ in rows]
    assert len(found) == 60 * 4 + 2
    assert {file.split("/")[1] for file in found} == {"cs_small", "cs_big", "nl_small", "nl_big"}
    sides = {level: {f.split("/")[0] for f in found if f"/{level}__" in f} for level in levels}
    assert all(len(side) == 1 for side in sides.values())
    assert 1 <= sum(side == {"test"} for side in sides.values()) <= 15
    by_clip = {file.split("__")[1]: rest for file, *rest in rows if "odd__" in file}
    assert by_clip == {"m-long.ogg": ["cs", "small", 'a "b" c:\\d'], "v-two.ogg": ["cs", "big", "on two lines"]}
    assert ["cs", "small", "Ahoj, level7!"] in [rest for file, *rest in rows if "level7__m-x" in file]


def test_several_joined_by_plus_are_each_resolved(machine, monkeypatch, tmp_path):
    known(monkeypatch, packages=("p",))
    machine["p"] = {"usr/p.txt": b"p"}
    toy = str(tmp_path / "cache" / "toy")
    assert resolve("/a+fetch:toy+~/x") == f"/a+{toy}+{os.path.expanduser('~/x')}"
    assert resolve("fetch:toy+fetch:toy") == f"{toy}+{toy}"
    with pytest.raises(DataError, match=r"toyz.*fillets"):
        resolve("fetch:toy+fetch:toyz")
