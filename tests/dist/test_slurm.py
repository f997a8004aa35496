"""The scripts of slurm/, submitted to a real SLURM of two nodes: they train, stop, are requeued and continue."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from finetune.config import load as load_finetuning
from pretrain.config import WatchConfig, batch_plan, load
from pretrain.launchers import started_by_mpi, variables
from tests.cluster import GPUS, Cluster, missing
from tests.dist.test_resume import assert_identical, progress
from tests.launch import ROOT, environment, run

pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"NOT RUN: {', '.join(missing())} not here (apt-get install slurm-wlm munge)"
)
STEPS, SAVE_EVERY = 80, 7
ON_CPU = ("--gpus-per-node=0", "--ntasks-per-node=1")
TRAIN = {
    path.stem: path
    for kind in ("pretrain_", "finetune_imagenet_")
    for path in sorted((ROOT / "slurm").glob(f"{kind}*.sh"))
}
LOAD = {"pretrain": load, "finetune": load_finetuning}
SCRATCH = "train.init_from=''"  # the runs that fine-tuning starts from are not here
OWN = ("data.path=/my data", "train.deepspeed=ds_configs/zero3.json", SCRATCH)
# Stands for python: writes down what it was started with, then ends with the status that STATUS has for each start.
RECORDER = """#!/usr/bin/env bash
out=$RECORDS/$SLURM_JOB_ID.${OMPI_COMM_WORLD_RANK:-$SLURM_PROCID}
env -0 > "$out.env"
printf '%s\\0' "$@" > "$out.args"
trap 'exit 75' TERM USR1
echo started
status=$(echo "$STATUS" | cut -d : -f $((${SLURM_RESTART_COUNT:-0} + 1)))
[ "$status" = wait ] && { sleep 120 & wait; }
exit "$status"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Turns ViT-B on ImageNet into tests/tiny.yaml on a folder of a few pictures, whose name has a space in it."""
    folder, rng = tmp_path_factory.mktemp("data") / "my pictures", np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for name in ("dark", "light"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (28, 28), np.uint8) + (128 if name == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    tiny = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text())
    del tiny["train"]["deepspeed"]
    sections = [f"{section}={json.dumps(values)}" for section, values in tiny.items()]
    return [*sections, f"data.path={folder}", f"train.steps={STEPS}", f"run.save_every={SAVE_EVERY}"]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> Path:
    """The same run, never stopped, under another launcher."""
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    mechanics = "train.deepspeed=ds_configs/zero2.json"
    run("pretrain", "configs/pretrain/image_base.yaml", mechanics, *overrides, f"run.dir={folder}", ranks=2)
    return folder


def submit(cluster: Cluster, overrides: list[str], folder: Path, *options: str) -> str:
    script = ("slurm/pretrain_vitb.sh", *overrides, f"run.dir={folder}")
    return cluster.submit(*script, options=("--nodes=2", *ON_CPU, *options), ZERO="2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, overrides: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "my run"
    job = submit(cluster, overrides, folder)
    assert cluster.finished(job) == ("COMPLETED", 0), cluster.log(job)
    return folder


def test_two_nodes_train_as_torchrun_does(trained: Path, torchrun: Path) -> None:
    assert load(trained / "config.yaml").train.deepspeed == "ds_configs/zero2.json"
    assert_identical(trained, torchrun)


def test_signal_saves_requeues_and_continues(
    tmp_path: Path, cluster: Cluster, overrides: list[str], torchrun: Path
) -> None:
    """As --signal sends it before the time limit."""
    job = submit(cluster, overrides, tmp_path)
    cluster.until(lambda: progress(tmp_path) >= 5, "the first steps")
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.finished(job) == ("COMPLETED", 1), cluster.log(job)
    saved = re.search(r"SIGUSR1: saved after step (\d+)", cluster.log(job))
    assert saved and f"resuming after step {saved[1]}" in cluster.log(job)
    assert_identical(tmp_path, torchrun)


def test_node_failure_requeues_and_continues(
    tmp_path: Path, cluster: Cluster, overrides: list[str], torchrun: Path
) -> None:
    """A rank and its node are gone without a word; SLURM starts the job again at the last checkpoint."""
    job = submit(cluster, overrides, tmp_path)
    cluster.until(lambda: progress(tmp_path) >= SAVE_EVERY + 3, "the first checkpoint")
    (shell,) = processes("slurm/job.sh", SLURM_JOB_ID=job)
    shell.suspend()  # lest it ends the job before SLURM knows of the node
    kill_second_rank(job)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        cluster.until(lambda: cluster.field(job, "Restarts") == "1", "the requeue")
    finally:
        with suppress(AssertionError):  # the node has come back by itself
            cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    assert cluster.finished(job) == ("COMPLETED", 1), cluster.log(job)
    assert "saved after step" not in cluster.log(job)
    resumed = re.search(r"resuming after step (\d+)", cluster.log(job))
    assert resumed and int(resumed[1]) % SAVE_EVERY == 0
    assert_identical(tmp_path, torchrun)


def test_log_names_the_lost_rank(tmp_path: Path, cluster: Cluster, overrides: list[str]) -> None:
    """Rank 0 has the time to say it before srun ends those that wait, which is within a minute."""
    wait = re.search(r"--wait=(\d+) ", (ROOT / "slurm/job.sh").read_text())
    assert wait and WatchConfig().silent_seconds + 5 < int(wait[1]) < 60
    job = submit(cluster, [*overrides, "watch.silent_seconds=5"], tmp_path, "--requeue")
    cluster.until(lambda: progress(tmp_path) >= 3, "the first steps")
    kill_second_rank(job)
    assert cluster.finished(job) == ("FAILED", 0), cluster.log(job)
    assert re.search(r"rank 1 \(\S+, pid \d+\): not heard of for 5 s", cluster.log(job)), cluster.log(job)


def kill_second_rank(job: str) -> None:
    found = processes("pretrain", SLURM_JOB_ID=job, SLURM_NODEID="1")
    assert found
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def processes(argument: str, **variables: str) -> list[psutil.Process]:
    """Those that were started with `argument` and have all of `variables`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended, or somebody else's
            if argument in process.cmdline() and variables.items() <= process.environ().items():
                found.append(process)
    return found


def test_finetune_and_convert(tmp_path: Path, cluster: Cluster, trained: Path) -> None:
    out = tmp_path / "my weights.safetensors"
    jobs = [
        cluster.submit("slurm/finetune.sh", str(trained), options=ON_CPU),
        cluster.submit("slurm/convert.sh", str(trained), str(out)),
    ]
    for job in jobs:
        assert cluster.finished(job) == ("COMPLETED", 0), cluster.log(job)
    assert (trained / "report.png").stat().st_size > 0 and "knn" in (trained / "probe.json").read_text().lower()
    with safe_open(out, "pt") as file:
        assert file.metadata()["step"] == str(STEPS)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorder") / "python"
    path.write_text(RECORDER)
    path.chmod(0o755)
    return path


def recorded(recorder: Path, job: str, kind: str) -> list[list[str]]:
    """What the tasks of a job were started with, in the order of ranks: `args` or `env`."""
    found = sorted(recorder.parent.glob(f"{job}.*.{kind}"), key=lambda path: int(path.name.split(".")[1]))
    return [path.read_text().rstrip("\0").split("\0") for path in found]


def test_every_script(cluster: Cluster, recorder: Path) -> None:
    """As they are, but for their nodes where there are more than two: one task a GPU, each knows who it is, the config
    can be run, a signal comes before the end, and what the user says wins over ZERO."""
    assert len(TRAIN) == 10
    stand_in = {"PYTHON": str(recorder), "RECORDS": str(recorder.parent), "STATUS": "0"}
    jobs, nodes = {}, {}
    for name, path in TRAIN.items():
        found = re.search(r"--nodes=(\d+) --gpus-per-node=8 ", path.read_text())
        assert found and re.search(r"^#SBATCH .*--signal=USR1@300$", path.read_text(), re.MULTILINE)
        nodes[name] = int(found[1])
        options = [f"--nodes={min(nodes[name], 2)}"]
        jobs[name] = cluster.submit(str(path), *OWN, options=options, ZERO="2", TP="2", **stand_in)
    for name, job in jobs.items():
        assert cluster.finished(job) == ("COMPLETED", 0), cluster.log(job)
        assert cluster.field(job, "JobName") == name and cluster.field(job, "Requeue") == "1"
        tasks = [dict(entry.split("=", 1) for entry in task) for task in recorded(recorder, job, "env")]
        here = min(nodes[name], 2)
        expected = [(str(rank), str(rank % GPUS), str(here * GPUS), str(GPUS)) for rank in range(here * GPUS)]
        keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        assert [tuple(variables(task)[key] for key in keys) for task in tasks] == expected
        assert {(task["MASTER_ADDR"], task["MASTER_PORT"]) for task in tasks} == {
            ("127.0.0.1", str(10_000 + int(job) * 10 % 20_000))
        }
        (arguments,) = {tuple(task) for task in recorded(recorder, job, "args")}
        module = name.split("_")[0]
        assert arguments[:2] == ("-m", module) and arguments[3] == "train.deepspeed=ds_configs/zero2.json"
        config = LOAD[module](ROOT / arguments[2], arguments[3:])
        assert (config.train.deepspeed, config.train.tensor_parallel) == ("ds_configs/zero3.json", 2)
        assert config.data.path == "/my data"
        batch_plan(LOAD[module](ROOT / arguments[2], [SCRATCH]).train, nodes[name] * GPUS)


def test_every_way_to_ask_for_gpus(cluster: Cluster, recorder: Path) -> None:
    """One task a GPU that the job has, which sees all of its node's, and as many CPUs as the smallest node has."""
    stand_in = {"PYTHON": str(recorder), "RECORDS": str(recorder.parent), "STATUS": "0"}
    expected = {  # options in place of the script's, or beside them -> GPUs of a node
        ("--gpus-per-node=a100:4",): 4,
        ("--gres=gpu:4",): 4,
        ("--gpus-per-node=0", "--gres=gpu:a100:4"): 4,
        ("--gpus=16",): 8,
        ("--ntasks-per-gpu=1",): 8,
        ("--gpus-per-task=1", "--ntasks=16"): 8,
        ("--gpu-bind=single:1",): 8,
        ("--gpus-per-node=4", "--gpus=8", "--exclusive"): 8,  # n1 has 96 CPUs, n2 has 64
    }
    jobs = {form: cluster.submit("slurm/pretrain_vitb.sh", options=form, **stand_in) for form in expected}
    for form, job in jobs.items():
        assert cluster.finished(job) == ("COMPLETED", 0), (form, cluster.log(job))
        tasks = [dict(entry.split("=", 1) for entry in task) for task in recorded(recorder, job, "env")]
        gpus = expected[form]
        assert [task["SLURM_LOCALID"] for task in tasks] == [str(rank % gpus) for rank in range(2 * gpus)], form
        assert {len(task["CUDA_VISIBLE_DEVICES"].split(",")) for task in tasks} == {gpus}, form
        assert {task["SLURM_CPUS_PER_TASK"] for task in tasks} == {"8"}, form


def test_finetune_is_one_task_on_one_node(cluster: Cluster, recorder: Path) -> None:
    stand_in = {"PYTHON": str(recorder), "RECORDS": str(recorder.parent), "STATUS": "0"}
    wide = ("--nodes=2", "--ntasks=2", "--gpus-per-node=2", "--gpus=4")
    job = cluster.submit("slurm/finetune.sh", "runs/x", options=wide, **stand_in)
    assert cluster.finished(job) == ("COMPLETED", 0), cluster.log(job)
    assert recorded(recorder, job, "args") == [["-m", "finetune.report", "runs/x"]]


def test_time_limit_signals_first(cluster: Cluster, recorder: Path) -> None:
    """Five minutes before, and up to one more: SLURM looks twice a minute."""
    stand_in = {"PYTHON": str(recorder), "RECORDS": str(recorder.parent), "STATUS": "wait:0"}
    job = cluster.submit("slurm/pretrain_vitb.sh", options=("--nodes=1", *ON_CPU, "--time=6"), **stand_in)
    assert cluster.finished(job) == ("COMPLETED", 1), cluster.log(job)


def test_only_what_was_saved_is_requeued(cluster: Cluster, recorder: Path) -> None:
    stand_in = {"PYTHON": str(recorder), "RECORDS": str(recorder.parent)}
    ends = {  # of python's statuses at each start, and an option of sbatch
        ("75:0", "--requeue"): ("COMPLETED", 1),
        ("75:0", "--no-requeue"): ("FAILED", 0),
        ("3:0", "--requeue"): ("FAILED", 0),
        ("137:0", "--requeue"): ("FAILED", 0),
    }
    jobs = {
        (status, option): cluster.submit(
            "slurm/pretrain_vitb.sh", options=("--nodes=1", *ON_CPU, option), STATUS=status, **stand_in
        )
        for status, option in ends
    }
    for case, job in jobs.items():
        assert cluster.finished(job) == ends[case], (case, cluster.log(job))


def test_what_is_cancelled_stays_so(cluster: Cluster, recorder: Path) -> None:
    """Although the ranks save, and say so, when they are told to end."""
    stand_in = {"PYTHON": str(recorder), "RECORDS": str(recorder.parent), "STATUS": "wait"}
    job = cluster.submit("slurm/pretrain_vitb.sh", options=("--nodes=1", *ON_CPU), **stand_in)
    cluster.until(lambda: cluster.field(job, "JobState") == "RUNNING" and "started" in cluster.log(job), "the start")
    cluster.run("scancel", job)
    cluster.until(lambda: job not in cluster.run("squeue", "--noheader"), "the end")
    assert "Exited with exit code 75" in cluster.log(job)
    assert cluster.finished(job) == ("CANCELLED", 0)


def test_shells_of_an_allocation_are_one_process(cluster: Cluster, recorder: Path) -> None:
    wide = ("--nodes=2", "--ntasks-per-node=2")
    stand_in = {"RECORDS": str(recorder.parent), "STATUS": "0"}
    job = cluster.submit(str(recorder), options=wide, **stand_in)
    assert cluster.finished(job) == ("COMPLETED", 0), cluster.log(job)
    (batch,) = recorded(recorder, job, "env")
    for shell in (batch, cluster.run("salloc", *wide, "env", "-0").rstrip("\0").split("\0")):
        found = dict(entry.split("=", 1) for entry in shell)
        assert found["SLURM_NTASKS"] == "4"
        assert variables(found)["WORLD_SIZE"] == "1" and not started_by_mpi(found)


@pytest.mark.skipif(not shutil.which("mpirun"), reason="NOT RUN: mpirun is not here (apt-get install openmpi-bin)")
def test_mpirun_in_an_allocation_is_not_srun(cluster: Cluster, recorder: Path) -> None:
    """Its daemons are started by srun, whose variables the ranks inherit."""
    stand_in = {"RECORDS": str(recorder.parent), "STATUS": "0"}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    wrap = f"--wrap=mpirun -n 4 {recorder}"
    job = cluster.submit(options=("--nodes=2", "--ntasks-per-node=2", wrap), **stand_in, **root)
    assert cluster.finished(job) == ("COMPLETED", 0), cluster.log(job)
    tasks = [dict(entry.split("=", 1) for entry in task) for task in recorded(recorder, job, "env")]
    assert len(tasks) == 4 and all("SLURM_STEP_NUM_TASKS" in task for task in tasks)
    assert all(started_by_mpi(task) for task in tasks)


@pytest.mark.parametrize("name", [*TRAIN, "finetune", "convert"])
def test_submitted_from_elsewhere(tmp_path: Path, name: str) -> None:
    script = ROOT / f"slurm/{name}.sh"
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: no slurm/job.sh in {tmp_path}: sbatch slurm/{name}.sh from the repository's folder\n"
