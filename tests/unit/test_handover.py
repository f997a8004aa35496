"""Batches come out of a loader's workers as they went in, and memory is used again only when nobody looks at it."""

import pickle
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import Tensor

from models.movable import Movable
from pretrain.data import handover
from pretrain.data.handover import Packing
from pretrain.data.loader import load_batches
from pretrain.parallel import World

HERE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Things(Movable):
    pixels: Tensor
    numbers: Tensor
    names: tuple[str, ...]
    missing: Tensor | None = None


def things(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (3, 5, 7), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    numbers = torch.randn(4, 3, dtype=torch.float64, generator=generator)[:, ::2]
    return Things(pixels, numbers, (f"file {seed}",))


def nested(seed):
    """What collating functions make: dataclasses, tuples, tensors of every kind, an empty one among them."""
    whole = torch.arange(seed, seed + 3)
    return things(seed), {"empty": torch.empty(0, 4), "flags": whole > 1, "scalar": torch.tensor(seed)}, [whole, "name"]


def same(left, right):
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Movable):
        return type(left) is type(right) and same(vars(left), vars(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.fixture
def pack():
    yield Packing(nested, "a loader")
    handover.forget("a loader")


def number(parcel):
    return parcel.key[-1]


def test_a_batch_is_what_it_was(pack):
    for seed in range(3):
        assert same(pickle.loads(ForkingPickler.dumps(pack(seed))).open(), nested(seed))


def test_a_piece_is_used_again_when_its_last_tensor_is_gone(pack):
    parcels = [pack(0), pack(1)]
    assert [number(parcel) for parcel in parcels] == [0, 1]
    first, second = (parcel.open() for parcel in parcels)
    third = pack(2)
    assert number(third) == 2
    part = first[0].pixels[2:, 1].T  # a view of a view
    expected = part.clone()
    del first
    fourth = pack(3)
    assert number(fourth) == 3
    assert torch.equal(part, expected) and same(second, nested(1))
    del part
    fifth = pack(4)
    assert number(fifth) == 0
    for seed, parcel in enumerate((third, fourth, fifth), start=2):
        assert same(parcel.open(), nested(seed))
    assert same(second, nested(1))


def test_only_new_pieces_are_sent(pack):
    first = pack(0)
    assert len(first.piece) > 105 + 64
    first.open()  # and gone at once
    assert pack(1).piece is None


def test_a_larger_batch_gets_a_larger_piece():
    pack = Packing(torch.ones, "a loader of growing batches")
    small = pack(10).open()
    for size in (1000, 10_000, 20):
        parcel = pack(size)
        assert (number(parcel), parcel.piece is None) == (1, size == 20)
        assert torch.equal(parcel.open(), torch.ones(size))
    assert torch.equal(small, torch.ones(10))
    handover.forget(pack.loader)


def test_pinning_frees_the_piece_and_makes_one_storage(pack, monkeypatch):
    """Parts of one storage: PyTorch finds by it the pinned memory that a copy to the GPU is still reading."""
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)  # which needs a GPU
    parcel = pack(5)
    pinned = parcel.pin_memory()
    assert number(pack(6)) == number(parcel)
    assert same(pinned, nested(5))
    batch = pinned[0]
    assert batch.pixels.untyped_storage().data_ptr() == batch.numbers.untyped_storage().data_ptr()


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, key):
        if key == 99:
            raise ValueError("number 99")
        return torch.full((1 + key % 5, 1000), key)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_with_workers_gives_what_one_without_gives(workers):
    keys = [[i, i + 5] for i in range(20)]
    alone = list(load_batches(Numbers(), keys, torch.stack, 0, HERE))
    beside = list(load_batches(Numbers(), keys, torch.stack, workers, HERE))  # all at once
    assert same(alone, beside) and len(alone) == 20
    for expected, found in zip(alone, load_batches(Numbers(), keys, torch.stack, workers, HERE), strict=True):
        assert torch.equal(expected, found)
    assert not handover._received


def test_an_error_of_a_worker_arrives():
    with pytest.raises(ValueError, match="number 99"):
        list(load_batches(Numbers(), [[1], [99]], torch.stack, 1, HERE))


def test_batches_outlive_their_loader():
    batches = load_batches(Numbers(), ([i] for i in range(100)), torch.stack, 1, HERE)
    kept = [next(batches) for _ in range(7)]
    batches.close()
    assert [np.unique(batch.numpy()).tolist() for batch in kept] == [[i] for i in range(7)]
