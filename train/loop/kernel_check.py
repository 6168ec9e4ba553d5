"""Which kernels a run takes, and the proof at its start that those on its GPU are right."""

import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from conf.errors import NumericsError
from kernels.choose import FAMILIES, describe, set_backends, takes_triton
from kernels.verdict import Verdict, wrong_kernels
from model.recurrence import Recurrence
from parallel.mesh.world import World
from train.config.fields import KernelBackend, KernelsConfig
from train.config.run_config import RunConfig


def prepare_kernels(config: RunConfig, modules: Iterable[nn.Module], world: World) -> str:
    """Chooses the backend of every family for this process; gives the line that says so.

    On a GPU the Triton kernels that the modules use are compared with float64 first, on every rank; if one is
    wrong on any of them, all ranks stop, or take plain torch for its family, as `kernels.check` says.

    Raises NumericsError for a wrong kernel.
    """
    set_backends(config.kernels.backends())
    dtype = getattr(torch, config.precision.compute)
    if world.device.type == "cuda" and config.kernels.check != "off":
        probe = torch.empty(0, dtype=dtype, device=world.device)
        used = [family for family in used_families(modules) if takes_triton(family, probe)]
        wrong = wrong_anywhere(wrong_kernels(used, world.device), used, world)
        set_backends(backends_after_check(config.kernels, wrong))
    return describe(world.device, dtype)


def wrong_anywhere(verdicts: Sequence[Verdict], families: Sequence[str], world: World) -> list[str]:
    """The families that are wrong on any rank, after this one said what it found."""
    flags = torch.zeros(len(families), device=world.device)
    for verdict in verdicts:
        print(
            f"rank {world.rank}: the kernel {verdict.spec} is WRONG on this GPU: {verdict.name} is off by "
            f"{verdict.error:.1e}, at most {verdict.limit:.1e} is right",
            file=sys.stderr,
            flush=True,
        )
        flags[families.index(verdict.spec.split(".")[0])] = 1.0
    return [name for name, count in zip(families, world.sum(flags).tolist(), strict=True) if count]


def backends_after_check(config: KernelsConfig, wrong: Sequence[str]) -> dict[str, KernelBackend]:
    """The backend of every family once the wrong ones are known.

    Raises NumericsError where these stop a run.
    """
    if wrong and config.check == "stop":
        named = ", ".join(f"kernels.{family}=reference" for family in wrong)
        raise NumericsError(f"wrong kernels on this GPU; leave them out by {named}")
    return {**config.backends(), **dict.fromkeys(wrong, "reference")}


def used_families(modules: Iterable[nn.Module]) -> list[str]:
    """The families that the modules call, by what their files import."""
    files = {sys.modules[cls.__module__] for part in modules for cls in type(part).__mro__}
    found = {family for module in files for family in _imported(vars(module).values())}
    return [family for family in FAMILIES if family in found]


def _imported(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        source = str(getattr(value, "__module__", "")).split(".")
        if source[0] == "kernels" and len(source) > 1:
            yield source[1]
        elif isinstance(value, type) and issubclass(value, Recurrence) and value is not Recurrence:
            yield value.family
