"""Pieces of any layout are read into any other: cut at other places, split otherwise, or not at all."""

from pathlib import Path

import pytest
import torch

from models.split import Split
from pretrain import pieces
from pretrain.pieces import Piece, file, read, read_whole

WHOLE = torch.arange(6 * 8, dtype=torch.float32).view(6, 8)
NAME = "master/student.blocks.0.attn.qkv.weight"


def layout(ranks, dim, parts, shards, tensor=WHOLE, name=NAME):
    """By rank, the piece that it owns of `tensor`: cut into `ranks` slices, and every slice into `shards`."""
    found = []
    for rank in range(ranks):
        split = Split(dim, parts, rank, ranks) if ranks > 1 else None
        own = split.take(tensor) if split else tensor
        for shard in range(shards):
            first, last = (own.numel() * s // shards for s in (shard, shard + 1))
            found.append(Piece(name, tuple(own.shape), first, own.flatten()[first:last].clone(), split))
    return found


def written(folder: Path, owned):
    for rank, piece in enumerate(owned):
        pieces.write(file(folder, rank), [piece])
    return pieces.files(folder)


LAYOUTS = [(1, 0, 1, 1), (1, 0, 1, 5), (2, 0, 3, 1), (2, 0, 3, 3), (2, 1, 1, 2), (4, 1, 1, 1)]


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("made", LAYOUTS)
def test_every_layout_reads_every_other(tmp_path, made, to):
    paths = written(tmp_path, layout(*made))
    for expected in layout(*to):
        piece = expected._replace(values=torch.full_like(expected.values, torch.nan))
        read(paths, [piece])
        assert torch.equal(piece.values, expected.values)
    assert torch.equal(read_whole(tmp_path, "master", {NAME.removeprefix("master/"): WHOLE.shape})[NAME[7:]], WHOLE)


@pytest.mark.parametrize("made", [(1, 0, 1, 3), (2, 0, 3, 2)])
@pytest.mark.parametrize("to", [(1, 0, 1, 1), (2, 0, 3, 1), (4, 1, 1, 1)])
def test_a_hole_is_an_error(tmp_path, made, to):
    paths = written(tmp_path, layout(*made))
    paths[-1].unlink()
    with pytest.raises(RuntimeError, match=r"values of master/\S+ are there|a slice of master/\S+ is not there"):
        for piece in layout(*to):
            read(paths[:-1], [piece])


def test_another_shape_is_an_error(tmp_path):
    paths = written(tmp_path, layout(2, 0, 3, 1))
    for shape in ((6, 4), (12, 8)):
        with pytest.raises(RuntimeError, match=r"has shape \[6, 8\] there and"):
            read(paths, layout(1, 0, 1, 1, torch.zeros(shape)))
        with pytest.raises(RuntimeError, match="has shape"):
            read(paths, layout(2, 1, 1, 1, torch.zeros(shape)))
    with pytest.raises(RuntimeError, match="0 of 48 values of other are there"):
        read(paths, layout(1, 0, 1, 1, name="other"))
