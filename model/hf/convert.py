"""From one form of checkpoint to another, without ever holding the model."""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import CheckpointError
from conf.names import shortened
from model.hf.files import DTYPES, SHARD_BYTES, write_directory
from model.hf.own import ORIGIN, OWN
from model.hf.pieces import Mapped
from model.hf.pretrained import Opened, family_for, full_config, open_pretrained, state_of


def convert(
    source: str | Path,
    target: str | Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes the checkpoint in `source` to `target` as a family of the hub, or as our own; gives its name.

    `model_type` as in `save_pretrained`, but None takes the family that our own form was made from. A `dtype`
    of None keeps every tensor's own; another one leaves in float32 what must stay so. The tokenizer
    and its digest go along. Memory holds one shard of the target and one tensor of ours, such as all experts
    of a layer.

    Raises CheckpointError as `open_pretrained` and `save_pretrained` do, StorageError.
    """
    opened = open_pretrained(source)
    config = opened.model.config
    family, fields = family_for(config, model_type or opened.hub.config.get(ORIGIN))
    if family is OWN:
        fields |= {ORIGIN: opened.hub.config.get(ORIGIN, opened.family.model_type)}
    mapped = Mapped(family.pieces(config), state_of(opened.model))
    ours = _Ours(opened)
    kept = family.float32_of(mapped, opened.model) | opened.family.float32_of(opened.mapped, opened.model)
    lost = [name for name in mapped.uncovered if bool(ours[name].any())]
    if lost:
        raise CheckpointError(f"{family.model_type} has no place for {shortened(lost)}, which are not zero")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        # Those made of one tensor of ours follow each other.
        for name in sorted(mapped.by_theirs, key=lambda name: (mapped.by_theirs[name][0].ours, name)):
            yield name, mapped.write(name, ours, dtype, kept)
        for name, original in family.copies(config).items():
            yield name, mapped.write(original, ours, dtype, kept)
        yield from family.derived(config)

    with torch.no_grad():
        said = dtype or ours[next(iter(opened.mapped.by_ours()))].dtype
        written = full_config(family, fields, said)
        hub = opened.hub
        write_directory(
            Path(target), written, tensors(), shard_bytes, hub.tokenizer_digest, hub.tokenizer_files()
        )
    return family.model_type


class _Ours(dict[str, Tensor]):
    """Our tensors by name, made when asked for; the last one is kept."""

    def __init__(self, opened: Opened) -> None:
        super().__init__()
        self.opened = opened
        self.forms = opened.hub.forms()
        self.shapes = {name: tensor.shape for name, tensor in state_of(opened.model).items()}
        self.sources = opened.mapped.by_ours()

    def __missing__(self, name: str) -> Tensor:
        self.clear()
        self[name] = tensor = self._made(name)
        return tensor

    def _made(self, name: str) -> Tensor:
        if name in self.opened.mapped.uncovered:
            return self._reset(name)
        dtypes = [DTYPES[self.forms[theirs][1]] for theirs in self.sources[name]]
        tensor = torch.empty(self.shapes[name], dtype=reduce(torch.promote_types, dtypes))
        for theirs, pieces in self.sources[name].items():
            value = self.opened.hub.tensor(theirs)
            for piece in pieces:
                piece.ours_view(tensor).copy_(piece.theirs_view(value))
        return tensor

    def _reset(self, name: str) -> Tensor:
        """A buffer as a new model has it."""
        owner, _, leaf = name.rpartition(".")
        module = self.opened.model.get_submodule(owner)
        module.to_empty(device="cpu", recurse=False)
        module.reset_buffers()  # pyright: ignore[reportCallIssue]
        return module.get_buffer(leaf)
