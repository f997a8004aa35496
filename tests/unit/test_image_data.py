"""Image sources and crops, on real files made for each case."""

import gzip
import io
import itertools
import math
import os
import pickle
import shutil
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pretrain.data import image as image_module
from pretrain.data import sources
from pretrain.data.image import ImageDataset
from pretrain.data.sources import open_images
from tests.errors import failure

DOWN, ACROSS = np.mgrid[0:255:64j, 0:255:96j]
SMOOTH = np.stack([ACROSS, DOWN, np.full_like(DOWN, 90)], -1).astype(np.uint8)
EXIF_ORIENTATION = 0x0112


def write(path, pixels=SMOOTH, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
    return path


def jpeg(pixels=SMOOTH):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def colour(value):
    return np.full((20, 30, 3), value, np.uint8)


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def dataset(path, size=16, seed=7, **options):
    return ImageDataset(open_images(str(path)), size=size, seed=seed, **options)


def centre(path, size=16, **options):
    """The deterministic view of the only image at `path`, int16 (channels, size, size)."""
    folder = path.parent if path.is_file() else path
    sample = dataset(folder, size, train=False, **options)[0, 0]
    assert sample.failures == ()
    return sample.inputs.to(torch.int16)


# Sources


def test_class_folders_are_labelled_and_sorted(tmp_path):
    for name in (
        "b/2.png",
        "b/deep/1.PNG",
        "a/9.jpeg",
        "a/.hidden.png",
        ".git/x.png",
        "c/readme.txt",
        "a/10.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    source = open_images(str(tmp_path))
    assert [source.name(i) for i in range(len(source))] == [
        str(tmp_path / name) for name in ("a/10.png", "a/9.jpeg", "b/2.png", "b/deep/1.PNG")
    ]
    assert source.classes == ["a", "b"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("names", [("a/1.png", "b/2.png", "3.png"), ("a/1.png", "a/b/2.png"), ("1.png",)])
def test_other_folders_are_unlabelled(tmp_path, names):
    for name in names:
        write(tmp_path / name)
    source = open_images(str(tmp_path))
    assert (len(source), source.labels, source.classes) == (len(names), None, [])


def test_symlinks_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "dangling.png").symlink_to(root / "nothing.png")
    assert [open_images(str(root)).name(0)] == [str(root / "linked" / "1.png")]
    assert len(open_images(str(root))) == 1


def test_split_subfolders(tmp_path):
    for name in ("train/a/1.png", "train/train/2.png", "val/a/3.png"):
        write(tmp_path / name)
    assert open_images(str(tmp_path)).classes == ["a", "train"]
    assert open_images(str(tmp_path / "train")).classes == ["a", "train"]
    test = open_images(str(tmp_path), "test")
    assert [test.name(i) for i in range(len(test))] == [str(tmp_path / "val/a/3.png")]
    (tmp_path / "val").rename(tmp_path / "other")
    failure(lambda: open_images(str(tmp_path), "test"), "test", tmp_path, "validation")


def test_names_survive_packing(tmp_path):
    names = ["ä ö.png", "x" * 120 + ".png", os.fsdecode(b"\xff.png")]
    for name in names:
        (tmp_path / name).write_bytes(jpeg())
    source = pickle.loads(pickle.dumps(open_images(str(tmp_path))))
    assert {source.name(i) for i in range(3)} == {str(tmp_path / name) for name in names}
    assert source.read(0).size == (96, 64)


def test_tar_shards(tmp_path):
    for shard in range(3):
        members = {
            f"./{shard}{i}.{ext}": data
            for i in range(2)
            for ext, data in (
                ("cls", b"%d\n" % (shard + i)),
                ("jpg", jpeg(colour(shard * 80 + i * 20))),
                ("json", b"{}"),
            )
        }
        write_tar(tmp_path / f"shard-{shard:03}.tar", members | {"._00.jpg": b"resource fork"})
    expected = [0, 20, 80, 100, 160, 180]
    for path in (
        tmp_path,
        tmp_path / "shard-{000..002}.tar",
        tmp_path / "*.tar",
        tmp_path / "shard-00{0,1,2}.tar",
    ):
        source = open_images(str(path))
        assert source.labels.tolist() == [0, 1, 1, 2, 2, 3]
        assert source.classes == ["0", "1", "2", "3"]
        assert source.name(3) == f"{tmp_path}/shard-001.tar:11.jpg"
        order = [5, 0, 3, 1, 4, 2]
        values = [np.asarray(source.read(i))[0, 0, 0] for i in order]
        assert np.abs(np.subtract(values, [expected[i] for i in order], dtype=float)).max() <= 1
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(4).size == (30, 20)
    assert len(open_images(str(tmp_path / "shard-001.tar"))) == 2


def test_many_shards_need_few_handles(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_OPEN_SHARDS", 2)
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", {"x.jpg": jpeg(colour(50 * shard))})
    source = open_images(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for i in (0, 1, 2, 3, 4, 0, 0, 4, 3):
        assert abs(int(np.asarray(source.read(i))[0, 0, 0]) - 50 * i) <= 1
    assert len(os.listdir("/proc/self/fd")) - before <= 2


@pytest.mark.parametrize(
    "labels", [{"b.jpg": b""}, {"b.jpg": b"", "b.cls": b"cat"}, {"b.jpg": b"", "b.cls": b"9" * 30}]
)
def test_tar_without_all_numeric_labels_is_unlabelled(tmp_path, labels):
    write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "a.cls": b"3"} | labels)
    source = open_images(str(tmp_path))
    assert (source.labels, source.classes) == (None, [])


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tar(tmp_path, mode):
    compressed = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg()}, mode)
    failure(lambda: open_images(str(tmp_path)), compressed, "compressed")
    renamed = compressed.rename(tmp_path / "x.tar.gz")
    failure(lambda: open_images(str(tmp_path)), "unpack x.tar.gz")
    failure(lambda: open_images(str(renamed)), "x.tar.gz", "compressed")


def test_truncated_or_damaged_tar(tmp_path):
    shard = write_tar(tmp_path / "x.tar", {f"{i}.jpg": jpeg() for i in range(3)})
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        second = tar.getmembers()[1]
    cuts = {"in data": second.offset_data + 700, "in header": second.offset + 100, "between": second.offset}
    for cut in cuts.values():
        shard.write_bytes(data[:cut])
        failure(lambda: open_images(str(tmp_path)), shard, "truncated")
    shard.write_bytes(data[: second.offset] + b"?" * 512 + data[second.offset + 512 :])
    failure(lambda: open_images(str(tmp_path)), shard, "damaged")
    for junk in (b"", b"not a tar at all" * 100):
        shard.write_bytes(junk)
        failure(lambda: open_images(str(tmp_path)), shard, "damaged")
    write_tar(shard, {"a.txt": b"x"})
    failure(lambda: open_images(str(tmp_path)), shard, "no images")


def test_bad_patterns(tmp_path):
    write_tar(tmp_path / "s-0.tar", {"a.jpg": jpeg()})
    write(tmp_path / "a.jpg")
    failure(lambda: open_images(f"{tmp_path}/s-{{0..1}}.tar"), "s-1.tar")
    failure(lambda: open_images(f"{tmp_path}/*.zip"), "*.zip")
    failure(lambda: open_images(f"{tmp_path}/*.jpg"), "a.jpg", ".tar")
    failure(lambda: open_images(f"{tmp_path}/s-{{3..1}}.tar"), "s-{3..1}.tar")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for prefix, part in (("train", images), ("t10k", images[:2])):
        (tmp_path / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(part)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(part[:, 0, 0] % 10)))
    train, test = open_images(str(tmp_path)), open_images(str(tmp_path), "test")
    assert (len(train), len(test)) == (5, 2)
    assert train.classes == [str(digit) for digit in range(10)]
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == (images[:, 0, 0] % 10).tolist()
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    assert train.name(3) == f"{path}[3]"
    assert np.array_equal(pickle.loads(pickle.dumps(train)).read(3), images[3])
    exact = ImageDataset(train, size=28, seed=0, channels=1, train=False)[0, 4].inputs
    assert np.array_equal(exact[0], images[4])
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").unlink()
    assert open_images(str(path)).labels is None


def test_bad_idx(tmp_path):
    path, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    good = idx_bytes(np.zeros((4, 8, 8), np.uint8))
    bad = {
        "magic": b"\1\2\3\4" + good[4:],
        "short": good[:-1],
        "long": good + b"0",
        "header": good[:9],
        "empty": b"",
    }
    for data in [*bad.values(), idx_bytes(np.zeros((0, 8, 8), np.uint8))]:
        path.write_bytes(data)
        failure(lambda: open_images(str(tmp_path)), path)
    path.write_bytes(good)
    labels.write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    failure(lambda: open_images(str(tmp_path)), labels, "3 labels", "4 images")
    failure(lambda: open_images(str(tmp_path), "test"), "t10k")
    path.unlink()
    packed = path.with_name(path.name + ".gz")
    for data in (gzip.compress(good)[:-12], b"no gzip"):
        packed.write_bytes(data)
        failure(lambda: open_images(str(tmp_path)), packed)


def test_wrong_places(tmp_path):
    failure(lambda: open_images(str(tmp_path / "nowhere")), "nowhere", "does not exist")
    failure(lambda: open_images(str(tmp_path)), tmp_path, "no images")
    (tmp_path / "notes.txt").write_text("x")
    failure(lambda: open_images(str(tmp_path)), tmp_path, "no images")
    failure(lambda: open_images(str(tmp_path / "notes.txt")), "notes.txt")
    path = write(tmp_path / "a" / "1.png")
    failure(lambda: open_images(str(path)), path, "folder")
    write_tar(tmp_path / "x.tar", {"a.jpg": jpeg()})
    failure(lambda: open_images(str(tmp_path)), tmp_path, "image files", "tar shards")


# Decoding


def flat(value, mode="L"):
    return Image.fromarray(np.full((20, 20), value, np.uint8)).convert(mode)


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "a.jpeg", "a.png", "a.bmp", "a.webp", "a.tif", "a.TIFF", "a.ppm", "a.jp2", "a.avif", "a.gif"],
)
def test_formats(tmp_path, name):
    got = centre(write(tmp_path / name), 32).numpy()
    want = np.asarray(Image.fromarray(SMOOTH).resize((32, 32), Image.BICUBIC, (16, 0, 80, 64))).transpose(2, 0, 1)
    assert np.abs(got - want.astype(int)).mean() < (12 if name == "a.gif" else 4)


def test_grey_and_one_bit(tmp_path):
    assert (centre(write(tmp_path / "l" / "x.png", flat(77))) == 77).all()
    assert (centre(write(tmp_path / "p" / "x.pgm", flat(77)), channels=1) == 77).all()
    half = np.zeros((16, 16), bool)
    half[:, 8:] = True
    one = centre(write(tmp_path / "1" / "x.png", Image.fromarray(half)))
    assert one.shape == (3, 16, 16)
    assert (one[:, :, :8] == 0).all() and (one[:, :, 8:] == 255).all()


def test_colour_becomes_luminance(tmp_path):
    red = colour(0)
    red[..., 0] = 255
    for name in ("x.png", "x.jpg"):
        pixels = centre(write(tmp_path / name[2:] / name, red), channels=1)
        assert pixels.shape == (1, 16, 16)
        assert (pixels - 76).abs().max() <= 1


def test_alpha_lies_over_white(tmp_path):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, 8:, 3] = 255
    rgba[8:, :, 3] //= 2
    pixels = centre(write(tmp_path / "x.png", rgba))
    assert (pixels[:, :8, :8] == 255).all() and (pixels[:, :8, 8:] == 0).all()
    assert (pixels[:, 8:, 8:] - 128).abs().max() <= 1
    grey = centre(write(tmp_path / "la" / "x.png", Image.fromarray(rgba).convert("LA")))
    assert torch.equal(grey, pixels)


def test_palettes(tmp_path):
    palette = Image.fromarray((np.arange(256).reshape(16, 16) >= 128).astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    plain = centre(write(tmp_path / "p" / "x.png", palette))
    assert plain[:, 0, 0].tolist() == [10, 20, 30] and plain[:, 15, 15].tolist() == [200, 100, 50]
    for folder, transparency in (("index", 0), ("bytes", bytes((0, 255)))):
        clear = centre(write(tmp_path / folder / "x.png", palette, transparency=transparency))
        assert clear[:, 0, 0].tolist() == [255] * 3 and clear[:, 15, 15].tolist() == [200, 100, 50]
    grey = centre(write(tmp_path / "trns" / "x.png", flat(77), transparency=77))
    assert (grey == 255).all()


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    pixels = centre(write(tmp_path / "x.jpg", cmyk, quality=95))
    assert (pixels - torch.tensor([254, 0, 0])[:, None, None]).abs().max() < 12


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.png", "<u2"),
        ("x.pgm", "<u2"),
        ("x.tif", "<u2"),
        ("x.tif", ">u2"),
        ("x.tif", "<i4"),
        ("x.pgm", "<i4"),
    ],
)
def test_deep_grey_is_scaled(tmp_path, name, kind):
    values = np.repeat(np.array([0, 257 * 3, 257 * 128, 65535]), 4)
    deep = Image.fromarray(np.repeat(values[None], 16, 0).astype(kind))
    pixels = centre(write(tmp_path / name, deep), channels=1)
    assert pixels[0, :, [1, 14]].tolist() == [[0, 255]] * 16
    source = open_images(str(tmp_path))
    exact = image_module._eight_bit(source.read(0))
    assert np.asarray(exact)[0].tolist() == np.repeat([0, 3, 128, 255], 4).tolist()


def test_big_endian_sixteen_bit_tiff(tmp_path):
    big = Image.fromarray(np.full((16, 16), 257 * 40, ">u2"))
    assert big.mode == "I;16B"
    assert (centre(write(tmp_path / "x.tif", big)) == 40).all()


def test_float_is_stretched(tmp_path):
    ramp = np.tile(np.linspace(-3, 5, 16, dtype=np.float32), (16, 1))
    ramp[0, 0], ramp[1, 0] = np.nan, np.inf
    pixels = centre(write(tmp_path / "x.tif", Image.fromarray(ramp)), channels=1)
    assert np.abs(pixels[0, 8].numpy() - np.linspace(0, 255, 16)).max() <= 1
    assert pixels[0, 0, 0] == 0 and pixels[0, 1, 0] == 255
    even = write(tmp_path / "even" / "x.tif", Image.fromarray(np.full((4, 4), 0.5, np.float32)))
    assert centre(even).unique().numel() == 1


def test_one_pixel_and_slivers(tmp_path):
    for shape in ((1, 1, 3), (1, 90, 3), (90, 1, 3)):
        path = write(tmp_path / str(shape) / "x.png", np.full(shape, 9, np.uint8))
        data = dataset(path.parent, 8)
        assert all((data[epoch, 0].inputs == 9).all() for epoch in range(20))
        assert (centre(path, 8) == 9).all()


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_animation_gives_first_frame(tmp_path, name):
    frames = [Image.fromarray(colour(value)) for value in (200, 10)]
    options = {"lossless": True} if name == "x.webp" else {}
    path = write(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
    assert (centre(path) - 200).abs().max() <= 2


def quadrants():
    """A different grey in each corner of a non-square image: all orientations look different."""
    pixels = np.zeros((32, 48), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24], pixels[16:, 24:] = 20, 90, 160, 230
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
@pytest.mark.parametrize("scale", [1, 8])
def test_exif_orientation(tmp_path, name, orientation, scale):
    upright = Image.fromarray(quadrants().repeat(scale, 0).repeat(scale, 1)).convert("RGB")
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    by_hand = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }
    stored = np.ascontiguousarray(by_hand[undo](np.asarray(upright)))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"x.jpg": {"quality": 95}, "x.webp": {"lossless": True}}.get(name, {})
    write(tmp_path / "turned" / name, stored, exif=exif, **options)
    write(tmp_path / "upright" / "x.png", upright)
    turned, plain = dataset(tmp_path / "turned"), dataset(tmp_path / "upright")
    for epoch in range(6):
        difference = turned[epoch, 0].inputs.int() - plain[epoch, 0].inputs.int()
        assert difference.abs().float().mean() < 6
    corners = centre(tmp_path / "turned" / name)[0, [1, 1, 14, 14], [1, 14, 1, 14]]
    assert (corners - torch.tensor([20, 90, 160, 230])).abs().max() < 12


def test_multi_picture_jpeg_gives_first_picture(tmp_path):
    pictures = [Image.fromarray(colour(value).repeat(8, 0).repeat(8, 1)) for value in (200, 10)]
    path = write(tmp_path / "x.jpg", pictures[0], format="MPO", save_all=True, append_images=pictures[1:])
    assert (centre(path) - 200).abs().max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # pytest resets the filter that the module sets
def test_broken_exif_is_ignored(tmp_path):
    path = write(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert centre(path).shape == (3, 16, 16)


# Crops


def test_draft_agrees_with_full_decode(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
    path = write(tmp_path / "x.jpg", coarse.resize((1003, 757), Image.BICUBIC), quality=95)
    sizes, draft = [], image_module._draft

    def spy(picture, *args):
        box = draft(picture, *args)
        sizes.append((picture.size[0], min(box[2] - box[0], box[3] - box[1])))
        return box

    monkeypatch.setattr(image_module, "_draft", spy)
    reduced = [dataset(path.parent, 64)[epoch, 0].inputs.int() for epoch in range(12)]
    assert {width for width, _ in sizes} >= {126, 251}
    assert min(side for _, side in sizes) >= 64
    for epoch, pixels in enumerate(reduced):
        difference = (dataset(path.parent, 64, draft=False)[epoch, 0].inputs.int() - pixels).abs()
        assert difference.float().mean() < 1.5
        assert difference.max() < 16
    assert len(sizes) == 12


@pytest.mark.parametrize("size", [(1003, 757), (757, 1003), (640, 480)])
def test_draft_crops_at_the_same_place(tmp_path, size):
    """Grey grows along an axis, or falls, so that what a reduced decode rounds cancels out: the middles of a crop's
    halves, in pixels of the file, are those of the full decode."""
    for axis, side in enumerate(size[::-1]):
        middles = []
        for ramp in (np.linspace(0, 255, side), np.linspace(255, 0, side)):
            grey = ramp.round().astype(np.uint8)
            pixels = np.broadcast_to(grey[:, None] if axis == 0 else grey, size[::-1])
            path = write(tmp_path / str(axis) / "x.jpg", Image.fromarray(pixels), quality=100)
            sources = [dataset(path.parent, 48, draft=draft) for draft in (True, False)]
            crops = torch.stack([torch.stack([data[e, 0].inputs[0] for e in range(20)]) for data in sources]).double()
            middles.append(crops.mean(3 - axis).unflatten(2, (2, 24)).mean(3) * (side - 1) / 255)
        quick, full = (middles[0] - middles[1]) / 2
        assert (quick != full).any()
        assert (quick - full).abs().max() < 1.2


def test_draft_of_photos_is_close_to_full_decode(tmp_path):
    """scikit-learn's photos, 640 x 427: at least 32.8 dB were measured, and 41 half of the time."""
    decibels = []
    for name in ("china.jpg", "flower.jpg"):
        shutil.copy(Path(sklearn.datasets.__file__).parent / "images" / name, tmp_path / name)
    for epoch, index, size in itertools.product(range(8), range(2), (64, 128)):
        quick, full = (dataset(tmp_path, size, draft=d)[epoch, index].inputs.double() for d in (True, False))
        if noise := float((quick - full).square().mean()):
            decibels.append(10 * math.log10(255**2 / noise))
    assert len(decibels) > 20
    assert min(decibels) > 31 and np.median(decibels) > 38


def test_crop_is_where_the_box_says(tmp_path):
    """The smooth image's red is its x and green its y: the crop's ends give the area and aspect back."""
    rng = np.random.default_rng(0)
    boxes = [image_module._random_box((400, 300), (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(4000)]
    left, top, right, bottom = np.array(boxes).T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
    square = [image_module._random_box((300, 300), (0.2, 0.5), (3 / 4, 4 / 3), rng) for _ in range(4000)]
    left, top, right, bottom = np.array(square).T
    area = (right - left) * (bottom - top) / 300**2
    assert abs(area.mean() - 0.35) < 0.01 and abs(np.quantile(area, 0.25) - 0.275) < 0.015
    aspect = np.log((right - left) / (bottom - top))
    assert abs(aspect.mean()) < 0.02 and abs(np.quantile(aspect, 0.75) - np.log(4 / 3) / 2) < 0.02
    assert abs(((left + right) / 2).mean() - 150) < 4 and abs(((top + bottom) / 2).mean() - 150) < 4

    data = dataset(write(tmp_path / "x.png").parent, 32, flip=0.0, crop_scale=(0.2, 0.5))
    spans = []
    for epoch in range(300):
        red, green, _ = data[epoch, 0].inputs.float()
        spans.append((red[:, -1] - red[:, 0]).mean() / 255 * (green[-1] - green[0]).mean() / 255)
    assert 0.28 < np.mean(spans) < 0.36


@pytest.mark.parametrize(("size", "box"), [((400, 100), (400 / 3, 100)), ((100, 400), (100, 400 / 3))])
def test_crop_falls_back_to_the_clamped_centre(size, box):
    got = image_module._random_box(size, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert (got[2] - got[0], got[3] - got[1]) == pytest.approx(box)
    assert (got[0] + got[2], got[1] + got[3]) == pytest.approx(size)


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0), (0.5, 0.5), (1.0, 1)])
def test_flip(tmp_path, flip, share):
    data = dataset(write(tmp_path / "x.png").parent, 8, flip=flip)
    flipped = np.mean([(data[e, 0].inputs[0, :, 0] > data[e, 0].inputs[0, :, -1]).all() for e in range(200)])
    assert abs(flipped - share) < 0.12 * (share == 0.5) + 1e-9


def test_centre_view(tmp_path):
    path = write(tmp_path / "x.png")
    want = Image.fromarray(SMOOTH).resize((48, 32), Image.BICUBIC).crop((8, 0, 40, 32))
    got = dataset(path.parent, 32, train=False)
    assert np.abs(got[0, 0].inputs.numpy() - np.asarray(want).transpose(2, 0, 1).astype(int)).max() <= 1
    assert torch.equal(got[0, 0].inputs, got[5, 0].inputs)
    sample = got[3, 0]
    assert (sample.epoch, sample.index, sample.inputs.dtype) == (3, 0, torch.uint8)
    assert sample.inputs.is_contiguous()


# Determinism and failures


def mixed_folder(root):
    rng = np.random.default_rng(0)
    for i in range(6):
        write(root / f"{i}.jpg", rng.integers(0, 256, (40 + i, 50, 3), np.uint8))
    data = (root / "4.jpg").read_bytes()
    (root / "2.jpg").write_bytes(data[: len(data) // 2])
    (root / "5.jpg").write_bytes(b"")


@pytest.mark.parametrize(("layout", "context"), [("folder", "fork"), ("tar", "fork"), ("tar", "spawn")])
def test_the_same_for_any_worker(tmp_path, layout, context):
    mixed_folder(tmp_path)
    if layout == "tar":
        write_tar(
            tmp_path / "tar" / "x.tar",
            {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))},
        )
    path = tmp_path / "tar" if layout == "tar" else tmp_path
    data = dataset(path)
    keys = [(epoch, index) for epoch in range(2) for index in range(len(data))]
    here = [data[key] for key in keys]
    workers = DataLoader(
        data, batch_size=2, sampler=keys, collate_fn=list, num_workers=2, multiprocessing_context=context
    )
    there = [sample for batch in workers for sample in batch]
    again = dataset(path)
    backwards = {key: again[key] for key in reversed(keys)}
    for key, a, b in zip(keys, here, there, strict=True):
        c = backwards[key]
        assert (a.epoch, a.index) == (b.epoch, b.index) == key
        assert a.failures == b.failures == c.failures
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.inputs, c.inputs)


def test_seed_epoch_and_index_all_matter(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.png")
    data, other = dataset(tmp_path), dataset(tmp_path, seed=8)
    views = [data[0, 0], data[1, 0], data[0, 1], other[0, 0]]
    assert len({sample.inputs.numpy().tobytes() for sample in views}) == 4


def test_failures_are_replaced_and_reported(tmp_path):
    mixed_folder(tmp_path)
    sample = dataset(tmp_path)[0, 2]
    assert sample.index == 2
    assert sample.failures[0].startswith(f"{tmp_path}/2.jpg: ") and "truncated" in sample.failures[0]
    stand_ins = {dataset(tmp_path, seed=seed, train=False)[0, 2].inputs.numpy().tobytes() for seed in range(12)}
    assert len(stand_ins) > 1
    empty = dataset(tmp_path)[0, 5].failures[0]
    assert empty == f"{tmp_path}/5.jpg: not an image, or an unknown format"
    assert dataset(tmp_path)[0, 0].failures == ()


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.gif", "x.tif", "x.bmp", "x.ppm"])
def test_truncated_files_fail(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = write(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = failure(lambda: dataset(tmp_path)[0, 0], "16 images", path)
    assert "0x" not in message


def test_index_outside(tmp_path):
    data = dataset(write(tmp_path / "x.png").parent)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            data[0, index]
    failure(lambda: dataset(tmp_path, channels=4), "4")


def test_max_pixels_is_checked_before_decoding(tmp_path, monkeypatch):
    path = write(tmp_path / "x.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    failure(
        lambda: dataset(tmp_path, max_pixels=96 * 64 - 1)[0, 0], f"{path}: 96x64 exceeds data.image.max_pixels=6143"
    )


def test_max_pixels_of_a_jpeg_counts_what_is_decoded(tmp_path):
    write(tmp_path / "x.jpg", SMOOTH.repeat(8, 0).repeat(8, 1))
    centre(tmp_path / "x.jpg", 64, max_pixels=96 * 64)
    failure(
        lambda: dataset(tmp_path, 65, train=False, max_pixels=96 * 64)[0, 0],
        "768x512 exceeds data.image.max_pixels=6144",
    )


def test_pillow_limit_does_not_interfere(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataset(tmp_path)[0, 0].failures == ()
    assert Image.MAX_IMAGE_PIXELS == 100
