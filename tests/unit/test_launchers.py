"""Who a rank is, from the environments that launchers make."""

import pytest

from pretrain import launchers
from pretrain.launchers import started_by_mpi, tasks_per_node, variables
from pretrain.settings import ConfigError

# As SLURM 22.05 sets them: in task 3 of 4 on the second of two nodes, in a batch script, in salloc's shell.
TASK = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}
SALLOC = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}


def ranks(environment):
    found = environment | variables(environment)
    return tuple(int(found[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))


@pytest.mark.parametrize("shell", [{}, BATCH, SALLOC], ids=["no launcher", "sbatch", "salloc"])
def test_alone(shell):
    assert ranks(shell) == (0, 0, 1, 1)
    own = variables(shell)
    assert own["MASTER_ADDR"] == "127.0.0.1" and int(own["MASTER_PORT"]) > 0
    assert not started_by_mpi(shell)


def test_srun():
    assert ranks(TASK) == (3, 1, 4, 2)
    assert ranks(TASK | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}) == (3, 1, 4, 1)


def test_srun_wins_over_its_own_pmi_and_not_over_mpirun():
    assert not started_by_mpi(TASK | {"PMI_SIZE": "4", "PMI_RANK": "3"})
    assert not started_by_mpi(TASK | {"PMIX_RANK": "3"})
    assert started_by_mpi(TASK | {"PMI_SIZE": "16"})  # of MPICH, whose daemons srun has started
    assert started_by_mpi(TASK | MPIRUN)


def test_mpirun():
    assert started_by_mpi(MPIRUN) and started_by_mpi({"PMI_SIZE": "2"}) and started_by_mpi({"PMIX_RANK": "0"})
    assert not started_by_mpi(MPIRUN | TORCHRUN)


@pytest.mark.parametrize("around", [{}, BATCH, TASK], ids=["no SLURM", "sbatch", "srun"])
def test_torchrun_is_taken_at_its_word(around):
    assert ranks(around | TORCHRUN) == (1, 1, 2, 2)
    assert not started_by_mpi(around | TORCHRUN)


@pytest.mark.parametrize("name", ["LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"])
def test_the_local_size_of_those_who_call_it_otherwise(name):
    others = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"}
    assert ranks(others | {name: "7"})[3] == 7


def test_ranks_without_a_meeting_place_are_refused(monkeypatch):
    environment = dict(TASK, MASTER_PORT="12345")
    monkeypatch.setattr(launchers.os, "environ", environment)
    with pytest.raises(ConfigError, match="4 ranks were started without MASTER_ADDR: export the first node's"):
        launchers.identify()
    assert environment["RANK"] == "3"  # so that rank 0 alone says it


def test_the_address_given_to_mpirun_stays(monkeypatch):
    environment = MPIRUN | {"MASTER_ADDR": "10.0.0.1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}

    def discovery(verbose):
        environment.update(RANK="1", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="172.17.0.1", MASTER_PORT="29500")

    monkeypatch.setattr(launchers.os, "environ", environment)
    monkeypatch.setattr(launchers.deepspeed.comm, "mpi_discovery", discovery)
    launchers.identify()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")
    assert environment["LOCAL_WORLD_SIZE"] == "1"


def test_mpirun_without_mpi4py_is_one_line(monkeypatch):
    def discovery(verbose):
        raise ImportError("no mpi4py")

    monkeypatch.setattr(launchers.os, "environ", dict(MPIRUN))
    monkeypatch.setattr(launchers.deepspeed.comm, "mpi_discovery", discovery)
    with pytest.raises(ConfigError, match="mpirun started this, but mpi4py cannot ask it for the ranks: no mpi4py"):
        launchers.identify()


def test_tasks_per_node():
    assert tasks_per_node("8(x3),4") == [8, 8, 8, 4]
    assert tasks_per_node("1") == [1]
