"""The end of a process: threads that need the interpreter once more have it."""

from __future__ import annotations

import hashlib
import threading
import time

from pretrain import parallel


def test_the_end_waits_for_threads_that_work() -> None:
    """Hashing large blocks is done without the interpreter's lock, as gloo's work is."""
    worked, block = [], bytes(50_000_000)
    for done in (lambda: parallel.settle(20.0), lambda: parallel.settle(0.0)):
        thread = threading.Thread(target=lambda: worked.append(hashlib.sha256(block).digest()))
        thread.start()
        done()
        worked.append(b"end")
        thread.join()
    first, last = worked[:2], worked[2:]
    assert first[1] == b"end" and last[0] == b"end"


def test_it_is_short_where_all_rest_and_bounded_where_one_never_does() -> None:
    waits = threading.Event()
    thread = threading.Thread(target=waits.wait)
    thread.start()
    try:
        parallel.settle(20.0)
        assert not parallel.others_run()
    finally:
        waits.set()
        thread.join()
    stop = threading.Event()
    thread = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    thread.start()
    begin = time.monotonic()
    parallel.settle(0.1)
    stop.set()
    thread.join()
    assert time.monotonic() - begin >= 0.1
