"""The end of a process: threads that need the interpreter once more have it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from pretrain import parallel


def test_the_end_lets_threads_rest_when_the_groups_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(parallel, "settle", lambda: done.append("settled"))
    parallel.stop()
    assert done == ["destroyed", "settled"]


@pytest.mark.parametrize(
    ("seen", "looks"),
    [("--", 2), ("R--", 3), ("-R-R--", 6), ("R" * 500, 200)],  # twice in a row they rest; or two seconds are over
)
def test_it_waits_for_threads_that_run_but_not_for_ever(seen: str, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answers = [0.0], iter(seen)

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(parallel, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(parallel, "others_run", lambda: next(answers) == "R")
    parallel.settle(2.0)
    assert clock[0] == pytest.approx(looks * 0.01, abs=0.011)
    assert len(seen) - len(list(answers)) == pytest.approx(looks, abs=1)


def test_a_thread_that_runs_is_seen() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)], daemon=True)
    thread.start()
    try:
        assert any(parallel.others_run() for _ in range(1000))
    finally:
        stop.set()
        thread.join()
