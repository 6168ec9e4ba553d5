"""Tensor parallelism with sequence-parallel norms.

Between mixers and feed-forwards a rank holds its part of the tokens. Before each, the parts are gathered; it
computes its heads, or its hidden units, for all of them; and what it gives is summed over ranks and scattered
again. Nothing inside knows of it: a rank's mixer is an ordinary mixer with fewer heads.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.block import Block
from model.config import Architecture
from model.ffn import FeedForward
from model.language_model import LanguageModel
from model.mixer import Mixed, Split
from model.moe.layer import Moe
from parallel.axes import Axis
from parallel.collectives import gather, reduce_scatter, sum_over
from parallel.placement import Placement, held_boxes, placed, undivided


@dataclass(frozen=True)
class TensorPeers:
    """The ranks that hold the other heads of a mixer."""

    axis: Axis

    @property
    def rank(self) -> int:
        """Which share of the heads is here."""
        return self.axis.rank

    @property
    def size(self) -> int:
        """Into how many shares the heads are cut."""
        return self.axis.size

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the shares; so is its gradient."""
        return sum_over(x, self.axis)
