"""What the Triton kernels of a chunk share: reads and writes, documents, running decays, block halves.

Letters: C chunk, D dim. A chunk is CHUNK tokens of one row, of which `count` exist; `start` is its first
token among those of all rows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Strided(NamedTuple):
    """A tensor [B T H D] or [B T H] and its distances between tokens, also of two rows, and between heads."""

    pointer: Any
    token: Any
    head: Any


class Sizes(NamedTuple):
    """Tokens and chunks of a row, value heads, and value heads of a key head."""

    tokens: Any
    chunks: Any
    heads: Any
    repeat: Any


@triton.jit
def chunk_at(program, sizes, CHUNK: tl.constexpr):
    """Of the chunk of a program: its row, number in the row, head, first token and number of tokens."""
    row, n = (program // sizes.heads // sizes.chunks).to(tl.int64), (program // sizes.heads) % sizes.chunks
    first = n * CHUNK
    return row, n, program % sizes.heads, row * sizes.tokens + first, tl.minimum(sizes.tokens - first, CHUNK)


@triton.jit
def moved(x, start, head):
    """x from a token and a head on."""
    return Strided(x.pointer + (start * x.token + head * x.head), x.token, x.head)


@triton.jit
def dense(pointer, start, head, heads, DIM: tl.constexpr):
    """A contiguous tensor [B T H D] from a token and a head on, with its strides."""
    return moved(Strided(pointer, heads * DIM, DIM), start, head)


@triton.jit
def load_tile(x, at, t, i, mask):
    """Tokens t and columns at + i of the head at which x stands, zero where masked."""
    return tl.load(x.pointer + at + (t[:, None] * x.token + i[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(x, at, t, i, numbers, mask):
    """Writes what `load_tile` reads, in the dtype of x."""
    ptr = x.pointer + at + (t[:, None] * x.token + i[None, :])
    tl.store(ptr, numbers.to(x.pointer.dtype.element_ty), mask=mask)


@triton.jit
def products_of(
    a, b, count, K: tl.constexpr, KEYS: tl.constexpr, KEY_BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Products over K of each token of a with each of b [C C]."""
    t, i = tl.arange(0, CHUNK), tl.arange(0, KEY_BLOCK)
    found = tl.zeros([CHUNK, CHUNK], tl.float32)
    for at in tl.range(0, KEYS, KEY_BLOCK, num_stages=1):
        is_key = (t < count)[:, None] & (at + i < K)[None, :]
        found = tl.dot(
            load_tile(a, at, t, i, is_key),
            tl.trans(load_tile(b, at, t, i, is_key)),
            found,
            input_precision="tf32x3",
        )
    return found


@triton.jit
def chunk_documents(document, start, count, is_first, CHUNK: tl.constexpr, HAS_DOCUMENT: tl.constexpr):
    """Per token: its document's number, whether the entering state is of it, whether it lasts to the end."""
    t = tl.arange(0, CHUNK)
    if HAS_DOCUMENT:
        number = tl.load(document + start + t, mask=t < count, other=0)
        before = tl.load(document + start - tl.where(is_first, 0, 1))
        last = tl.load(document + start + count - 1)
        number = tl.where(t < count, number, last)
        return number, number == before, number == last
    else:
        return t * 0, t >= 0, t >= 0


@triton.jit
def running_decay(log_decay, start, head, count, CHUNK: tl.constexpr, HAS_DECAY: tl.constexpr) -> tl.tensor:
    """Sums of log decays from the chunk's start up to and with each token [C], exact in float64."""
    # Gates become multiples of 2^-36 (adding and taking away 1.5 * 2^16 rounds them), of which float64 holds
    # every sum of a chunk: differences are exact too, after a strong decay and after another document.
    t = tl.arange(0, CHUNK)
    if HAS_DECAY:
        gates = moved(log_decay, start, head)
        gate = tl.load(gates.pointer + t * gates.token, mask=t < count, other=0.0).to(tl.float64)
        gate = (tl.maximum(gate, -1000.0) + 98304.0) - 98304.0
        return tl.cumsum(gate, axis=0)
    else:
        return (t * 0).to(tl.float64)


@triton.jit
def decay_between(running, number, CHUNK: tl.constexpr):
    """Decay factor from token j to token i [C C], zero for j after i and for another document."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    difference = (running[:, None] - running[None, :]).to(tl.float32)
    is_seen = (j <= i) & (number[:, None] == number[None, :])
    # Masked before exp: above the diagonal the difference is positive and would overflow.
    return tl.exp(tl.where(is_seen, difference, float("-inf")))


@triton.jit
def head_decays(running, is_carried, is_lasting, CHUNK: tl.constexpr):
    """Decays [C] of the entering state until each token of a chunk, and of each token to its end."""
    total = tl.sum(tl.where(tl.arange(0, CHUNK) == CHUNK - 1, running, 0.0), axis=0)
    into = tl.where(is_carried, tl.exp(running.to(tl.float32)), 0.0)
    return into, tl.where(is_lasting, tl.exp((total - running).to(tl.float32)), 0.0)


@triton.jit
def across_gates(pairs, CHUNK: tl.constexpr):
    """Sums of the products of tokens i and j [C C] below the diagonal that each gate is between [C]."""
    # A gate is between j before it and i at or after it. Sums over just those: a sum over all i less
    # one over all j would leave the rounding of pairs that the gate is not between.
    is_before = tl.arange(0, CHUNK)[None, :] < tl.arange(0, CHUNK)[:, None]
    return tl.sum(tl.where(is_before, tl.cumsum(pairs, axis=0, reverse=True), 0.0), axis=1)


@triton.jit
def gate_gradient(across, from_there, to_there, ends, into, count, CHUNK: tl.constexpr):
    """Gradients of gates [C]: from pairs across each, reads behind it, writes before it, and the states."""
    t = tl.arange(0, CHUNK)
    is_before = t[None, :] < t[:, None]
    grad = across + tl.sum(tl.where(is_before, to_there[None, :], from_there[None, :]), axis=1)
    return grad + ends * tl.sum(tl.where(t == count - 1, into, 0.0), axis=0)


# Each of these says of one token which range the other must be in, as bounds that hang on `half`: comparisons
# of all pairs alone would be hoisted out of the loop over `half` and fill the registers.


@triton.jit
def is_right(i, half):
    """Whether a token is in the right half of its block of twice `half` tokens; `half` is a power of two."""
    return (i & half) != 0


@triton.jit
def is_pair(i, j, half):
    """Whether token i is in the right and token j in the left half of the same block."""
    middle = i & -half
    first = tl.where(is_right(i, half), middle - half, middle)
    return (first <= j) & (j < middle)


@triton.jit
def is_between(i, t, half):
    """Whether the gate of token t is between token i and the middle of its block.

    A token of the right half has the gates from the middle up to and with its own, one of the left half the
    gates after its own up to the middle.
    """
    edge, is_later = i & -half, is_right(i, half)
    first, last = tl.where(is_later, edge, i + 1), tl.where(is_later, i, edge + half - 1)
    return (first <= t) & (t <= last)


@triton.jit
def three_parts(x):
    """bfloat16 numbers whose sum is x in float32."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def sums_of(is_part, parts):
    """Sums over the rows of x [C K] that each row of is_part [C C] names; parts are `three_parts` of x.

    Products with 0 and 1 lose nothing, and addends of one sign cancel nothing.
    """
    part = tl.where(is_part, 1.0, 0.0).to(tl.bfloat16)
    found = tl.dot(part, parts[0])
    found = tl.dot(part, parts[1], found)
    return tl.dot(part, parts[2], found)


@triton.jit
def add_sums_of(is_part, x, total, DTYPE: tl.constexpr):
    """total plus the sums over the rows of x [C K] in float32 that each row of is_part [C C] names.

    With bfloat16 as DTYPE x is rounded to it, as all that is summed there has been.
    """
    if DTYPE == tl.bfloat16:
        part = tl.where(is_part, 1.0, 0.0).to(tl.bfloat16)
        return tl.dot(part, x.to(tl.bfloat16), total)
    else:
        return total + sums_of(is_part, three_parts(x))


@triton.jit
def load_gates(log_decay, at, t, i, mask):
    """Log decays of a block of channels [C K] as `three_parts`; log_decay stands at the chunk."""
    return three_parts(tl.maximum(load_tile(log_decay, at, t, i, mask).to(tl.float32), -1000.0))


@triton.jit
def channel_decays(gates, is_carried, is_lasting, CHUNK: tl.constexpr):
    """Decays of each channel [C K] of the entering state until each token, and of each token to the end."""
    t, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    into = tl.where(is_carried[:, None], tl.exp(sums_of(j <= t, gates)), 0.0)
    return into, tl.where(is_lasting[:, None], tl.exp(sums_of(j > t, gates)), 0.0)


@triton.jit
def middle_decay(gates, half, CHUNK: tl.constexpr):
    """Decay of each channel [C K] between each token and the middle of its block of twice `half` tokens."""
    t, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return tl.exp(sums_of(is_between(t, j, half), gates))
