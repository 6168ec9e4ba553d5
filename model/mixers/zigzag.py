"""Streaming sparse attention: a latent attention over the first and the last blocks (LongCat's ZigZag)."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kernels.attention import attention
from model.latent_attention import LatentConfig, LatentMixer
from model.mixer import Flops, Sequence


class ZigzagConfig(LatentConfig):
    """Fields of streaming sparse attention."""

    kind: Literal["zigzag"] = "zigzag"
    block: int = Field(ge=1)
    first_blocks: int = Field(ge=0)
    recent_blocks: int = Field(ge=1)

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Zigzag":
        """The module; all layers are alike."""
        return Zigzag(self, width, init_std, init_std / (2 * depth) ** 0.5)

    def _keys(self, context: int) -> float:
        """Keys that a query sees on average."""
        kept, seen = self.first_blocks + self.recent_blocks, 0
        whole, rest = divmod(context, self.block)
        for size, block in ((self.block, index) for index in range(min(whole, kept))):
            seen += size * block * self.block + size * (size + 1) // 2
        seen += max(0, whole - kept) * self.block * ((kept - 1) * self.block + (self.block + 1) / 2)
        seen += rest * min(whole, kept - 1) * self.block + rest * (rest + 1) / 2
        return seen / context

    def flops(self, width: int, context: int) -> Flops:
        """Scores and weighted values over the keys of the first and the last blocks."""
        core = 2 * self.num_heads * (self.head_dim + self.value_dim) * self._keys(context)
        return Flops(super().flops(width, context).projections, core)

    def cache_bytes(self, context: int, *, element_bytes: int = 2) -> int:
        """The latents and shared keys of the first and the last blocks, but for the next query's own."""
        kept = min(context, (self.first_blocks + self.recent_blocks) * self.block - 1)
        return super().cache_bytes(kept, element_bytes=element_bytes)

    def activation_bytes(self, width: int, *, element_bytes: int = 2) -> int:
        """Those of the attention, and three places of each query in the blocks."""
        return super().activation_bytes(width, element_bytes=element_bytes) + 12


class Zigzag(LatentMixer):
    """Softmax attention in whole blocks of the document: its first ones, and those up to the query's own."""

    def __init__(self, config: ZigzagConfig, width: int, init_std: float, out_std: float) -> None:
        super().__init__(config, width, init_std, out_std)
        self.config = config

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """Work does not grow with the distance between the first and the last blocks."""
        config, latents, view = self.config, self.latents(x, sequence), sequence.view()
        keys, values = self.keys_values(latents, view)
        out = attention(
            latents.q,
            keys,
            values,
            scale=config.scale,
            window=config.recent_blocks * config.block,
            block=config.block,
            first=config.first_blocks * config.block,
            document=view.document,
            position=view.position,
            q_index=view.q_index,
        )
        return self.out_proj(out.flatten(-2))
