"""Softmax attention over the query's own block of keys and selected blocks before it."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_within
from kernels.block_attention.reference import block_attention_gathered
from kernels.choose import takes_triton
from kernels.query_index import require_q_index


@checked
def block_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    selected: Int[Tensor, "B T J n"],
    *,
    scale: float,
    block: int,
    position: Int[Tensor, "B S"],
    q_index: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T J m"]]:
    """Attention over the query's own block up to itself and its selected blocks, and its mass on each block.

    A document is cut into blocks of `block` tokens from its start on; position is that of each token in its
    document. selected: slots of `document_windows(position, block, block)`, of blocks before the query's own,
    each at most once, -1 for none; J is G or H, one selection for each key head or for each query head.
    The second result, m = n + 1, is the attention probability of the own block and of each selected one,
    summed over the query heads that share the selection, in float32 at least and without a gradient.
    q_index: index of each query in its row of keys, rising along the row; None where queries and keys are the
    same T = S tokens.

    Native Sparse Attention, arXiv 2502.11089, section 3.3.2 (selected attention), and MoBA, arXiv 2502.13189,
    equation 2. Work is O(T (n + 1) block (K + V)) per head.

    Raises ValueError for an argument of the wrong shape, dtype or range.
    """
    tokens, heads = q.shape[1:3]
    key_heads, selectors = k.shape[2], selected.shape[2]
    require(tokens > 0, "q", "at least one token", tuple(q.shape))
    require_q_index(q_index, tokens, k.shape[1])
    require(heads % key_heads == 0, "q", f"a multiple of {key_heads} heads", heads)
    require(q.dtype == k.dtype == v.dtype, "k, v", f"dtype {q.dtype}, as q", (k.dtype, v.dtype))
    require(selectors in (heads, key_heads), "selected", f"{key_heads} or {heads} heads", selectors)
    require(block > 0, "block", "at least 1", block)
    slots = k.shape[1] // block
    require(selected.shape[3] <= slots, "selected", f"at most {slots} blocks", selected.shape[3])
    require_within("selected", selected, -1, max(slots, 1))
    options: dict[str, Any] = {"scale": scale, "block": block, "position": position, "q_index": q_index}
    if takes_triton("block_attention", q):
        from kernels.block_attention.triton import block_attention_triton

        return block_attention_triton(q, k, v, selected, **options)
    return block_attention_gathered(q, k, v, selected, **options)
