"""A checkpoint of a run as a directory of the hub, a file of weights in memory at a time."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from model.hf.files import (
    begin_directory,
    beside_of,
    finish_directory,
    refuse_existing,
    shards_of,
    write_shard,
)
from model.hf.pretrained import Export, state_of
from model.hf.row_views import ReadRows, RowViews
from model.language_model import LanguageModel
from parallel.mesh.world import World
from train.checkpoint.foreign_ids import Ids
from train.checkpoint.ranks import Ranks
from train.config.run_config import RunConfig
from train.eval.restored import dtypes_of, open_store, without_checkpoint


class Form(NamedTuple):
    """How weights are written: as in `save_pretrained`."""

    model_type: str | None
    dtype: torch.dtype
    shard_bytes: int


class Written(NamedTuple):
    """The family that was written, the step of the checkpoint, and whose ids the model has learned."""

    family: str
    step: int
    ids: Ids


def export(
    directory: str, config: RunConfig, to: Path, form: Form, world: World, step: int | None = None
) -> Written:
    """Writes the newest good checkpoint, or that of `step`, as `save_pretrained` writes its model.

    Each rank makes files of its own, from rows that it reads of the checkpoint; no rank has the model.
    Collective.

    Raises as `restore` and `save_pretrained` do.
    """
    with torch.device("meta"):
        model = LanguageModel(config.architecture)
    model.to(dtypes_of(config)[0])
    state, ranks = state_of(model), Ranks(world.rank, world.size, world.storage)
    store = open_store(directory, config, world)
    with store.open_tensors({"model": state}, partial=("model",), step=step) as opened:
        if opened is None:
            raise without_checkpoint(directory)
        reader, digest = opened.reader, opened.extra.get("tokenizer")

        def read(name: str, first: int, stop: int) -> torch.Tensor:
            return reader.rows(f"model.{name}", first, stop)

        written = Export(model, form.model_type, form.dtype)
        write_together(written, state, read, to, form.shard_bytes, digest, ranks)
        return Written(written.family.model_type, opened.step, Ids(str(opened.path), digest))


def write_together(
    written: Export,
    state: Mapping[str, torch.Tensor],
    read: ReadRows,
    to: Path,
    shard_bytes: int,
    digest: str | None,
    ranks: Ranks,
) -> None:
    """Writes `to` under another name, its files shared out over the ranks, and renames it. Collective.

    Raises CheckpointError when `to` exists or a buffer that is not zero would be lost, StorageError.
    """
    action = f"{to} not written"
    shards = list(shards_of(written.sizes(), lambda size: size, shard_bytes))
    view = RowViews(state, read)

    def whole(name: str) -> torch.Tensor:
        return read(name, 0, state[name].shape[0] if state[name].ndim else 1)

    def begin() -> None:
        refuse_existing(to)
        written.refuse_lost(whole)
        begin_directory(beside, written.fields, digest)

    def write() -> None:
        for number in range(ranks.rank, len(shards), ranks.size):
            write_shard(beside, number, dict(written.tensors(shards[number], view=view)))

    # Named after a process of rank 0, so that two exports do not meet.
    beside = Path(ranks.on_first(action, lambda: str(beside_of(to))))
    try:
        ranks.on_first(action, begin)
        ranks.together(action, write)
        ranks.on_first(action, lambda: finish_directory(beside, to, shards))
    finally:
        if ranks.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
