"""Multi-head latent attention: keys and values of all heads from one small latent (DeepSeek-V2)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from kernels.attention import attention
from model.latent_attention import LatentConfig, LatentMixer
from model.mixer import Sequence


class MlaConfig(LatentConfig):
    """Fields of multi-head latent attention."""

    kind: Literal["mla"] = "mla"

    def build(self, width: int, layer: int, depth: int, init_std: float) -> "Mla":
        """The module; all layers are alike."""
        return Mla(self, width, init_std, init_std / (2 * depth) ** 0.5)


class Mla(LatentMixer):
    """Softmax attention over all keys of the document."""

    def forward(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "B T D"]:
        """Queries see the keys of their own document, up to themselves."""
        latents, view = self.latents(x, sequence), sequence.view()
        keys, values = self.keys_values(latents, view)
        out = attention(
            latents.q,
            keys,
            values,
            scale=self.latent.scale,
            document=view.document,
            q_index=view.q_index,
        )
        return self.out_proj(out.flatten(-2))
