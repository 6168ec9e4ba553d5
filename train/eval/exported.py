"""A checkpoint of a run as a directory of the hub, a file of weights in memory at a time."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from data.tokenizer.hub_files import hub_files, special_ids
from model.hf.files import (
    begin_directory,
    beside_of,
    finish_directory,
    refuse_existing,
    shards_of,
    write_shard,
)
from model.hf.own import OWN
from model.hf.pretrained import Export, state_of
from model.hf.row_views import ReadRows, RowViews
from model.language_model import LanguageModel
from parallel.mesh.world import World
from train.checkpoint.foreign_ids import Ids
from train.checkpoint.ranks import Ranks
from train.checkpoint.run_tokenizer import read_tokenizer
from train.config.run_config import RunConfig
from train.eval.restored import dtypes_of, open_store, without_checkpoint


class Form(NamedTuple):
    """How weights are written: as in `save_pretrained`."""

    model_type: str | None
    dtype: torch.dtype
    shard_bytes: int


class Beside(NamedTuple):
    """What is written beside weights: the digest of the tokenizer whose ids they learned, and its files."""

    digest: str | None
    files: Mapping[str, bytes]


class Written(NamedTuple):
    """The family that was written, the step of the checkpoint, and whose ids the model has learned.

    has_tokenizer: the tokenizer was there to go along.
    """

    family: str
    step: int
    ids: Ids
    has_tokenizer: bool


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

        data = Path(config.data.directory).expanduser()
        tokenizer = read_tokenizer(Path(directory), data, digest)
        files = {} if tokenizer is None else hub_files(tokenizer)
        facts = {"max_position_embeddings": config.data.sequence_length}
        facts |= {} if tokenizer is None else special_ids(tokenizer)
        # Our own form holds the architecture alone.
        is_own = form.model_type == OWN.model_type
        written = Export(model, form.model_type, form.dtype, {} if is_own else facts)
        write_together(written, state, read, to, form.shard_bytes, Beside(digest, files), ranks)
        ids = Ids(str(opened.path), digest)
        return Written(written.family.model_type, opened.step, ids, tokenizer is not None)


def write_together(
    written: Export,
    state: Mapping[str, torch.Tensor],
    read: ReadRows,
    to: Path,
    shard_bytes: int,
    others: Beside,
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
        begin_directory(beside, written.fields, others.digest, others.files)

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
