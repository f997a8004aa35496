"""Pieces of documents to ids, in several processes."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context, parent_process

import numpy as np
from numpy.typing import NDArray

from pretrain.data.documents import Piece
from pretrain.data.sources import DataError
from pretrain.data.tokenizer import Tokenizer

_BATCH = 1 << 18  # characters

Encoded = tuple[NDArray[np.int64], NDArray[np.int32]]


def encode(
    pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int = 1
) -> Iterator[tuple[list[Piece], NDArray[np.int64], NDArray[np.int32]]]:
    """Yield (some pieces, how many ids each has, the ids of all), in order, with a few batches under way.

    A document's last piece, unless it has no ids, has eos behind. `workers` processes, or this one if it is 1.
    Raises `DataError` if a process dies.
    """
    if workers < 2:
        for batch in _batches(pieces):
            yield batch, *_encode(tokenizer, [(piece.text, piece.last) for piece in batch])
        return
    waiting: deque[tuple[list[Piece], Future[Encoded]]] = deque()
    # Unlike multiprocessing.Pool, this one notices that a worker was killed.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (tokenizer,))
    try:
        for batch in _batches(pieces):
            waiting.append((batch, pool.submit(_encode_in_worker, [(piece.text, piece.last) for piece in batch])))
            if len(waiting) > 3 * workers:
                done, future = waiting.popleft()
                yield done, *future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, *future.result()
    except BrokenProcessPool as error:
        raise DataError("a tokenising process died, perhaps for lack of memory: try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 16
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: Sequence[tuple[str, bool]]) -> Encoded:
    """How many ids each (text, last of its document) has, and all ids; a last one, unless empty, has eos behind."""
    encoded = tokenizer.encode_batch([text for text, _ in batch])
    for (_, last), ids in zip(batch, encoded, strict=True):
        if last and ids:
            ids.append(tokenizer.eos)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return lengths, np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum()))


_tokenizer: Tokenizer  # a worker's own


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: Sequence[tuple[str, bool]]) -> Encoded:
    return _encode(_tokenizer, batch)
