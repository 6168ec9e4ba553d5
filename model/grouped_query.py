"""What mixers of grouped-query attention share: the fields of their heads, and how they are sharded."""

from abc import ABC
from typing import ClassVar

from pydantic import Field, model_validator

from model.mixer import MixerConfig


class GroupedQueryConfig(MixerConfig, ABC):
    """Fields of heads in groups that share keys and values, arXiv 2305.13245, and of their rotary part."""

    sharded_fields = ("num_heads",)
    replicable_fields = ("num_key_heads",)
    # The dims of a head of which rotary_dim is a part.
    rotary_of: ClassVar[tuple[str, ...]] = ("head_dim",)

    num_heads: int = Field(ge=1)
    num_key_heads: int = Field(ge=1)
    rotary_dim: int = Field(ge=0)
    rotary_theta: float = Field(gt=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> "GroupedQueryConfig":
        heads, key_heads = self.num_heads, self.num_key_heads
        if heads % key_heads:
            raise ValueError(f"num_heads {heads} must be a multiple of num_key_heads {key_heads}")
        dims = {name: getattr(self, name) for name in self.rotary_of}
        if self.rotary_dim % 2 or self.rotary_dim > min(dims.values()):
            most = " and ".join(f"{name} {dim}" for name, dim in dims.items())
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even and at most {most}")
        return self


def keys_seen(context: int, block: int, num_blocks: int) -> float:
    """Keys that a query attends to on average: half its own block, and the chosen ones that there are."""
    # Query block i has i blocks before it, of which num_blocks - 1 at most are chosen.
    blocks, chosen = max(1, context // block), num_blocks - 1
    full = max(0, blocks - chosen)
    earlier = (chosen * full + sum(range(min(blocks, chosen)))) / blocks
    return min(block, context) / 2 + earlier * block
