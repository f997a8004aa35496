"""Trials run once each, in their own folders; the comparison's table and figures."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from finetune import compare, trials
from finetune.compare import ARMS, Comparison
from finetune.config import load
from pretrain.checkpoint import CheckpointError
from pretrain.runtime import EXIT_RESUME
from pretrain.settings import ConfigError, to_tree
from tests.launch import ROOT

TINY = str(ROOT / "tests" / "tiny_finetune.yaml")


class Program:
    """Stands for `python -m finetune`: the accuracy is the rate, at step 3 a tenth more; ends with a status of its
    own, if one is due."""

    def __init__(self) -> None:
        self.runs: list[list[str]] = []
        self.statuses: list[int] = []

    def __call__(self, arguments: list[str]) -> int:
        self.runs.append(arguments)
        if self.statuses and (status := self.statuses.pop(0)):
            return status
        config = load(arguments[0], arguments[1:])
        folder = Path(config.run.dir)
        (folder / "checkpoints" / "step_00000003").mkdir(parents=True)
        (folder / "checkpoints" / "step_00000003" / "state.json").write_text('{"step": 3}')
        lines = [{"step": 3, "test/accuracy": config.optim.lr * 1.1}, {"step": 6, "test/accuracy": config.optim.lr}]
        (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "checkpoints" / "best").write_text("step_00000003\n")
        return 0


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    program = Program()
    monkeypatch.setattr(trials.Stops, "finetune", lambda _, arguments: program(arguments))
    return program


TWO = {"a": ["optim.lr=0.2"], "b": ["optim.lr=0.4"]}


def test_each_trial_is_run_once_and_told_of(program: Program, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    found = trials.run_trials(TINY, TWO, tmp_path, lambda figures: seen.append([*figures]))
    assert found["b"] == pytest.approx(
        {"last/step": 6, "last/test/accuracy": 0.4, "best/step": 3, "best/test/accuracy": 0.44}
    )
    assert seen == [["a"], ["a", "b"]]
    assert program.runs == [
        [TINY, "optim.lr=0.2", f"run.dir={tmp_path / 'a'}"],
        [TINY, "optim.lr=0.4", f"run.dir={tmp_path / 'b'}"],
    ]
    assert trials.run_trials(TINY, TWO, tmp_path) == found and len(program.runs) == 2
    more = trials.run_trials(TINY, {"c": ["optim.lr=0.1"], **TWO}, tmp_path)
    assert [*more] == ["c", "a", "b"] and len(program.runs) == 3


def test_a_trial_that_ends_early_is_continued(program: Program, tmp_path: Path) -> None:
    program.statuses = [0, 75]
    with pytest.raises(trials.TrialFailed, match="b ended with status 75") as stopped:
        trials.run_trials(TINY, TWO, tmp_path)
    assert stopped.value.status == 75
    assert set(trials.run_trials(TINY, TWO, tmp_path)) == {"a", "b"}
    assert [run[1] for run in program.runs] == ["optim.lr=0.2", "optim.lr=0.4", "optim.lr=0.4"]


@pytest.mark.parametrize("number", trials.STOP_SIGNALS)
@pytest.mark.parametrize(
    ("asked", "ends", "status"), [(True, None, 75), (True, 75, 75), (True, 1, 1), (False, None, None)]
)
def test_a_trial_that_a_stop_ends_while_it_starts_is_continued(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, asked: bool, ends: int | None, status: int | None
) -> None:
    """It ends by the signal (None) unless it heeds it; not asked: somebody else has sent it."""

    class Process:
        handed: ClassVar[list[int]] = []

        def __init__(self, line: list[str]) -> None:
            assert line[1:] == ["-m", "finetune", "a.yaml"]

        def send_signal(self, number: int) -> None:
            self.handed.append(number)

        def wait(self) -> int:
            if asked:
                signal.raise_signal(number)
            return -number if ends is None else ends

    before = [signal.getsignal(number) for number in trials.STOP_SIGNALS]
    monkeypatch.setattr(trials.subprocess, "Popen", Process)
    with trials.Stops() as stops:
        assert stops.finetune(["a.yaml"]) == (-number if status is None else status)
    assert Process.handed == [number] * asked and [signal.getsignal(n) for n in trials.STOP_SIGNALS] == before


@pytest.mark.parametrize("number", trials.STOP_SIGNALS)
def test_a_stop_between_two_trials_starts_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    program = Program()

    def popen(line: list[str]) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: program(line[3:]))

    monkeypatch.setattr(trials.subprocess, "Popen", popen)
    with pytest.raises(trials.TrialFailed, match="b was not started") as stopped:
        trials.run_trials(TINY, TWO, tmp_path, lambda _: signal.raise_signal(number))
    assert stopped.value.status == EXIT_RESUME and [run[1] for run in program.runs] == ["optim.lr=0.2"]
    assert set(trials.run_trials(TINY, TWO, tmp_path)) == {"a", "b"}


def test_a_stop_behind_the_last_trial_is_heard_by_the_next_trials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = Program()
    monkeypatch.setattr(trials.Stops, "finetune", lambda _, arguments: program(arguments))
    with trials.Stops() as stops:
        trials.run_trials(TINY, {"a": TWO["a"]}, tmp_path, lambda _: signal.raise_signal(signal.SIGTERM), stops)
        with pytest.raises(trials.TrialFailed, match="b was not started"):
            trials.run_trials(TINY, {"b": TWO["b"]}, tmp_path, stops=stops)


def test_a_stop_while_a_trial_is_being_made_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []

    def popen(line: list[str]) -> SimpleNamespace:
        signal.raise_signal(signal.SIGUSR1)
        return SimpleNamespace(send_signal=handed.append, wait=lambda: EXIT_RESUME)

    monkeypatch.setattr(trials.subprocess, "Popen", popen)
    with trials.Stops() as stops:
        assert stops.finetune(["a.yaml"]) == EXIT_RESUME
    assert handed == [signal.SIGUSR1]


def test_another_trial_in_the_folder_is_refused_before_any_starts(program: Program, tmp_path: Path) -> None:
    trials.run_trials(TINY, {"b": ["optim.lr=0.3"]}, tmp_path)
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.3 -> 0\.4.*another folder"):
        trials.run_trials(TINY, TWO, tmp_path)
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        trials.run_trials(TINY, {"a": [], "d": ["optim.lr=-1"]}, tmp_path)
    assert len(program.runs) == 1


def figures(*values: float) -> list[dict[str, float]]:
    return [{"test/accuracy": value, "test/top5": 1.0} for value in values]


def test_means_and_deviations(tmp_path: Path) -> None:
    found = Comparison(
        "labels",
        ["100", "all"],
        {
            "pre-trained": {"100": figures(0.70, 0.72, 0.74), "all": figures(0.9)},
            "scratch": {"100": figures(0.5, 0.5), "all": []},
        },
    )
    assert found.judged == "test/accuracy"
    assert found.spread("pre-trained", "100") == pytest.approx((72, 2))  # of the sample: sqrt(8 / 2)
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[3] == ["pre-trained", "72.0", "±", "2.0", "90.0"] and lines[4] == ["scratch", "50.0", "±", "0.0", "-"]
    found.draw(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_the_figure_that_is_compared_may_be_chosen() -> None:
    losses = [{"test/wer": 1.0, "test/loss": value} for value in (2.5, 2.6)]
    arms = {"pre-trained": {"10": losses}, "scratch": {"10": losses}}
    assert Comparison("minutes", ["10"], arms).cell("scratch", "10") == "100.0 ± 0.0"
    found = Comparison("minutes", ["10"], arms, "loss")
    assert found.cell("scratch", "10") == "2.550 ± 0.071" and str(found).startswith("test/loss, mean")  # .1 / sqrt(2)
    arms["scratch"]["10"] = [{"test/wer": 1.0}]
    with pytest.raises(ConfigError, match=r"--figure loss: what all evaluations have is wer$"):
        str(Comparison("minutes", ["10"], arms, "loss"))


def test_both_arms_have_the_same_labels_seeds_and_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load(TINY)
    pre, scratch = (
        load(TINY, compare.overrides(config, "labels", arm, "30", 2, tmp_path)[: None if arm == "scratch" else 2])
        for arm in ARMS
    )
    assert pre.data.labels == scratch.data.labels == 30 and pre.train.seed == scratch.train.seed == 2
    assert to_tree(pre) == to_tree(scratch)  # TINY itself starts from nothing
    assert compare.overrides(config, "minutes", "pre-trained", "all", 1, tmp_path) == [
        "data.minutes=null",
        "train.seed=1",
    ]


@pytest.mark.parametrize("text", ["train.steps=3", "200:train.steps=3", "scratch,200:train.steps=3", "scratch"])
def test_settings_for_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write KEY:section\.key=value with a KEY of pre-trained, scratch, 100, all"):
        compare.special_settings(text, ["100", "all"])


def test_nothing_to_compare_with_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"starts from nothing: give train\.init_from"):
        compare.compare(TINY, [], "labels", ["10"], 1, [], tmp_path)


def test_no_seeds_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seeds 0 should be 1 or more"):
        compare.compare(TINY, [], "labels", ["10"], 0, [], tmp_path)
