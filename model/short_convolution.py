"""The short causal convolution of linear mixers."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.convolution import short_convolution
from model.linear import Initial
from model.mixer import Sequence


class ShortConvolution(nn.Module):
    """A causal depthwise convolution of a few taps, with a bias or without."""

    def __init__(self, channels: int, taps: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if has_bias else None
        uniform = Initial("uniform", -(taps**-0.5), taps**-0.5)
        self.initial = {"weight": uniform, "bias": uniform} if has_bias else {"weight": uniform}

    def forward(
        self, x: Float[Tensor, "B T D"], sequence: Sequence, *, has_silu: bool = True
    ) -> Float[Tensor, "B T D"]:
        """The convolution, document by document, through SiLU or not."""
        sharding, bias = sequence.sharding, None if self.bias is None else self.bias.to(x.dtype)
        document = None if sequence.document is None else sharding.chunks(sequence.document)
        out = short_convolution(
            sharding.chunks(x),
            self.weight.to(x.dtype),
            bias,
            document=document,
            initial_state=self._tail(x, sequence),
            has_silu=has_silu,
        )
        return sharding.restore(out)

    def _tail(self, x: Float[Tensor, "B T D"], sequence: Sequence) -> Float[Tensor, "X U D"] | None:
        # The tokens before each chunk, zero where they are of another document than the chunk's first one.
        count = self.weight.shape[1] - 1
        tail = sequence.sharding.before(x, count) if count else None
        if tail is None:
            return None
        first = sequence.sharding.chunks(sequence.position)[:, :1]
        distance = torch.arange(count, 0, -1, device=x.device)
        return tail * (distance <= first)[..., None]
