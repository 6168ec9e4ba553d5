"""What must be the same on every rank of a run, told before anything depends on it."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import conf
from conf.errors import CheckpointError, ConfigError, Violation
from conf.names import shortened
from data.loader import Loader
from parallel.mesh.rendezvous import difference
from parallel.mesh.world import World
from parallel.shard.shard_view import GlobalShardView
from train.checkpoint.ranks import Ranks
from train.checkpoint.storage import flatten
from train.config.run_config import RunConfig
from train.estimate.local_state import local_part

_CODE = ("conf", "data", "kernels", "model", "parallel", "train")
_LIBRARIES = ("torch", "triton", "numpy", "deepspeed", "megatron-core")


def facts_of(config: RunConfig) -> dict[str, str]:
    """Every key of the config, the code and the libraries, as text."""
    config_facts = dict(_flat(config.model_dump(mode="json")))
    libraries = {name: _version(name) for name in _LIBRARIES}
    return {
        **config_facts,
        "code": code_digest(Path(conf.__path__[0]).parent),
        "python": platform.python_version(),
        **libraries,
    }


def code_digest(root: Path) -> str:
    """sha256 of the sources and configs under `root` that a run consists of."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root)} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()


def compare_data(loader: Loader, world: World) -> None:
    """Raises ConfigError that names the ranks with another dataset or tokenizer. Collective."""
    own = {"data": loader.fingerprint, "tokenizer": loader.card.tokenizer.digest}
    found = Ranks(world.rank, world.size, world.storage).together(
        "data not compared", lambda: json.dumps(own, sort_keys=True)
    )
    odd = difference(dict(enumerate(found)))
    if odd is not None:
        message = (
            f"{loader.directory}: {odd.said} {found[odd.rank]}, {odd.others} {found[odd.standard]}; every "
            "node must see the same files"
        )
        raise ConfigError([Violation("data.directory", message)])


def refuse_not_finite(tensors: Mapping[str, Any], where: str, fix: str, world: World) -> None:
    """Raises CheckpointError on every rank where a tensor of any has NaN or infinity. Collective.

    tensors may be nested. Waits for the device once for each.
    """

    def bad() -> list[str]:
        return [
            name
            for name, value in flatten(tensors)[0].items()
            if isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and not all(torch.isfinite(part).all() for part in _local_parts(value))
        ]

    found = Ranks(world.rank, world.size, world.storage).together(f"{where} not looked into", bad)
    if names := sorted({name for names in found for name in names}):
        raise CheckpointError(f"{where}: numbers that are not finite in {shortened(names)}; {fix}")


def _local_parts(x: torch.Tensor) -> list[torch.Tensor]:
    """The memory of this rank behind a tensor: of the form that checkpoints have nothing but its blocks."""
    return [block for block, _ in x.blocks.values()] if isinstance(x, GlobalShardView) else [local_part(x)]


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, json.dumps(node)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
