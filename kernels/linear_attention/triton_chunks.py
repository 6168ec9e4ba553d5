"""What the Triton kernels of a chunk share: documents, running decays, the triangular inverse, block halves.

Letters: C chunk. A chunk is CHUNK tokens of one row, of which `count` exist.
"""

import triton
import triton.language as tl


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
def running_decay(log_decay, gate_offs, count, CHUNK: tl.constexpr, HAS_DECAY: tl.constexpr) -> tl.tensor:
    """Sums of log decays from the chunk's start up to and with each token [C], exact in float64."""
    # Gates become multiples of 2^-36 (adding and taking away 1.5 * 2^16 rounds them), of which float64 holds
    # every sum of a chunk: differences are exact too, after a strong decay and after another document.
    t = tl.arange(0, CHUNK)
    if HAS_DECAY:
        gate = tl.load(log_decay + gate_offs, mask=t < count, other=0.0).to(tl.float64)
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
def sums_of(is_part, first, second, third):
    """Sums over the rows of x [C K] that each row of is_part [C C] names; x as `three_parts`.

    Products with 0 and 1 lose nothing, and addends of one sign cancel nothing.
    """
    part = tl.where(is_part, 1.0, 0.0).to(tl.bfloat16)
    found = tl.dot(part, first)
    found = tl.dot(part, second, found)
    return tl.dot(part, third, found)


@triton.jit
def add_sums_of(is_part, x, total, DTYPE: tl.constexpr):
    """total plus the sums over the rows of x [C K] in float32 that each row of is_part [C C] names.

    With bfloat16 as DTYPE x is rounded to it, as all that is summed there has been.
    """
    if DTYPE == tl.bfloat16:
        part = tl.where(is_part, 1.0, 0.0).to(tl.bfloat16)
        return tl.dot(part, x.to(tl.bfloat16), total)
    else:
        first, second, third = three_parts(x)
        return total + sums_of(is_part, first, second, third)
