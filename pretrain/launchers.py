"""Who this rank is, under every launcher: torchrun, deepspeed, mpirun, srun, or none.

The rest of the program reads torchrun's variables: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, and, where ranks
meet, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

import deepspeed

from pretrain.settings import ConfigError

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
# What deepspeed, Open MPI and MPICH call the number of ranks on this machine.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def identify() -> None:
    """Sets in this process's environment what the launcher has not set. Collective under mpirun.

    Raises ConfigError if ranks would not know where to meet, or mpi4py cannot ask MPI.
    """
    if started_by_mpi(os.environ):
        given = {name: os.environ[name] for name in RENDEZVOUS if name in os.environ}
        try:
            deepspeed.comm.mpi_discovery(verbose=False)
        except (ImportError, RuntimeError, OSError) as error:
            raise ConfigError(f"mpirun started this, but mpi4py cannot ask it for the ranks: {error}") from None
        os.environ |= given  # discovery puts its own in their place
    os.environ |= variables(os.environ)
    if missing := [name for name in RENDEZVOUS if name not in os.environ]:
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} ranks were started without {' and '.join(missing)}: export the first node's "
            "address and a free port, as slurm/job.sh does"
        )


def started_by_mpi(environment: Mapping[str, str]) -> bool:
    """Whether only MPI knows the ranks. PMI's variables are srun's, too, and then agree with its own."""
    if "RANK" in environment:
        return False
    if "OMPI_COMM_WORLD_SIZE" in environment:  # of mpirun alone, which starts its daemons by srun where it can
        return True
    tasks = environment.get("SLURM_STEP_NUM_TASKS")
    if tasks is not None:
        return environment.get("PMI_SIZE", tasks) != tasks
    return "PMI_SIZE" in environment or "PMIX_RANK" in environment


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What is to be set beside the launcher's own `environment`; alone, that is all six, with a port that is free.

    SLURM_STEP_NUM_TASKS is there in srun's tasks only, and 1 in salloc's shell. Shells of sbatch and salloc may have
    SLURM_PROCID and SLURM_NTASKS, too, but what one types there is one process, unless torchrun says otherwise.
    """
    if "RANK" in environment:
        sizes = [environment[name] for name in LOCAL_SIZES if name in environment]
        return {"LOCAL_WORLD_SIZE": sizes[0]} if sizes else {}
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        here = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
        own = {"RANK": environment["SLURM_PROCID"], "LOCAL_RANK": environment["SLURM_LOCALID"]}
        return own | {"WORLD_SIZE": tasks, "LOCAL_WORLD_SIZE": str(here)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def tasks_per_node(text: str) -> list[int]:
    """SLURM's "8(x3),4" -> [8, 8, 8, 4]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]
