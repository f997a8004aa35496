"""Recordings and waveforms, on real files made for each case."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from models.config import RATE
from pretrain.data import recordings
from pretrain.data.audio import AudioDataset
from pretrain.data.recordings import open_audio, write_manifest
from tests.errors import failure

ROOT = Path(__file__).parents[2]
ENCODINGS = {
    "wav": ("WAV", "PCM_16", 1e-4),
    "flac": ("FLAC", "PCM_16", 1e-4),
    "ogg": ("OGG", "VORBIS", 0.03),
    "opus": ("OGG", "OPUS", 0.03),
    "mp3": ("MP3", "MPEG_LAYER_III", 0.03),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DATA2VEC_CACHE", str(folder))
    return folder


def write(path, samples, rate=RATE, kind=None, subtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    name, usual, _ = ENCODINGS[kind or path.suffix[1:].lower()]
    soundfile.write(path, samples, rate, format=name, subtype=subtype or usual)
    return path


def noise(seconds, seed=0, scale=0.1):
    return scale * np.random.default_rng(seed).standard_normal(round(seconds * RATE))


def sine(seconds, rate=RATE, hertz=440.0, start=0.0):
    return 0.5 * np.sin(2 * np.pi * hertz * (start + np.arange(round(seconds * rate)) / rate))


def only(path, **options):
    """The source of the one recording below `path`, and its samples."""
    source = open_audio(str(path), **options)
    assert len(source) == 1
    return source, source.read(0, 0, int(source.lengths[0]))


def dataset(path, seed=7, **options):
    return AudioDataset(open_audio(str(path)), seed=seed, **options)


# Reading


@pytest.mark.parametrize("suffix", ENCODINGS)
def test_formats(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", sine(2))
    _, samples = only(tmp_path)
    assert (samples.dtype, len(samples)) == (np.float32, 2 * RATE)
    inner = slice(400, -400)
    assert np.abs(samples - sine(2))[inner].max() < ENCODINGS[suffix][2]


def coded(suffixes, rates):
    """Those of the pairs that the format knows."""
    known = {"opus": (8000, 16000, 48000), "mp3": (8000, 11025, 16000, 22050, 44100, 48000)}
    return [(rate, suffix) for suffix in suffixes for rate in rates if rate in known.get(suffix, (rate,))]


OTHER_RATES = [8000, 11025, 22050, 44100, 48000, 96000, 192000, 44056]


@pytest.mark.parametrize(("rate", "suffix"), coded(["wav", "mp3"], OTHER_RATES))
def test_other_rates_give_the_same_sine(tmp_path, rate, suffix):
    write(tmp_path / f"a.{suffix}", sine(2, rate), rate)
    source, samples = only(tmp_path)
    assert len(samples) == source.lengths[0] == 2 * RATE
    inner = slice(400, -400)
    assert np.abs(samples - sine(2))[inner].max() < {"wav": 1e-3, "mp3": 0.08}[suffix]  # 0.17 is one sample


def test_what_16_khz_cannot_hold_is_filtered_out(tmp_path):
    """10 kHz would come back at 6 kHz if every third sample were taken."""
    write(tmp_path / "a.wav", sine(1, 48_000, 10_000), 48_000)
    assert np.abs(only(tmp_path)[1][400:-400]).max() < 1e-3


@pytest.mark.parametrize(("rate", "suffix"), coded(ENCODINGS, [8000, 11025, 16000, 44100, 48000, 192000, 44056]))
def test_a_part_equals_that_part_of_the_whole(tmp_path, rate, suffix):
    content = np.random.default_rng(1).uniform(-0.5, 0.5, 3 * rate)
    content[rate : 2 * rate] = sine(1, rate)  # a quiet part: MP3 frames there draw on those before them
    write(tmp_path / f"a.{suffix}", content, rate)
    source, whole = only(tmp_path)
    for start, count in [(0, 5000), (1, 1), (777, 3000), (16_001, 4000), (23_456, 9999), (40_000, 8000), (47_990, 10)]:
        part = source.read(0, start, count)
        assert len(part) == count
        np.testing.assert_allclose(part, whole[start : start + count], atol=1e-4)


def test_only_the_part_is_decoded(tmp_path, monkeypatch):
    write(tmp_path / "a.flac", noise(60))
    source = open_audio(str(tmp_path))
    read, counts = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **o: (counts.append(n), read(self, n, **o))[1])
    source.read(0, 30 * RATE, 5 * RATE)
    assert sum(counts) == 5 * RATE


@pytest.mark.parametrize("channels", [2, 8])
def test_channels_are_averaged(tmp_path, channels):
    samples = sine(1)[:, None] * np.arange(channels)
    write(tmp_path / "a.wav", samples / channels)
    expected = sine(1) * (channels - 1) / 2 / channels
    np.testing.assert_allclose(only(tmp_path)[1], expected, atol=2e-4)


def test_reading_past_the_end_gives_what_there_is(tmp_path):
    write(tmp_path / "a.wav", noise(1))
    assert len(only(tmp_path)[0].read(0, 15_000, 5000)) == 1000


def test_mp3_without_a_length_is_measured(tmp_path):
    """libsndfile guesses it from the size of the file and of the first frame."""
    header = b"\xff\xf3\x18\xc4", b"\xff\xf3\x48\xc4"  # 8 and 32 kbit/s; before them are others
    (tmp_path / "in").mkdir()
    bodies = []
    for scale, first in zip((1e-5, 0.1), header, strict=True):
        data = write(tmp_path / "x.mp3", noise(3, scale=scale)).read_bytes()
        bodies.append(data[data.index(first) :])
    (tmp_path / "in" / "tagged.mp3").write_bytes(bodies[0] + bytes(600))
    (tmp_path / "in" / "variable.mp3").write_bytes(bodies[0] + bodies[1])
    guesses = [soundfile.info(path).frames for path in sorted((tmp_path / "in").iterdir())]
    source = open_audio(str(tmp_path / "in"))
    assert np.all(guesses - source.lengths > [2000, 100_000])
    assert np.abs(source.lengths - [3 * RATE, 6 * RATE]).max() < 8000
    for index, count in enumerate(source.lengths.tolist()):
        assert len(source.read(index, 0, count + 1)) == count


@pytest.mark.parametrize(("kind", "name"), [("mp3", "a.wav"), ("wav", "a.ogg"), ("flac", "a.MP3"), ("ogg", "a.flac")])
def test_files_that_lie_about_their_extension(tmp_path, kind, name):
    write(tmp_path / name, sine(1), kind=kind)
    assert np.abs(only(tmp_path)[1] - sine(1))[400:-400].max() < 0.03


def test_names_of_any_bytes(tmp_path):
    name = os.fsdecode(b"\xff \xc3\xa4.wav")
    write(tmp_path / "a.wav", noise(1)).rename(tmp_path / name)
    for _ in range(2):  # scanned, then cached
        source, samples = only(tmp_path)
        assert source.name(0) == str(tmp_path / name)
        assert len(samples) == RATE


def test_sources_are_picklable(tmp_path):
    for name in ("a/1.wav", "b/2.wav"):
        write(tmp_path / name, noise(1))
    source = open_audio(str(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.name(1) == source.name(1)
    np.testing.assert_array_equal(copy.read(1, 5, 500), source.read(1, 5, 500))


# Folders


def test_class_folders(tmp_path):
    for name in ("b/x/1.wav", "a/2.flac", "a/1.WAV", ".hidden/3.wav", "c/readme.txt", "a/.4.wav"):
        write(tmp_path / name, noise(0.5), kind="wav")
    source = open_audio(str(tmp_path))
    assert [source.name(i) for i in range(3)] == [str(tmp_path / n) for n in ("a/1.WAV", "a/2.flac", "b/x/1.wav")]
    assert source.lengths.dtype == source.labels.dtype == np.int64
    assert (source.lengths.tolist(), source.labels.tolist(), source.classes) == ([8000] * 3, [0, 0, 1], ["a", "b"])
    write(tmp_path / "loose.wav", noise(0.5))
    assert open_audio(str(tmp_path)).labels is None


def librispeech(root, subsets):
    for subset in subsets:
        for speaker in ("19", "103"):
            write(root / subset / speaker / "198" / f"{speaker}-198-0000.flac", noise(0.5))


def names(source, root):
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def test_librispeech(tmp_path):
    librispeech(tmp_path, ["dev-clean", "test-clean", "test-other", "train-clean-100", "train-other-500"])
    source = open_audio(str(tmp_path))
    assert [name.split("/")[0] for name in names(source, tmp_path)] == ["train-clean-100"] * 2 + ["train-other-500"] * 2
    assert (source.classes, source.labels.tolist()) == (["103", "19"], [0, 1, 0, 1])
    assert {name.split("/")[0] for name in names(open_audio(str(tmp_path), "test"), tmp_path)} == {
        "test-clean",
        "test-other",
    }
    assert {name.split("/")[0] for name in names(open_audio(str(tmp_path), "dev"), tmp_path)} == {"dev-clean"}
    assert len(open_audio(str(tmp_path), "train-clean-100")) == len(open_audio(str(tmp_path / "dev-clean"))) == 2
    for subset in ("test-clean", "test-other"):
        (tmp_path / subset).rename(tmp_path / subset.replace("test", "spare"))
    assert {name.split("/")[0] for name in names(open_audio(str(tmp_path), "test"), tmp_path)} == {"dev-clean"}
    failure(lambda: open_audio(str(tmp_path), "night"), "night", "train-clean-100")


def test_split_folders(tmp_path):
    for name in ("train/a/1.wav", "train/b/2.wav", "test/a/3.wav"):
        write(tmp_path / name, noise(0.5))
    assert open_audio(str(tmp_path)).classes == ["a", "b"]
    assert names(open_audio(str(tmp_path), "test"), tmp_path) == ["test/a/3.wav"]
    (tmp_path / "test").rename(tmp_path / "other")
    failure(lambda: open_audio(str(tmp_path), "test"), "train", "test")


def test_several_sources_joined_by_plus_follow_one_another(tmp_path):
    for name, seconds in (
        ("x/train/a/1.wav", 0.5),
        ("x/test/a/2.wav", 0.5),
        ("y/3.wav", 0.7),
        ("z/train-b/4.wav", 0.9),
    ):
        write(tmp_path / name, noise(seconds, seed=int(name[-5])))
    write(tmp_path / "z/train-c/5.wav", noise(0.4))
    (tmp_path / "y/bad.wav").write_bytes(b"x")
    write_manifest(str(tmp_path / "y"), str(tmp_path / "y.tsv"))
    for y in ("y", "y.tsv"):
        source = open_audio(f"{tmp_path}/x+{tmp_path}/{y}+{tmp_path}/z")
        found = ["x/train/a/1.wav", "y/3.wav", "z/train-b/4.wav", "z/train-c/5.wav"]
        assert names(source, tmp_path) == found
        assert (source.lengths / RATE).tolist() == [0.5, 0.7, 0.9, 0.4] and source.labels is None
        assert np.abs(source.read(1, 0, 11_200) - noise(0.7, seed=3)).max() < 1e-4
    both = open_audio(f"{tmp_path}/x+{tmp_path}/y")
    assert [skipped.split(":")[0] for skipped in both.skipped] == [str(tmp_path / "y/bad.wav")]
    failure(lambda: open_audio(f"{tmp_path}/x+{tmp_path}/nowhere"), "nowhere does not exist")
    failure(lambda: open_audio(f"{tmp_path}/x+"), "there is nothing before or behind a +")
    (tmp_path / "moved").mkdir()
    for name in "xy":
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert open_audio(f"{tmp_path}/moved/x+{tmp_path}/moved/y").fingerprint() == both.fingerprint()


def test_class_folders_of_several_sources_are_classes_together_and_plus_may_be_in_a_name(tmp_path):
    for name in ("x/a/1.wav", "x/b/2.wav", "y/b/3.wav", "y/c/4.wav", "p+q/5.wav"):
        write(tmp_path / name, noise(0.5))
    source = open_audio(f"{tmp_path}/x+{tmp_path}/y")
    assert source.labels is not None and [source.classes[i] for i in source.labels] == ["a", "b", "b", "c"]
    assert names(open_audio(f"{tmp_path}/p+q"), tmp_path) == ["p+q/5.wav"]


def test_bad_files_are_skipped_and_named(tmp_path):
    whole = {suffix: write(tmp_path / f"x.{suffix}", noise(2)).read_bytes() for suffix in ENCODINGS}
    folder = tmp_path / "in"
    write(folder / "good.wav", noise(1))
    (folder / "empty.flac").touch()
    (folder / "text.wav").write_text("RIFFraff: a text that calls itself a wav file\n" * 100)
    write(folder / "none.wav", np.zeros(0))
    (folder / "gone.wav").symlink_to(folder / "nothing")
    (folder / "head.ogg").write_bytes(whole["ogg"][:200])
    (folder / "head.flac").write_bytes(whole["flac"][:20])
    (folder / "head.mp3").write_bytes(whole["mp3"][:3])
    source = open_audio(str(folder))
    assert names(source, folder) == ["good.wav"]
    reasons = dict(item.split(": ", 1) for item in source.skipped)
    found = {os.path.basename(name) for name in reasons}
    assert found == {"empty.flac", "text.wav", "none.wav", "head.ogg", "head.flac", "head.mp3"}
    assert all(reason and "\n" not in reason and str(folder) not in reason for reason in reasons.values())
    assert reasons[str(folder / "empty.flac")] == "an empty file"
    assert reasons[str(folder / "none.wav")] == "no samples"
    (folder / "good.wav").unlink()
    failure(lambda: open_audio(str(folder)), "none of 6", folder)


def test_nothing_there(tmp_path):
    failure(lambda: open_audio(str(tmp_path / "no")), "does not exist", "manifest")
    failure(lambda: open_audio(str(tmp_path)), "no recordings", tmp_path, "flac")
    failure(lambda: open_audio(str(write(tmp_path / "a.wav", noise(1)))), "folder that holds it")


# The cache of lengths


def examined(monkeypatch):
    opened, real = [], soundfile.SoundFile.__init__

    def init(self, file, *args, **kwargs):
        opened.append(os.path.basename(os.fsdecode(file)))
        real(self, file, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "__init__", init)
    return opened


def test_only_new_and_changed_files_are_scanned_again(tmp_path, monkeypatch):
    for i in range(4):
        write(tmp_path / f"{i}.wav", noise(1))
    first = open_audio(str(tmp_path))
    opened = examined(monkeypatch)
    assert open_audio(str(tmp_path)).lengths.tolist() == first.lengths.tolist() == [RATE] * 4
    assert opened == []
    status = os.stat(write(tmp_path / "1.wav", noise(2)))
    write(tmp_path / "2.wav", noise(1, subtype := 5))  # the same size at another time
    os.utime(tmp_path / "2.wav", ns=(status.st_atime_ns, status.st_mtime_ns + subtype))
    write(tmp_path / "new.wav", noise(3))
    (tmp_path / "3.wav").unlink()
    opened.clear()
    lengths = (np.array([1, 2, 1, 3]) * RATE).tolist()
    assert open_audio(str(tmp_path)).lengths.tolist() == lengths
    assert sorted(opened) == ["1.wav", "2.wav", "new.wav"]
    opened.clear()
    monkeypatch.chdir(tmp_path)
    assert open_audio(".").lengths.tolist() == lengths
    assert opened == []


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"0.wav": 5}', '{"0.wav": [1]}', '{"0.wav": ["a", 1, 1, 1, ""]}', '{"0.wav": null}']
)
def test_a_damaged_cache_is_ignored_and_mended(tmp_path, cache, damage):
    write(tmp_path / "0.wav", noise(1))
    open_audio(str(tmp_path))
    (file,) = cache.rglob("*.json")
    good = json.loads(file.read_text())
    file.write_text(damage)
    assert open_audio(str(tmp_path)).lengths.tolist() == [RATE]
    assert json.loads(file.read_text()) == good
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".json", ".lock"}


def test_without_a_cache_folder_it_works_all_the_same(tmp_path, monkeypatch):
    write(tmp_path / "0.wav", noise(1))
    monkeypatch.setenv("DATA2VEC_CACHE", "/proc/no/such")
    assert open_audio(str(tmp_path)).lengths.tolist() == [RATE]


def test_a_file_that_failed_is_looked_at_again(tmp_path):
    write(tmp_path / "0.wav", noise(1))
    good = write(tmp_path / "1.wav", noise(1)).read_bytes()
    (tmp_path / "1.wav").write_bytes(bytes(len(good)))
    os.utime(tmp_path / "1.wav", ns=(1, 1))
    assert len(open_audio(str(tmp_path)).skipped) == 1
    (tmp_path / "1.wav").write_bytes(good)
    os.utime(tmp_path / "1.wav", ns=(1, 1))
    assert open_audio(str(tmp_path)).skipped == []


def test_a_long_scan_says_how_far_it_is(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(recordings, "_LONG_SCAN", 2)
    for i in range(2):
        write(tmp_path / f"{i}.mp3", noise(1))
    open_audio(str(tmp_path), progress=False)
    assert capfd.readouterr() == ("", "")
    open_audio(str(tmp_path))
    out, err = capfd.readouterr()
    assert (out.strip(), err) == (f"lengths of recordings in {tmp_path}: 2 in 0 s", "")


# Manifests


def test_manifests(tmp_path):
    for name, seconds in (("x/a.wav", 1), ("y/b.flac", 2), ("y/c d.wav", 3)):
        write(tmp_path / "audio" / name, noise(seconds))
    train, valid = tmp_path / "train.tsv", tmp_path / "valid.tsv"
    train.write_text(f"{tmp_path}/audio\nx/a.wav\t16000\ny/c d.wav\t48000\n")
    valid.write_text(f"{tmp_path}/audio\r\ny/b.flac\t32000\r\n")
    for source in (open_audio(str(train)), open_audio(str(tmp_path))):
        assert names(source, tmp_path / "audio") == ["x/a.wav", "y/c d.wav"]
        assert (source.lengths.tolist(), source.classes) == ([16000, 48000], ["x", "y"])
    assert len(source.read(1, 40_000, 8000)) == 8000
    assert names(open_audio(str(tmp_path), "test"), tmp_path / "audio") == ["y/b.flac"]
    valid.unlink()
    failure(lambda: open_audio(str(tmp_path), "test"), "train.tsv", "valid.tsv")


def test_a_manifest_is_believed_without_looking_at_every_file(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", noise(1))
    lines = [str(tmp_path), *["a.wav\t16000"] * 5000, "missing.wav\t16000", *["a.wav\t16000"] * 5000]
    (tmp_path / "m.tsv").write_text("\n".join(lines))
    opened = examined(monkeypatch)
    assert len(open_audio(str(tmp_path / "m.tsv"))) == 10_001
    assert len(opened) <= 32


def test_frames_are_those_of_the_files_own_rate(tmp_path):
    write(tmp_path / "a.wav", sine(2, 44_100), 44_100)
    write(tmp_path / "b.wav", sine(1))
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\na.wav\t88200\nb.wav\t16000\n")
    assert open_audio(str(tmp_path / "m.tsv")).lengths.tolist() == [32_000, 16_000]


def test_a_rate_that_the_manifest_did_not_show_is_an_error(tmp_path):
    write(tmp_path / "a.wav", noise(1))
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\na.wav\t16000\n")
    source = open_audio(str(tmp_path / "m.tsv"))
    write(tmp_path / "a.wav", noise(1), 8000)
    failure(lambda: source.read(0, 0, 100), "8000 Hz", "16000")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("line 1", "folder")),
        ("/no/such/folder\na.wav\t5\n", ("line 1", "/no/such/folder")),
        ("client_id\tpath\n1\ta.wav\n", ("line 1", "folder")),
        ("{0}\n", ("lists no recordings",)),
        ("{0}\na.wav\t16000\na.wav 16000\n", ("line 3", "'a.wav 16000'", "tab")),
        ("{0}\na.wav\t16000\na.wav\tmany\n", ("line 3", "many")),
        ("{0}\na.wav\t-1\n", ("line 2", "-1")),
        ("{0}\na.wav\t1e4\n", ("line 2",)),
        ("{0}\na.wav\t99999999999999999999999\n", ("line 2",)),
        ("{0}\na.wav\t999999999999999\n", ("line 2",)),
        ("{0}\na.wav\t1\t2\n", ("line 2",)),
        ("{0}\n\na.wav\t1\n", ("line 2",)),
        ("{0}\nno.wav\t16000\nnor.wav\t16000\n", ("none of the 2", "no.wav", "No such file")),
        ("{0}\na.wav\t0\n", ("none of 1", "no samples")),
    ],
)
def test_bad_manifests(tmp_path, text, words):
    write(tmp_path / "a.wav", noise(1))
    (tmp_path / "m.tsv").write_text(text.format(tmp_path))
    failure(
        lambda: open_audio(str(tmp_path / "m.tsv")), tmp_path / "m.tsv" if "no samples" not in words else "", *words
    )


def test_other_tables_are_no_manifests(tmp_path):
    """Common Voice has a train.tsv of transcripts beside its clips."""
    write(tmp_path / "clips" / "a.mp3", noise(1))
    (tmp_path / "train.tsv").write_text("client_id\tpath\tsentence\n1\ta.mp3\thello\n")
    assert len(open_audio(str(tmp_path))) == 1


def test_writing_a_manifest(tmp_path):
    write(tmp_path / "in" / "b" / "1.flac", sine(2, 48_000), 48_000)
    write(tmp_path / "in" / "a.wav", noise(1))
    write(tmp_path / "in" / "with\ttab.wav", noise(1))
    (tmp_path / "in" / "bad.ogg").write_text("no")
    out = tmp_path / "out.tsv"
    command = [sys.executable, "-m", "pretrain.data.recordings"]
    done = subprocess.run([*command, tmp_path / "in", out], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 recordings" in done.stdout and "left out 2" in done.stdout
    assert out.read_text() == f"{tmp_path}/in\na.wav\t16000\nb/1.flac\t96000\n"
    assert open_audio(str(out)).lengths.tolist() == [16_000, 32_000]
    done = subprocess.run([*command, tmp_path / "no", out], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (1, f"error: {tmp_path}/no is no folder\n", "")
    failure(
        lambda: write_manifest(str(tmp_path / "in"), str(tmp_path / "no" / "out.tsv")), "cannot write", "no/out.tsv"
    )


def test_a_manifest_needs_recordings(tmp_path):
    failure(lambda: write_manifest(str(tmp_path), str(tmp_path / "out.tsv")), "no recordings")


# Waveforms


def test_the_crop_is_a_part_of_the_normalised_recording(tmp_path):
    write(tmp_path / "a.wav", 0.2 + noise(3), subtype="FLOAT")
    data = dataset(tmp_path)
    whole = np.asarray(noise(3) + 0.2)
    whole = (whole - whole.mean()) / np.sqrt(whole.var() + 1e-5)
    starts = set()
    for epoch in range(20):
        sample = data[epoch, 0, 20_000]
        assert (sample.epoch, sample.index, sample.failures) == (epoch, 0, ())
        assert (sample.inputs.dtype, sample.inputs.shape) == (torch.float32, (20_000,))
        candidates = np.flatnonzero(np.abs(whole[:28_001] - float(sample.inputs[0])) < 1e-5)
        start = next(s for s in candidates if np.allclose(whole[s : s + 20_000], sample.inputs, atol=1e-4))
        starts.add(int(start))
    assert len(starts) > 15
    assert min(starts) < 8000 and max(starts) > 20_000  # of 28,000
    assert len(data[0, 0, 48_000].inputs) == 48_000
    assert data[0, 0, 20_000].inputs.untyped_storage().nbytes() == 80_000  # sent to the main process without the rest


def test_long_recordings_are_read_by_window(tmp_path):
    """A ramp shows where the window was: its mean and deviation are known, whatever was normalised."""
    write(tmp_path / "a.wav", np.linspace(-1, 1, 30 * RATE), subtype="FLOAT")
    data = dataset(tmp_path, max_seconds=2.0)
    assert data.lengths.tolist() == [2 * RATE]
    first = [data[epoch, 0, 2 * RATE].inputs for epoch in range(3)]
    slope = 2 / (30 * RATE)
    deviation = np.sqrt((slope**2) * ((2 * RATE) ** 2 - 1) / 12 + 1e-5)
    for inputs in first:
        assert abs(float(inputs.mean())) < 1e-3
        assert float(inputs[-1] - inputs[0]) == pytest.approx(slope * (2 * RATE - 1) / deviation, rel=1e-3)
    read, starts = data.source.read, []
    data.source.read = lambda i, start, count: (starts.append(start), read(i, start, count))[1]
    for epoch in range(50):
        data[epoch, 0, RATE]
    assert min(starts) < 5 * RATE and max(starts) > 23 * RATE and len(set(starts)) > 45
    starts.clear()
    held = AudioDataset(data.source, seed=1, max_seconds=2.0, train=False)
    assert len(held[0, 0].inputs) == 2 * RATE
    assert starts == [0]


def test_without_train_the_whole_recording(tmp_path):
    write(tmp_path / "a.wav", noise(3), subtype="FLOAT")
    data = dataset(tmp_path, train=False)
    samples = torch.from_numpy(noise(3).astype(np.float32))
    expected = (samples - samples.mean()) / (samples.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(data[0, 0].inputs, expected, atol=1e-4, rtol=0)
    assert torch.equal(data[0, 0].inputs, data[5, 0].inputs)


def test_quiet_recordings_are_not_blown_up(tmp_path):
    """eps 1e-5 is larger than the variance of a recording at -60 dB, as in the published program."""
    write(tmp_path / "a.wav", noise(3, scale=1e-3), subtype="FLOAT")
    assert float(dataset(tmp_path, train=False)[0, 0].inputs.std()) == pytest.approx(np.sqrt(1 / 11), rel=0.02)


def test_samples_are_a_function_of_seed_epoch_and_index(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.wav", noise(4, seed=0))
    data = dataset(tmp_path)
    assert torch.equal(data[1, 2, 9000].inputs, pickle.loads(pickle.dumps(data))[1, 2, 9000].inputs)
    others = [data[0, 2, 9000], data[1, 1, 9000], dataset(tmp_path, seed=8)[1, 2, 9000]]
    assert not any(torch.equal(data[1, 2, 9000].inputs, other.inputs) for other in others)
    keys = [[(0, 0, 9000), (0, 2, 9000)], [(0, 1, 8000)], [(1, 1, 8000)]]
    loaded = [list(DataLoader(data, batch_sampler=keys, collate_fn=list, num_workers=n)) for n in (0, 2)]
    for one, two in zip(*loaded, strict=True):
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(one, two, strict=True))


def test_short_recordings_are_left_out_and_labels_follow(tmp_path, capsys):
    for name, seconds in (("a/1.wav", 3), ("a/2.wav", 1.99), ("b/3.wav", 0.02), ("b/4.wav", 2), ("b/5.wav", 25)):
        write(tmp_path / name, noise(seconds))
    (tmp_path / "b" / "6.wav").write_text("not audio")
    data = dataset(tmp_path)
    assert len(data) == 3
    assert data.lengths.tolist() == [48_000, 32_000, 320_000]
    assert (data.labels.tolist(), data.classes) == ([0, 1, 1], ["a", "b"])
    used, short, skipped = data.notes
    assert used.startswith("3 recordings, 0.01 h, 1 of them longer than 20 s")
    assert "2 recordings shorter than 2 s" in short and "a/2.wav" in short and "b/3.wav" in short
    assert "1 recordings that cannot be read" in skipped and "6.wav: " in skipped
    assert dataset(tmp_path, train=False)[0, 1].inputs.shape == (32_000,)
    assert len(dataset(tmp_path, min_seconds=0.01)) == 5
    failure(lambda: dataset(tmp_path, min_seconds=30, max_seconds=40), "none of 5", "25.00 s")
    failure(lambda: dataset(tmp_path, min_seconds=3, max_seconds=2), "min_seconds=3")


def broken(folder, what):
    """A 3 s recording at a.*, of which something is wrong."""
    if what == "truncated":
        path = write(folder / "a.flac", noise(3))
        path.write_bytes(path.read_bytes()[:-20_000])
    elif what == "damaged":
        path = write(folder / "a.flac", noise(3))
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        path.write_bytes(data)
    elif what == "nan":
        write(folder / "a.wav", np.where(np.arange(48_000) == 30_000, np.nan, noise(3)), subtype="FLOAT")
    elif what == "infinite":
        write(folder / "a.wav", np.where(np.arange(48_000) == 47_999, np.inf, noise(3)), subtype="FLOAT")
    elif what == "huge":
        write(folder / "a.wav", 1e29 * noise(3), subtype="FLOAT")
    elif what == "silent":
        write(folder / "a.ogg", np.zeros(3 * 44_100), 44_100)
    elif what == "constant":
        write(folder / "a.wav", np.full(48_000, 0.25))


@pytest.mark.parametrize("what", ["truncated", "damaged", "nan", "infinite", "huge", "silent", "constant"])
def test_an_unusable_recording_is_named_and_replaced_by_one_that_is_long_enough(tmp_path, what):
    broken(tmp_path, what)
    for i in range(5):
        write(tmp_path / f"short{i}.wav", noise(2.1, seed=i))
    write(tmp_path / "z.wav", noise(3.5, seed=9))
    data = dataset(tmp_path)
    sample = data[0, 0, 40_000]
    assert (sample.index, sample.epoch, len(sample.inputs)) == (0, 0, 40_000)
    assert sample.failures and all(str(tmp_path / "a.") in text and "\n" not in text for text in sample.failures)
    word = {"nan": "finite", "infinite": "finite", "huge": "large", "constant": "silent"}.get(what, what)
    word = {"damaged": "sync", "truncated": "sync"}.get(what, word)  # libsndfile on FLAC
    assert word in sample.failures[0].rpartition("a.")[2]
    assert torch.isfinite(sample.inputs).all()
    assert torch.equal(sample.inputs, dataset(tmp_path)[0, 0, 40_000].inputs)
    assert data[0, 1, 33_000].failures == ()


def test_where_nothing_else_is_as_long_another_is_repeated(tmp_path):
    path = write(tmp_path / "a.flac", noise(5))
    path.write_bytes(path.read_bytes()[:-20_000])
    for i in range(30):
        write(tmp_path / f"short{i}.wav", noise(2.1 + i / 100, seed=i))
    sample = dataset(tmp_path)[0, 0, 80_000]
    assert len(sample.failures) == 1 and "a.flac" in sample.failures[0]
    assert sample.inputs.shape == (80_000,) and float(sample.inputs.std()) > 0.9
    period = next(n for n in range(33_000, 40_000) if torch.equal(sample.inputs[n : n + 100], sample.inputs[:100]))
    assert torch.equal(sample.inputs[period:], sample.inputs[:-period])


def test_a_file_shorter_than_its_manifest_says_is_truncated(tmp_path):
    write(tmp_path / "a.wav", noise(3))
    write(tmp_path / "b.wav", noise(3))
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\na.wav\t60000\nb.wav\t48000\n")
    sample = dataset(tmp_path / "m.tsv")[0, 0, 48_000]
    assert "truncated: 48000" in sample.failures[0] and "60000" in sample.failures[0]


@pytest.mark.parametrize("suffix", ["wav", "opus", "mp3"])
def test_of_truncated_files_without_a_length_the_rest_is_used(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", noise(6))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    data = dataset(tmp_path)
    assert data.lengths[0] == pytest.approx(3.6 * RATE, rel=0.2)
    assert data[0, 0, int(data.lengths[0])].failures == ()


def test_clipped_recordings_are_used_as_they_are(tmp_path):
    loud = 3 * sine(3)
    write(tmp_path / "float.wav", loud, subtype="FLOAT")
    write(tmp_path / "clipped.flac", loud.clip(-1, 1))
    data = dataset(tmp_path, train=False)
    for index, samples in enumerate((loud.clip(-1, 1), loud)):
        sample = data[0, index]
        assert sample.failures == ()
        np.testing.assert_allclose(sample.inputs, samples / samples.std(), atol=1e-3)


def test_recordings_shorter_than_one_frame_of_features(tmp_path):
    write(tmp_path / "a.wav", noise(399 / RATE))
    failure(lambda: dataset(tmp_path), "none of 1", "0.02 s")
    assert len(dataset(tmp_path, min_seconds=0.01)[0, 0, 399].inputs) == 399


def test_after_16_unusable_recordings_it_ends(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.wav", np.zeros(48_000))
    failure(lambda: dataset(tmp_path)[0, 0, 100], "16 recordings in a row", "silent")


def test_keys_outside_are_refused(tmp_path):
    write(tmp_path / "a.wav", noise(3))
    data = dataset(tmp_path)
    with pytest.raises(IndexError):
        data[0, 1, 100]
    with pytest.raises(ValueError, match="48001 samples"):
        data[0, 0, 48_001]
