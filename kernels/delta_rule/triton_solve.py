"""What is written in a chunk of the delta rule, in Triton: the solve, and the gradients through the values.

Letters: B rows, T tokens, C chunk, H value heads, K key dim, V value dim. With A = beta D k k^T below the
diagonal, D the decay between tokens, the delta rule solves (I + A) u = x for what is written: the UT
transform of DeltaNet, arXiv 2406.06484, with the decays of arXiv 2412.06464. With L = (I + A)^-1 moved to the
other side of each product, and e the decay of a write until the chunk's end,

    scores = (D q k^T) L      k_ut = L^T (e k)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.linear_attention.triton_chunks import dense, load_tile, moved, store_tile
from kernels.linear_attention.triton_state import load_scores


class SolvedChunk(NamedTuple):
    """What is found of each chunk alone: q and k with strides, k_ut [B T H K], scores and L [B T H C].

    Per channel, q and k are decayed from the chunk's start.
    """

    q: Any
    k: Any
    k_ut: Any
    scores: Any
    inverse: Any
    decays: Any


@triton.jit
def load_rates(beta, start, head, t, is_in):
    """beta of the tokens of a chunk [C], in float32."""
    beta = moved(beta, start, head)
    return tl.load(beta.pointer + t * beta.token, mask=is_in, other=0.0).to(tl.float32)


@triton.jit
def written_of(error, rate, inverse):
    """What is written [C V]: L beta v_error."""
    x = (error.to(tl.float32) * rate[:, None]).to(error.dtype)
    return tl.dot(inverse, x, input_precision="tf32x3").to(error.dtype)


@triton.jit
def through_values(
    v_error,
    rate,
    intra,
    inter,
    grad_v,
    written,
    start,
    count,
    head,
    heads,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_KEPT: tl.constexpr,
):
    """Writes the gradients of v and, if IS_KEPT, what is written.

    Returns the products over V of g and of d x with what is written [C C], and the gradients of beta [C].
    """
    t, c = tl.arange(0, CHUNK), tl.arange(0, VALUE_BLOCK)
    d_scores, d_system = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    d_rate = tl.zeros([CHUNK], tl.float32)
    for at in tl.range(0, VALUES, VALUE_BLOCK, num_stages=1):
        is_values = (t < count)[:, None] & (at + c < V)[None, :]
        error = load_tile(dense(v_error, start, head, heads, V), at, t, c, is_values)
        g = load_tile(dense(inter.grad_out, start, head, heads, V), at, t, c, is_values)
        dx = load_tile(dense(inter.grad_x, start, head, heads, V), at, t, c, is_values)
        d_rate += tl.sum(dx.to(tl.float32) * error.to(tl.float32), axis=1)
        dv = dx.to(tl.float32) * rate[:, None]
        store_tile(dense(grad_v, start, head, heads, V), at, t, c, dv, is_values)
        x = written_of(error, rate, load_scores(intra.inverse, start, head, heads, count, CHUNK))
        if IS_KEPT:
            store_tile(dense(written, start, head, heads, V), at, t, c, x, is_values)
        d_system = tl.dot(dx, tl.trans(x), d_system, input_precision="tf32x3")
        d_scores = tl.dot(g, tl.trans(x), d_scores, input_precision="tf32x3")
    return d_scores, d_system, d_rate


@triton.jit
def unit_lower_inverse(below, CHUNK: tl.constexpr):
    """(I + below)^-1 in float32; below [C C] is strictly lower triangular, C is 16, 32 or 64.

    Blocks of 16 by forward substitution, all at once, then merged in pairs. A power series would overflow
    when keys are alike.
    """
    BLOCKS: tl.constexpr = CHUNK // 16
    block = tl.arange(0, BLOCKS)
    is_diagonal = block[:, None, None, None] == block[None, None, :, None]
    system = tl.sum(tl.where(is_diagonal, tl.reshape(below, [BLOCKS, 16, BLOCKS, 16]), 0.0), axis=2)
    index = tl.arange(0, 16)
    is_unit = (index[None, :, None] == index[None, None, :]) & (block[:, None, None] >= 0)
    solved = tl.where(is_unit, 1.0, 0.0)
    for step in range(15):
        # Rows up to `step` are final; the column takes their share out of all rows below.
        column = tl.sum(tl.where(index[None, None, :] == step, system, 0.0), axis=2)
        row = tl.sum(tl.where(index[None, :, None] == step, solved, 0.0), axis=1)
        solved -= column[:, :, None] * row[:, None, :]
    inverse = tl.reshape(tl.where(is_diagonal, solved[:, :, None, :], 0.0), [CHUNK, CHUNK])
    for pair in tl.static_range(BLOCKS // 2):
        inverse = _with_corner(inverse, below, 2 * pair, CHUNK, 16)
    if BLOCKS == 4:
        inverse = _with_corner(inverse, below, 0, CHUNK, 32)
    return inverse


@triton.jit
def _with_corner(inverse, below, first, CHUNK: tl.constexpr, SIZE: tl.constexpr):
    # The block below and left of two solved blocks, from `first` on: second (-below) first.
    corner = _block_of(inverse, first + 1, first + 1, CHUNK, SIZE)
    corner = tl.dot(corner, _block_of(below, first + 1, first, CHUNK, SIZE), input_precision="tf32x3")
    corner = tl.dot(corner, _block_of(inverse, first, first, CHUNK, SIZE), input_precision="tf32x3")
    block = tl.arange(0, CHUNK // SIZE)
    is_it = (block[:, None, None, None] == first + 1) & (block[None, None, :, None] == first)
    return inverse - tl.reshape(tl.where(is_it, corner[None, :, None, :], 0.0), [CHUNK, CHUNK])


@triton.jit
def _block_of(x, row, column, CHUNK: tl.constexpr, SIZE: tl.constexpr):
    block = tl.arange(0, CHUNK // SIZE)
    is_it = (block[:, None, None, None] == row) & (block[None, None, :, None] == column)
    x = tl.reshape(x, [CHUNK // SIZE, SIZE, CHUNK // SIZE, SIZE])
    return tl.sum(tl.sum(tl.where(is_it, x, 0.0), axis=2), axis=0)
