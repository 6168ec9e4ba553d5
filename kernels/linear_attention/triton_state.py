"""What the inter-chunk kernels share: the state in registers, its decays and its reads, in Triton.

Letters: B rows, T tokens, N chunks, C chunk, H value heads, K key dim, V value dim.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.linear_attention.triton_chunks import dense, load_tile


class Decays(NamedTuple):
    """Decays per head: of the entering state until each token and of each token to the end, both [B T H].

    Per channel: of the state over a whole chunk, [B N H K]; the others are in q and k. None for what is not.
    """

    from_start: Any
    to_end: Any
    kept: Any


class IntraChunk(NamedTuple):
    """What is found of each chunk alone: q and k with strides, scores [B T H C], and decays.

    Per channel, q is decayed from the chunk's start and k to its end.
    """

    q: Any
    k: Any
    scores: Any
    decays: Any


class InterChunk(NamedTuple):
    """What is found chunk by chunk for backward, and the gradients of outputs that it starts from.

    States before each chunk and gradients of those behind it [B N H K V]; gradients of outputs, and of what
    is written to the state [B T H V].
    """

    states: Any
    grad_out: Any
    grad_x: Any
    grad_states: Any


class Gradients(NamedTuple):
    """Gradients of the inputs, those of q and k by value head; None where there is no such input."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    beta: Any


@triton.jit
def load_state(states, number, i, c, K: tl.constexpr, V: tl.constexpr, HAS_STATE: tl.constexpr):
    """Rows i and columns c of a state [K V] of several in float32, zeros without them."""
    if HAS_STATE:
        ptr = states + number * (K * V) + i[:, None] * V + c[None, :]
        return tl.load(ptr, mask=(i < K)[:, None] & (c < V)[None, :], other=0.0)
    else:
        return tl.zeros([i.shape[0], c.shape[0]], tl.float32)


@triton.jit
def store_state(states, number, i, c, state, K: tl.constexpr, V: tl.constexpr):
    """Writes what `load_state` reads, in the dtype of states."""
    ptr = states + number * (K * V) + i[:, None] * V + c[None, :]
    tl.store(ptr, state.to(states.dtype.element_ty), mask=(i < K)[:, None] & (c < V)[None, :])


@triton.jit
def kept_of(
    state, decays, own, chunk, count, heads, i, K: tl.constexpr, CHUNK: tl.constexpr, IS_CHANNEL: tl.constexpr
):
    """What is left of a state, or of its gradient, after the decays of a chunk."""
    if IS_CHANNEL:
        return state * tl.load(decays.kept + chunk * K + i, mask=i < K, other=0.0)[:, None]
    else:
        return state * tl.load(decays.from_start + own + (tl.minimum(count, CHUNK) - 1) * heads)


@triton.jit
def load_scores(scores, start, head, heads, count, CHUNK: tl.constexpr):
    """Scores of a chunk [C C], zero in rows that do not exist."""
    t = tl.arange(0, CHUNK)
    return load_tile(dense(scores, start, head, heads, CHUNK), 0, t, t, (t < count)[:, None])
