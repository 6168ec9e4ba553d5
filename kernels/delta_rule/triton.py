"""The gated delta rule in Triton: chunks of linear attention whose keys and scores carry the solve."""

from jaxtyping import Float, Int
from torch import Tensor

from kernels.linear_attention.triton import Tiles, scan_triton


def gated_delta_rule_triton(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """`kernels.delta_rule.gated_delta_rule` in Triton; the final state is in float32."""
    return scan_triton(q, k, v, log_decay, beta, document=document, initial_state=initial_state, tiles=tiles)
