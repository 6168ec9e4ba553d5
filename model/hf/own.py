"""Weights as we keep them: a directory in the form of the hub, our own names, the whole architecture."""

from collections.abc import Iterator
from typing import Any

import torch

from conf.overrides import overrides_of
from model.config import Architecture
from model.hf.family import Family
from model.hf.fields import Fields
from model.hf.pieces import Piece
from model.language_model import LanguageModel

# The field for the family that weights were imported from, which they are exported to again.
ORIGIN = "origin"


def _read(fields: Fields) -> list[str]:
    fields.take(ORIGIN, None)
    return overrides_of(fields.take("architecture"))


def _write(config: Architecture) -> dict[str, Any]:
    # Mixers of no layer too: families read fields that several mixers share from one of them.
    return {"architecture": config.model_dump(mode="json")}


def _pieces(config: Architecture) -> Iterator[Piece]:
    with torch.device("meta"):
        model = LanguageModel(config)
    for name in model.state_dict():
        yield Piece(name, name)


OWN = Family("weft", "LanguageModel", {}, _pieces, read_more=_read, write_more=_write)
