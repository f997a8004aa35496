"""Features on disk: shards of numbers, and an index that says whose they are.

index.json                     settings, what is written already, what was left out; at the end names and labels
features-00000.safetensors     (or .npz, .parquet) of consecutive samples:
    samples (n,)               numbers of the samples in the data
    labels (n,)                if they have any: indices into the index's `classes`
    pooled.3 (n, D)            means over the positions of a sample, after main block 3
    positions.3 (P, D)         every position of all samples, one sample after the other
    offsets (n + 1,)           where each sample's positions begin, and the last one's end
    probe (n, D')              what probes see
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from pretrain.data.sources import DataError
from pretrain.files import replacing, write_atomically
from pretrain.settings import ConfigError

FORMATS = ("safetensors", "npz", "parquet")
INDEX = "index.json"
Arrays = dict[str, NDArray[Any]]


@dataclass
class Shard:
    """Samples `first` to `end`, but those `left_out`: number -> `name: reason`."""

    file: str
    first: int
    end: int
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> list[int]:
        return [number for number in range(self.first, self.end) if str(number) not in self.left_out]


@dataclass
class Index:
    """`settings` decide every number and file, `about` says where they came from. Unless `complete`, shards are
    missing."""

    settings: dict[str, Any]
    about: dict[str, Any]
    classes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    complete: bool = False
    shards: list[Shard] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[int] | None = None

    @classmethod
    def read(cls, path: Path) -> Index:
        """Raises DataError, in one line, if it cannot be read."""
        try:
            tree = json.loads(path.read_text())
            return cls(**tree | {"shards": [Shard(**shard) for shard in tree["shards"]]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is no index of features, or damaged: {type(error).__name__}: {error}") from None

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


@dataclass
class Gathered:
    """What the batches of one shard have given so far, in any order."""

    numbers: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # rows of each sample: positions, or 1
    genuine: list[bool] = field(default_factory=list)
    parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def add(
        self, numbers: Sequence[int], genuine: Sequence[bool], found: Mapping[str, Tensor], lengths: Sequence[int]
    ) -> None:
        self.numbers += numbers
        self.genuine += genuine
        self.lengths += lengths
        for name, values in found.items():
            self.parts.setdefault(name, []).append(values.cpu().numpy())

    def arrays(self, labels: NDArray[np.int64] | None) -> Arrays:
        """Of the genuine samples, by number."""
        numbers, lengths = np.array(self.numbers), np.array(self.lengths)
        order = np.argsort(numbers, kind="stable")
        order = order[np.array(self.genuine)[order]]
        found: Arrays = {"samples": numbers[order]}
        if labels is not None:
            found["labels"] = labels[found["samples"]]
        if any(name.startswith("positions") for name in self.parts):
            found["offsets"] = np.concatenate([[0], np.cumsum(lengths[order])])
        # Row r of sample i lies behind the rows of the samples that were gathered before i.
        starts, kept = (np.cumsum(lengths) - lengths)[order], lengths[order]
        rows = np.arange(kept.sum()) + np.repeat(starts - (np.cumsum(kept) - kept), kept)
        return found | {name: np.concatenate(parts)[rows] for name, parts in self.parts.items()}


class Store:
    """Where features are written: a folder, or one file beside its index.

    Raises ConfigError, in one line, if other features lie there, or nothing can be written.
    """

    def __init__(self, out: Path, index: Index, samples: int) -> None:
        self.folder, self.path = place(out)
        self.kind, self._size = index.settings["format"], index.settings["shard"]
        self._single = "" if self.folder == out else out.name
        self._samples, self.index = samples, index
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.index = Index.read(self.path)
                refuse_others(self.path, self.index.settings, index.settings)
            elif out.is_file():
                raise ConfigError(f"{out} is there already, without {self.path.name}; choose another --out")
            else:
                index.write(self.path)
        except OSError as error:
            raise ConfigError(f"cannot write {out}: {error.strerror}") from None

    def missing(self) -> list[Shard]:
        """What is not written yet, in order."""
        there = {shard.first for shard in self.index.shards if (self.folder / shard.file).is_file()}
        return [
            Shard(self._single or f"features-{number:05d}.{self.kind}", first, min(first + self._size, self._samples))
            for number, first in enumerate(range(0, self._samples, self._size))
            if first not in there
        ]

    def add(self, shard: Shard, arrays: Arrays) -> None:
        """Writes a shard, and then says so in the index."""
        try:
            with replacing(self.folder / shard.file) as beside:
                WRITERS[self.kind](beside, arrays)
                beside.chmod(0o644)
            others = [other for other in self.index.shards if other.first != shard.first]
            self.index.shards = sorted([*others, shard], key=lambda each: each.first)
            self.index.write(self.path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot write {self.folder / shard.file}: {error}") from None

    def finish(self, names: list[str], labels: list[int] | None) -> None:
        self.index.complete, self.index.names, self.index.labels = True, names, labels
        self.index.write(self.path)


def place(out: Path) -> tuple[Path, Path]:
    """The folder of what is written to `out`, and its index."""
    if out.suffix.removeprefix(".") in FORMATS:
        return out.parent, out.with_suffix(".json")
    return out, out / INDEX


def refuse_others(path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = [f"{key}: {there.get(key)} -> {value}" for key, value in wanted.items() if there.get(key) != value]
    if changed:
        raise ConfigError(f"{path} is of other features ({'; '.join(changed)}); choose another --out, or delete it")


def load(out: str | Path) -> tuple[Index, Arrays]:
    """All shards of a folder or file as one, and their index. Raises DataError, in one line, if some are missing."""
    folder, path = place(Path(out).expanduser())
    index = Index.read(path)
    if not index.complete:
        raise DataError(f"{path} is not complete: run the same python -m finetune.features again")
    parts = [_read(folder / shard.file) for shard in index.shards]
    return index, {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}


def _joined(name: str, parts: list[NDArray[Any]]) -> NDArray[Any]:
    if name != "offsets":
        return np.concatenate(parts)
    ends = np.cumsum([0, *(part[-1] for part in parts)])
    return np.concatenate([[0], *(part[1:] + before for part, before in zip(parts, ends, strict=False))])


def _read(path: Path) -> Arrays:
    try:
        return READERS[path.suffix.removeprefix(".")](path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None


def _write_safetensors(path: Path, arrays: Arrays) -> None:
    save_file(arrays, path)


def _read_safetensors(path: Path) -> Arrays:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def _write_npz(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read_npz(path: Path) -> Arrays:
    with np.load(path) as file:  # which unpickles nothing
        return dict(file)


def _write_parquet(path: Path, arrays: Arrays) -> None:
    """A row a sample: `samples`, `labels`, fixed-size lists of D numbers, and lists of such for positions."""
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {}
    for name, array in arrays.items():
        if array.ndim == 1 and name != "offsets":
            columns[name] = pyarrow.array(array)
        elif array.ndim == 2:
            columns[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.reshape(-1)), array.shape[1])
            if name.startswith("positions"):
                columns[name] = pyarrow.LargeListArray.from_arrays(pyarrow.array(arrays["offsets"]), columns[name])
    parquet.write_table(pyarrow.table(columns), path)


def _read_parquet(path: Path) -> Arrays:
    import pyarrow
    from pyarrow import parquet

    arrays: Arrays = {}
    try:
        table = parquet.read_table(path, memory_map=True)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    for name, column in zip(table.column_names, table.columns, strict=True):
        values = pyarrow.concat_arrays(column.chunks)
        if pyarrow.types.is_large_list(values.type):
            arrays["offsets"], values = values.offsets.to_numpy(), values.values
        if pyarrow.types.is_fixed_size_list(values.type):
            arrays[name] = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
        else:
            arrays[name] = values.to_numpy()
    return arrays


WRITERS = {"safetensors": _write_safetensors, "npz": _write_npz, "parquet": _write_parquet}
READERS = {"safetensors": _read_safetensors, "npz": _read_npz, "parquet": _read_parquet}
