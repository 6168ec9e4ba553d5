"""Everything that a run reads from the environment, read once."""

import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conf
from conf.errors import ConfigError, Violation
from conf.revision import revision
from parallel.config.rendezvous import Rendezvous


@dataclass(frozen=True)
class Environment:
    """This process among those that the launcher started."""

    rank: int
    world_size: int
    local_rank: int
    slurm_job: str | None
    rendezvous: Rendezvous | None


def read_environment() -> Environment:
    """The launcher's variables: torchrun's, else those of srun, else a single process.

    Raises ConfigError for variables that contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    is_srun_task = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ
    if "RANK" not in os.environ and is_srun_task:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    values = []
    for name, default in zip(names, ("0", "1", "0"), strict=True):
        text = os.environ.get(name, default)
        if not text.isdigit():
            raise ConfigError([Violation(name, f"must be a whole number; found {text!r}")])
        values.append(int(text))
    rank, world_size, local_rank = values
    if rank >= world_size:
        raise ConfigError([Violation(names[0], f"must be below {names[1]} {world_size}; found {rank}")])
    if world_size > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            message = f"needed by {world_size} processes; torchrun and slurm/pretrain.sbatch set it"
            raise ConfigError([Violation(name, message) for name in missing])
    rendezvous = _read_rendezvous() if world_size > 1 else None
    return Environment(rank, world_size, local_rank, os.environ.get("SLURM_JOB_ID"), rendezvous)


def read_launch(environment: Environment) -> dict[str, Any]:
    """Where, from what and by whom this start of a run was made: for people who look for it later."""
    return {
        "host": socket.gethostname(),
        "ranks": environment.world_size,
        **revision(Path(conf.__path__[0]).parent),
        "slurm_job": environment.slurm_job,
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT"),
        "command": shlex.join(map(_without_value, sys.orig_argv)),
    }


def _without_value(word: str) -> str:
    """A word of the command line; of variables of the job only the name: they may hold a secret."""
    name, sign, _ = word.partition("=")
    return f"{name}=..." if sign and name.lstrip("+").startswith("slurm.env") else word


def _read_rendezvous() -> Rendezvous:
    port = os.environ["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError([Violation("MASTER_PORT", f"must be a port from 1 to {2**16 - 1}; found {port!r}")])
    # torchrun keeps the store itself.
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # The name by which SLURM leaves a node out.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Rendezvous(os.environ["MASTER_ADDR"], int(port), is_hosted, host)


def share_processors() -> None:
    """Lets threads of torch that wait for others sleep. Before torch is imported; without effect on a GPU.

    OpenMP's threads spin at the end of every parallel region until the last one is there. Beside other busy
    processes that one may be waiting for the processor on which another spins: a run then slows not in
    proportion but by an order of magnitude.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def prepare_deepspeed(local_rank: int) -> None:
    """Sets what DeepSpeed reads from the environment and srun does not set. Before its import."""
    import torch

    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
