"""Files that would run something when they are loaded, or claim what they have not, are refused; nothing runs."""

from __future__ import annotations

import _compat_pickle
import argparse
import collections
import enum
import io
import pickle
import stat
import struct
import sys
import types
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import archive, unpickle
from pretrain.checkpoint import CheckpointError

GLOBAL_OS = b"cposix\nsystem\n"
CHECKPOINTS = Path(__file__).parents[1] / "parity" / "checkpoints"


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def zipped(path: Path, content: bytes, storages=(), name="archive/data.pkl", extra=()) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)
        for key, data in storages:
            file.writestr(f"archive/data/{key}", data)
        for entry, data in extra:
            file.writestr(entry, data)
    return path


def refused(path: Path, *words: str) -> str:
    """The one line that says no."""
    with pytest.raises(CheckpointError) as told:
        unpickle.read(path)
    message = str(told.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    for word in words:
        assert word in message, message
    return message


def touching(sentinel: Path):
    """Payloads that each make a file when Python's own machine runs them, and what has to be named."""
    touch, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')"
    chain = Calls(getattr, Calls(__import__, "os"), "system")
    yield "os.system", Calls(__import__("os").system, touch), "posix.system"
    yield "eval", Calls(eval, code), "builtins.eval"
    yield "exec", Calls(exec, code), "builtins.exec"
    yield "getattr chain", Calls(map, chain, [touch]), "builtins.map"
    yield "open", Calls(open, str(sentinel), "w"), "io.open"
    yield "partial", Calls(partial(open, str(sentinel), "w")), "functools.partial"
    yield "subprocess", Calls(__import__("subprocess").call, ["touch", str(sentinel)]), "subprocess.call"
    yield "pickle in pickle", Calls(pickle.loads, pickle.dumps(Calls(open, str(sentinel), "w"))), "_pickle.loads"
    inner = io.BytesIO()
    torch.save(Calls(open, str(sentinel), "w"), inner)
    yield "torch in torch", Calls(torch.storage._load_from_bytes, inner.getvalue()), "torch.storage._load_from_bytes"
    yield "nested reduce", [{"a": (Calls(collections.OrderedDict, [["k", Calls(eval, code)]]),)}], "builtins.eval"
    yield "state", Calls(argparse.Namespace, state={"a": Calls(exec, code)}), "builtins.exec"
    yield "module import", Calls(__import__("importlib").import_module, "antigravity"), "importlib.import_module"
    yield "copyreg", Calls(__import__("copyreg").add_extension, "os", "system", 77), "copyreg.add_extension"
    yield "torch.load", Calls(torch.load, str(sentinel)), "torch.serialization.load"
    yield "torch.hub", Calls(torch.hub.load, "owner/name", "model"), "torch.hub.load"
    yield "numpy", Calls(np.load, str(sentinel)), "numpy.load"


def name_of_old(name: str) -> str:
    """As protocol 2 writes it."""
    module, _, function = name.rpartition(".")
    module, function = _compat_pickle.REVERSE_NAME_MAPPING.get((module, function), (module, function))
    return f"{_compat_pickle.REVERSE_IMPORT_MAPPING.get(module, module)}.{function}"


NAMES = [name for name, *_ in touching(Path("x"))]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_payload_is_refused_by_name_and_does_not_run(tmp_path: Path, name: str, protocol: int, legacy: bool) -> None:
    sentinel = tmp_path / "ran"
    payload, named = next(rest for found, *rest in touching(sentinel) if found == name)
    path = tmp_path / "hostile.pt"
    torch.save({"model": payload}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    refused(path, f"refused: {named if protocol == 4 else name_of_old(named)} in its pickle")
    assert not sentinel.exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["os.system", "eval", "partial", "pickle in pickle", "nested reduce", "state"])
def test_the_payloads_are_live(tmp_path: Path, name: str) -> None:
    """Or the test above would prove nothing."""
    payload = next(payload for found, payload, _ in touching(tmp_path / "ran") if found == name)
    content = io.BytesIO()
    torch.save(payload, content)
    content.seek(0)
    found = torch.load(content, weights_only=False)
    del found
    assert (tmp_path / "ran").exists()


HAND_WRITTEN = {
    "a class's own methods": (
        b"\x80\x02cargparse\nNamespace\n}(X\x0c\x00\x00\x00__setstate__" + GLOBAL_OS + b"ub.",
        "posix",
    ),
    "a state for a class": (
        b"\x80\x02cargparse\nNamespace\n}(X\x01\x00\x00\x00aK\x01ub.",
        "a state for argparse.Namespace",
    ),
    "a state for a number": (b"\x80\x02K\x01}b.", "a state for int"),
    "a second state": (b"\x80\x02cargparse\nNamespace\n)\x81}b}b.", "a state for argparse.Namespace"),
    "a call of a value": (b"\x80\x02X\x02\x00\x00\x00os)R.", "a call of os"),
    "a call of a name": (b"\x80\x02cbuiltins\nobject\n)R.", "a call of builtins.object"),
    "an instance of a name": (b"\x80\x02cbuiltins\ndict\n)\x81.", "a call of builtins.dict"),
    "an old instance": (b"\x80\x02(iposix\nsystem\n.", "INST"),
    "an old object": (b"\x80\x02(cargparse\nNamespace\no.", "OBJ"),
    "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "a text's persistent id": (b"\x80\x02Pstrange\n.", "PERSID"),
    "a persistent id of a number": (b"\x80\x02K\x05Q.", "no storage's (int)"),
    "a persistent id of a module": (b"\x80\x02(X\x06\x00\x00\x00moduleNNNNtQ.", "no storage's"),
    "a persistent id of no type": (
        b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x000NK\x01tQ.",
        "strange",
    ),
    "a dotted name": (b"\x80\x04\x8c\x08argparse\x8c\x0dNamespace.foo\x93.", "argparse.Namespace.foo"),
    "a name of numbers": (b"\x80\x04K\x01K\x02\x93.", "whose name is no text"),
    "a name with a line's end": (b"\x80\x04\x8c\x04a\nb\n\x8c\x01c\x93.", "a\\nb\\n.c"),
    "a type's attributes": (b"\x80\x02ctyping\nAny\n}b.", "a state for typing.Any"),
    "getitem of a list": (b"\x80\x02c_operator\ngetitem\n]K\x00\x86R.", "operator.getitem on list"),
    "another codec": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "_codecs.encode"),
    "a far place in the memo": (b"\x80\x02Nr\xff\xff\xff\xff0h\x00.", "damaged"),
    "an empty stack": (b"\x80\x020.", "damaged"),
    "a text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
    "a number longer than the file": (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", "damaged"),
    "no end": (b"\x80\x02]" + b"N0" * 1000, "damaged"),
    "a bomb of keys": (b"\x80\x02}" + b")" + b"2\x86" * 60 + b"Ns.", "as a key"),
    "a list as a key": (b"\x80\x02}]Ns.", "list as a key"),
    "a list that holds itself": (b"\x80\x02]q\x00h\x00a.", "hold themselves"),
    "a tower": (b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", "deep"),
    "items of a tuple": (b"\x80\x02)Na.", "items of tuple"),
    "nothing": (b"", "damaged"),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_program_that_makes_no_sense_is_refused(tmp_path: Path, name: str) -> None:
    content, word = HAND_WRITTEN[name]
    refused(zipped(tmp_path / "hostile.pt", content), word)


def test_shared_parts_are_no_bomb(tmp_path: Path) -> None:
    """2^60 leaves, were each part walked through wherever it is mentioned."""
    found = unpickle.read(zipped(tmp_path / "shared.pt", b"\x80\x02)" + b"2\x86" * 60 + b"."))
    for _ in range(60):
        assert found[0] is found[1]
        found = found[0]


def tensor_pickle(size, stride, offset=0, count=4, key="0", kind="FloatStorage") -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", getattr(torch, kind), key, "cpu", count) if thing is torch else None

    class Rebuild:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (torch, offset, size, stride, False, {})

    out = io.BytesIO()
    Pickler(out, 2).dump(Rebuild())
    return out.getvalue()


FOUR = [("0", np.arange(4, dtype=np.float32).tobytes())]


def test_a_tensor_of_its_own_storage_is_read(tmp_path: Path) -> None:
    found = unpickle.read(zipped(tmp_path / "x.pt", tensor_pickle((2, 2), (1, 2)), FOUR))
    assert found.tolist() == [[0, 2], [1, 3]]
    assert unpickle.read(zipped(tmp_path / "x.pt", tensor_pickle((0, 7), (7, 1)), FOUR)).shape == (0, 7)
    assert unpickle.read(zipped(tmp_path / "x.pt", tensor_pickle((), (), 3), FOUR)).item() == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (((5,), (1,)), "leaves its storage"),
        (((2, 2), (4, 1)), "leaves its storage"),
        (((2,), (1,), 3), "leaves its storage"),
        (((0,), (1,), 5), "leaves its storage"),
        (((1 << 40,), (0,)), "leaves its storage"),
        (((1 << 31, 1 << 31), (0, 0)), "leaves its storage"),
        (((2,), (-1,), 3), "negative"),
        (((-1,), (1,)), "negative"),
        (((2,), (1,), -1), "negative"),
        (((1 << 100,), (1,)), "absurd"),
        (((2.5,), (1,)), "no number"),
        (((1,) * 65, (1,) * 65), "leaves its storage"),
        (((2, 2), (1,)), "damaged"),
        (((2,), (1,), 0, 1 << 40), "should have"),
        (((2,), (1,), 0, 3), "should have"),
        (((2,), (1,), 0, -1), "negative"),
        (((2,), (1,), 0, 4, "1"), "is not in it"),
        (((2,), (1,), 0, 4, "../0"), "is not in it"),
        (((2,), (1,), 0, 4, "0", "DoubleStorage"), "should have"),
        (((2,), (1,), 0, 4, "0", "ComplexFloatStorage"), "torch.ComplexFloatStorage"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path, arguments, word: str) -> None:
    refused(zipped(tmp_path / "hostile.pt", tensor_pickle(*arguments), FOUR), word)


@pytest.mark.parametrize(
    "name", ["../data.pkl", "/etc/passwd", "archive/../../x", "archive\\..\\x", "C:/x", "archive//x", "archive/"]
)
def test_an_entry_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    refused(zipped(tmp_path / "hostile.pt", b"\x80\x02N.", extra=[(name, b"x")]), "leaves its folder")
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pt"]


def test_other_strange_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    none = b"\x80\x02N."
    with pytest.warns(UserWarning, match="Duplicate"):
        refused(zipped(path, none, extra=[("archive/data.pkl", none)]), "two entries have one name")
    refused(zipped(path, none, name="other.pkl"), "not torch's")
    refused(zipped(path, none, extra=[("second/x", b"")]), "not torch's")
    refused(zipped(path, none, extra=[("archive/constants.pkl", b"")]), "TorchScript")
    refused(zipped(path, none, extra=[("archive/byteorder", b"big")]), "big-endian")
    link = zipfile.ZipInfo("archive/data/0")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(zipped(path, none, extra=[(link, "/etc/passwd")]), "symbolic link")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", none)
        file.writestr("archive/data/0", bytes(100_000_000))  # a bomb: 100 kB that become 100 MB
    refused(path, "is compressed")
    assert unpickle.read(zipped(path, none, extra=[("archive/byteorder", b"little")])) is None


def edited(path: Path, at: int, new: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)
    return path


def test_archives_whose_headers_lie_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "hostile.pt", tensor_pickle((4,), (1,)), FOUR)
    content = path.read_bytes()
    central = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", central + 4)

    def fresh() -> Path:
        path.write_bytes(content)
        return path

    assert unpickle.read(fresh()).tolist() == [0, 1, 2, 3]
    refused(edited(fresh(), second + 8, b"\x01"), "encrypted")
    refused(edited(fresh(), second + 20, struct.pack("<2L", 1 << 31, 1 << 31)), "bytes that are not there")
    refused(edited(fresh(), second + 24, struct.pack("<L", 1 << 30)), "bytes that are not there")
    refused(edited(fresh(), second + 20, struct.pack("<L", 8)), "bytes that are not there")
    refused(edited(fresh(), second + 42, struct.pack("<L", 0)), "own header says otherwise")
    refused(edited(fresh(), second + 42, struct.pack("<L", 0x7FFFFFFF)), "outside")
    refused(edited(fresh(), central + 20, struct.pack("<2L", 300, 300)), "overlap")
    refused(edited(fresh(), content.index(FOUR[0][1]) + 1, b"\x01"), "the checksum of data/0 is wrong")
    assert unpickle.read(path, verify=False).shape == (4,)
    refused(edited(fresh(), content.index(b"FloatStorage"), b"X"), "the checksum of data.pkl is wrong")
    for length in (len(content) - 30, len(content) // 2, 60, 3, 0):
        path.write_bytes(content[:length])
        refused(path)


def test_what_is_no_torch_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "renamed.pt"
    path.write_text("These are my notes.\n" * 30)
    refused(path, "no torch file")
    path.write_bytes(bytes(257) + b"ustar" + bytes(300))
    refused(path, "tar archive")
    path.write_bytes(pickle.dumps({"model": {}}))
    refused(path, "not one of torch.save's")
    refused(tmp_path / "absent.pt", "No such file")
    refused(tmp_path, "Is a directory")


def test_a_large_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LARGEST_PICKLE", 100)
    refused(zipped(tmp_path / "x.pt", pickle.dumps("x" * 200)), "too large for a pickle")


def legacy_file(path: Path, state) -> bytes:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def test_the_old_format_is_read_and_its_lies_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    content = legacy_file(path, {"a": torch.arange(3.0), "b": torch.arange(5)})
    found = unpickle.read(path)
    assert (
        found["a"].tolist() == [0, 1, 2] and found["b"].dtype == torch.int64 and found["b"].tolist() == list(range(5))
    )
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content)
    refused(edited(path, content.index(struct.pack("<q3f", 3, 0, 1, 2)), struct.pack("<q", 4)), "are not there")
    for count, word in ((b"K\x7f", "are not there"), (b"M\xff\xff", "cannot have 65535 elements")):
        other = content.replace(b"K\x03Nt", count + b"Nt")  # as the pickle has it
        assert other != content
        path.write_bytes(other)
        refused(path, word)


def test_what_checkpoints_hold_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of libraries that are not here stand in sys.modules while the file is written, and no longer."""
    modality = enum.Enum("Modality", {"AUDIO": 1, "IMAGE": 2}, module="fairseq.examples.data2vec.tasks.multimodal")
    dictionary = type("Dictionary", (), {"__module__": "fairseq.data.dictionary"})
    meter = type("AverageMeter", (), {"__module__": "fairseq.meters"})
    with monkeypatch.context() as patched:
        for made in (modality, dictionary, meter):
            module = types.ModuleType(made.__module__)
            setattr(module, made.__name__, made)
            for depth, _ in enumerate(parts := made.__module__.split("."), 1):
                patched.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[0]))
            patched.setitem(sys.modules, made.__module__, module)
        letters, average = dictionary(), meter()
        letters.symbols, average.sum = ["<s>", "A"], np.float64(2.5)
        state = {
            "args": argparse.Namespace(depth=2, inner=argparse.Namespace(heads=[1, 2])),
            "modality": modality.IMAGE,
            "task_state": {"target_dictionary": letters},
            "meters": collections.OrderedDict(train=average),
            "counts": collections.defaultdict(list, {"x": 1}),
            "numbers": (np.int64(-3), np.float32(0.5), np.bool_(True), 1 << 70, 1e300, -1, None),
            "set": {1, 2},
            "bytes": b"\x00\xff",
            "size": torch.Size([2, 3]),
            "device": torch.device("cpu"),
            "dtype": torch.float16,
            "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
        }
        torch.save(state, tmp_path / "x.pt")
    found = unpickle.read(tmp_path / "x.pt")
    assert "fairseq.meters" not in sys.modules
    parameter = found.pop("parameter")
    assert parameter.dtype == torch.float16 and parameter.tolist() == [1, 1]
    assert found == {
        "args": {"depth": 2, "inner": {"heads": [1, 2]}},
        "modality": 2,
        "task_state": {"target_dictionary": {"symbols": ["<s>", "A"]}},
        "meters": {"train": {"sum": 2.5}},
        "counts": {"x": 1},
        "numbers": (-3, 0.5, True, 1 << 70, 1e300, -1, None),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "size": (2, 3),
        "device": "cpu",
        "dtype": "torch.float16",
    }


def test_what_is_written_to_a_tensor_stays_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(3), path)
    unpickle.read(path).fill_(1)
    assert unpickle.read(path).tolist() == [0, 0, 0]


@pytest.mark.parametrize("version", ["2_0", "2_3"])
def test_omegaconf_is_read_without_omegaconf(version: str) -> None:
    found = unpickle.read(CHECKPOINTS / f"omegaconf_{version}.pt")
    inner = {"depth": 2, "scale": None, "layers": [1, 2], "weights": {"a": 0.5}, "choice": "static"}
    assert found == {
        "cfg": {"model": inner, "name": "x", "any": None, "missing": "???", "again": "${model.depth}"},
        "plain": {"task": {"lr": [1.0, 2], "on": True, "none": None}},
        "list": [1, {"a": "b"}],
    }


@pytest.mark.parametrize("name", ["image", "audio", "text"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_authors_own_files_are_read_as_torch_reads_them(tmp_path: Path, name: str, legacy: bool) -> None:
    path = CHECKPOINTS / f"{name}.pt"
    expected = torch.load(path, weights_only=False)
    if legacy:
        torch.save(expected, path := tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert alike(unpickle.read(path), expected) > 900


def alike(found, expected) -> int:
    """How many values there are; all of one kind, order and value in both."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        return sum(alike(found[key], value) for key, value in expected.items())
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        return sum(map(alike, found, expected))
    else:
        assert type(found) is type(expected) and repr(found) == repr(expected)  # NaN too
    return 1


def test_damage_of_any_kind_is_one_line(tmp_path: Path) -> None:
    """Bytes of pickles changed, lost and doubled at random: each is read or refused, nothing else."""
    random, path = np.random.default_rng(0), tmp_path / "x.pt"
    state = {"a": torch.arange(6.0), "b": [1, (2, 3), {"x": {1}}], "n": argparse.Namespace(a=np.float64(1))}
    torch.save(state, path)
    with zipfile.ZipFile(path) as file:
        good = file.read("x/data.pkl")
    opcodes = np.frombuffer(b"(.0123)]}lstuaebRQ\x81\x85\x86\x87\x94\x93h\x8cKMN", np.uint8)
    outcomes = collections.Counter()
    for _ in range(1000):
        content = bytearray(good)
        for _ in range(random.integers(1, 5)):
            at = random.integers(len(content))
            if random.random() < 0.3:
                del content[at : at + random.integers(1, 9)]
            else:
                content[at] = random.choice(opcodes)
        try:
            unpickle.read(zipped(path, bytes(content), [("0", bytes(24))]))
            outcomes["read"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 500 and outcomes["read"] > 20
