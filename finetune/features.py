"""A checkpoint's encoder, frozen, without the engine that trained it; and the features that it gives a data set.

python -m finetune.features CHECKPOINT DATA --out FOLDER_OR_FILE [--what pooled|positions|probe] [--layers -1 8 all]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from finetune.inputs import Source, in_memory, open_source
from finetune.stored import FORMATS, Gathered, Index, Store
from models.config import ModelConfig
from models.masks import real_positions
from models.objectives import encoder as fresh_encoder
from pretrain.checkpoint import CheckpointError
from pretrain.data.loader import load_batches
from pretrain.data.names import digest, few
from pretrain.data.sources import DataError
from pretrain.data.tokenizer import Tokenizer, tokenizer_among
from pretrain.full import WHICH, Full, read
from pretrain.labelled.modality import MODALITIES
from pretrain.labelled.samples import Array, Inputs, Matrix, Represent, Samples, collate_genuine, like_sized
from pretrain.parallel import World
from pretrain.progress import Progress
from pretrain.settings import ConfigError

ALL = "all"
WHAT = ("pooled", "positions", "probe")
HERE = World(0, 1, torch.device("cpu"))  # one process, whose batches are not pinned
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Features(NamedTuple):
    positions: Tensor  # (B, T, D) fp32, extra tokens dropped
    pooled: Tensor  # (B, D), their mean, without padding
    lengths: Tensor | None = None  # (B,) positions that are no padding; None: all


class FrozenEncoder:
    """An encoder in fp32 that no longer learns. Calling it gives what probes see: (B, D')."""

    def __init__(
        self,
        encoder: Any,
        config: ModelConfig,
        device: torch.device | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = encoder.float().to(self.device).eval().requires_grad_(False)
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    def untrained(cls, config: ModelConfig, seed: int) -> FrozenEncoder:
        """The same encoder before its first step: with a run's own seed, just what that run started from."""
        return cls(_fresh(config, seed), config)

    @classmethod
    def of(cls, full: Full, which: str = "teacher") -> FrozenEncoder:
        """The teacher or the student of a full form. Raises ConfigError if it has none."""
        weights, encoder = full.encoder(which), _fresh(full.model, seed=0)
        encoder.load_state_dict(weights)
        tokenizer = tokenizer_among(full.assets, full.model.text) if full.model.modality == "text" else None
        return cls(encoder, full.model, tokenizer=tokenizer)

    @overload
    def features(self, inputs: Tensor | Sequence[Any], layer: int = -1, lengths: Tensor | None = None) -> Features: ...

    @overload
    def features(
        self, inputs: Tensor | Sequence[Any], layer: Sequence[int] | str, lengths: Tensor | None = None
    ) -> list[Features]: ...

    @torch.inference_mode()
    def features(
        self, inputs: Tensor | Sequence[Any], layer: int | Sequence[int] | str = -1, lengths: Tensor | None = None
    ) -> Features | list[Features]:
        """Features after main block `layer`, counted as Python counts; of several blocks or of "all", a list of them.

        `inputs` is a tensor, as the model's batches have it, uint8 (B, C, H, W), waveforms (B, samples) or ids (B, T),
        with `lengths` (B,) in positions if some are padded; or a sequence of samples as one has them: PIL images or
        uint8 arrays, waveforms at 16 kHz, or texts (`finetune.inputs.in_memory`), all in one batch. Within reach of the
        positions' convolutions, the last frames of a padded waveform are not quite what they are in it alone.

        Raises IndexError if there is no such block, DataError for samples that cannot be used.
        """
        wanted = self.blocks([layer] if isinstance(layer, int | str) else layer)
        if not isinstance(inputs, Tensor):
            inputs, lengths, _ = self.collate(in_memory(inputs, self.config, self.tokenizer))
        found: dict[int, Features] = {}
        for block, positions in enumerate(self._states(inputs, lengths), start=-1):
            if block in wanted:
                real = real_positions(positions, lengths)
                found[block] = Features(positions, (positions * real).sum(dim=1) / real.sum(dim=1), lengths)
            if len(found) == len(set(wanted)):
                break
        return found[wanted[0]] if isinstance(layer, int) else [found[block] for block in wanted]

    def blocks(self, layers: Sequence[int | str]) -> list[int]:
        """Main blocks, from 0 on, in the order asked for, "all" being all. Raises IndexError if one is not there."""
        every = range(self.config.depth)
        return [block for layer in layers for block in (every if layer == ALL else [every[int(layer)]])]

    @torch.inference_mode()
    def __call__(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        return MODALITIES[self.config.modality].seen(self._states(inputs, lengths), lengths, self.config)

    def collate(self, samples: Sequence[Any]) -> Inputs:
        return MODALITIES[self.config.modality].collate(self.config, samples)

    def _states(self, inputs: Tensor, lengths: Tensor | None) -> Iterator[Tensor]:
        """See `Encoder.states`."""
        lengths = None if lengths is None else lengths.to(self.device)
        assert self.encoder.local is not None
        return self.encoder.states(self.encoder.local(inputs.to(self.device), lengths), lengths)

    def represent(self, batch: Inputs) -> Tensor:
        return self(batch.inputs, batch.lengths)


def load_encoder(path: str | Path, which: str = "teacher") -> FrozenEncoder:
    """The teacher or the student, in fp32, of a full form, a run's newest or a given checkpoint.

    Raises ConfigError or CheckpointError, in one line, if it is not to be had.
    """
    return FrozenEncoder.of(read(path), which)


def extract(
    encoder: FrozenEncoder,
    dataset: Samples,
    batch_size: int = 256,
    label: str = "",
    indices: Sequence[int] | None = None,
) -> Array:
    """What probes see (n, D) of a data set, in its order, which should be made with train=False if it can."""
    (found,), _ = extract_each([encoder.represent], dataset, encoder.config, batch_size, label, indices)
    assert isinstance(found, np.ndarray)
    return found


def extract_each(
    represent: Sequence[Represent],
    dataset: Samples,
    config: ModelConfig,
    batch_size: int = 256,
    label: str = "",
    indices: Sequence[int] | None = None,
    workers: int = 0,
) -> tuple[list[Matrix], NDArray[np.bool_]]:
    """Several representations of the samples `indices` (None: all), read once. -> one (n, D) each, in their order; and
    (n,) which samples are themselves, not others that stand in for what cannot be read.

    Samples of like length meet in a batch, of `batch_size` at most. Raises DataError, in one line, for what cannot be
    read.
    """
    modality = MODALITIES[config.modality]
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, np.int64)
    batches = like_sized(modality.sizes(dataset)[chosen], batch_size, modality.largest)
    keys = [[(0, int(chosen[i])) for i in batch] for batch in batches]
    collate = partial(collate_genuine, modality, config)
    parts: list[list[Matrix]] = [[] for _ in represent]
    genuine: list[bool] = []
    with Progress(label, len(chosen)) as progress:
        for batch, failures in load_batches(dataset, keys, collate, workers, HERE):
            genuine += [not files for files in failures]
            for part, function in zip(parts, represent, strict=True):
                found = function(batch)
                part.append(found.float().cpu().numpy() if isinstance(found, Tensor) else found)
            progress.advance(len(batch.inputs))
    places = np.argsort(np.concatenate(batches), kind="stable")
    return [_stacked(part)[places] for part in parts], np.array(genuine)[places]


def _stacked(parts: list[Matrix]) -> Matrix:
    return vstack(parts, format="csr") if isinstance(parts[0], csr_matrix) else np.concatenate(parts)


def _fresh(config: ModelConfig, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fresh_encoder(config)


def store(
    path: str | Path,
    data: str,
    out: str | Path,
    what: str = "pooled",
    layers: Sequence[int | str] = (),
    kind: str = "",
    dtype: str = "float32",
    batch_size: int = 64,
    which: str = "teacher",
    split: str = "train",
    shard: int = 1000,
    workers: int = 4,
) -> Index:
    """Writes the features of all samples at `data` (`finetune.inputs.open_source`) as `finetune.stored` has them, in
    `shard` samples a file, but for those that are there already. `layers`: none given, the last.

    Raises ConfigError, CheckpointError or DataError, in one line.
    """
    out = Path(out).expanduser()
    suffix = out.suffix.removeprefix(".")
    single = suffix in FORMATS
    kind = kind or (suffix if single else FORMATS[0])
    if single and suffix != kind:
        raise ConfigError(f"--out {out} is no name for --format {kind}")
    if min(batch_size, shard) < 1 or workers < 0:
        raise ConfigError("--batch-size and --shard must be at least 1, --workers 0 or more")
    if layers and what == "probe":
        raise ConfigError(
            "--layers is not for --what probe, which has its own blocks: leave it out, or take --what pooled"
        )
    full = read(path)
    encoder = FrozenEncoder.of(full, which)
    config, modality = full.model, MODALITIES[full.model.modality]
    try:
        blocks = list(dict.fromkeys(encoder.blocks(layers or [-1]))) if what != "probe" else []
    except IndexError:
        raise ConfigError(
            f"--layers {' '.join(map(str, layers))}: the main blocks are 0 to {config.depth - 1}"
        ) from None
    source = open_source(data, split, config, encoder.tokenizer)
    weights = digest(repr(config).encode(), *(tensor.cpu().numpy() for tensor in encoder.encoder.state_dict().values()))
    settings: dict[str, Any] = {"weights": weights, "data": source.fingerprint, "what": what, "blocks": blocks}
    settings |= {"dtype": dtype, "format": kind, "shard": len(source.samples) if single else shard}
    about = {"model": str(path), "which": which, "step": full.step, "modality": config.modality, "width": config.width}
    index = Index(settings, about | {"data": data, "split": split}, source.classes, source.left_out)
    written = Store(out, index, len(source.samples))
    if written.missing() or not written.index.complete:
        _write(written, encoder, source, partial(_look, encoder, what, blocks, DTYPES[dtype]), batch_size, workers)
    index = written.index
    lost = [*index.left_out, *(told for part in index.shards for told in part.left_out.values())]
    told = f"; left out {len(lost):,}: {few(lost)}" if lost else ""
    print(f"{out}: {what} features of {len(index.names):,} {modality.unit}{told}")
    return index


def _look(
    encoder: FrozenEncoder, what: str, blocks: Sequence[int], dtype: torch.dtype, batch: Inputs
) -> tuple[dict[str, Tensor], list[int]]:
    """Rows by name, and how many of them each sample has."""
    count = len(batch.inputs)
    if what == "probe":
        return {what: encoder.represent(batch).to(dtype)}, [1] * count
    found = encoder.features(batch.inputs, blocks, batch.lengths)
    if what == "pooled":
        return {f"{what}.{b}": f.pooled.to(dtype) for b, f in zip(blocks, found, strict=True)}, [1] * count
    real = real_positions(found[0].positions, batch.lengths)[..., 0].bool()
    rows = {f"{what}.{b}": f.positions[real].to(dtype) for b, f in zip(blocks, found, strict=True)}
    return rows, real.sum(dim=1).tolist()


def _write(
    written: Store,
    encoder: FrozenEncoder,
    source: Source,
    look: Callable[[Inputs], tuple[dict[str, Tensor], list[int]]],
    batch_size: int,
    workers: int,
) -> None:
    """What is missing, shard after shard; samples of like length meet in a batch, of one shard."""
    modality, samples = MODALITIES[encoder.config.modality], source.samples
    sizes, missing = modality.sizes(samples), written.missing()
    batches = [
        [shard.first + int(i) for i in batch]
        for shard in missing
        for batch in like_sized(sizes[shard.first : shard.end], batch_size, modality.largest)
    ]
    keys = [[(0, number) for number in batch] for batch in batches]
    loaded = load_batches(samples, keys, partial(collate_genuine, modality, encoder.config), workers, HERE)
    waiting = iter(missing)
    gathered, shard = Gathered(), next(waiting, None)
    with Progress(f"features of {modality.unit}", sum(map(len, batches))) as progress:
        for batch, (inputs, failures) in zip(batches, loaded, strict=True):
            assert shard is not None
            gathered.add(batch, [not files for files in failures], *look(inputs))
            shard.left_out |= {str(number): files[0] for number, files in zip(batch, failures, strict=True) if files}
            progress.advance(len(batch))
            if len(gathered.numbers) == shard.end - shard.first:
                written.add(shard, gathered.arrays(source.labels))
                gathered, shard = Gathered(), next(waiting, None)
    kept = [number for shard in written.index.shards for number in shard.samples]
    labels = None if source.labels is None else source.labels[kept].tolist()
    written.finish([source.name(number) for number in kept], labels)


def layer(text: str) -> int | str:
    return ALL if text == ALL else int(text)


def main() -> int:
    parser = argparse.ArgumentParser("finetune.features", description="Writes the frozen features of a data set.")
    parser.add_argument("path", metavar="CHECKPOINT", help="a run folder, one of its checkpoints/step_*, a full form")
    parser.add_argument("data", metavar="DATA", help="images, recordings or text, labelled or not")
    parser.add_argument("--out", required=True, metavar="FOLDER_OR_FILE", help="a folder, or a name.safetensors")
    parser.add_argument("--format", choices=FORMATS, default="", dest="kind")
    parser.add_argument("--what", choices=WHAT, default="pooled", help="means, every position, or what probes see")
    parser.add_argument(
        "--layers", nargs="+", type=layer, default=(), metavar="N", help="main blocks, or all (default: -1, the last)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples at a time, at most")
    parser.add_argument("--which", choices=WHICH, default="teacher")
    parser.add_argument("--split", default="train", help="of data that have several")
    parser.add_argument("--shard", type=int, default=1000, metavar="N", help="samples a file")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes that decode")
    args = parser.parse_args()
    try:
        store(**vars(args))
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
