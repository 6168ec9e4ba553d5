"""Sizes, tiles and buffers of a call, for the launches of linear attention and of kernels built on it.

Letters: B rows, T tokens, N chunks, C chunk, G key heads, H value heads, K key dim, V value dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from kernels.linear_attention.triton_chunks import Sizes, Strided
from kernels.linear_attention.triton_state import Gradients, InterChunk


class Part(NamedTuple):
    """Blocks of K and V that one kind of kernel takes, and its warps. Not all kinds cut both dims."""

    keys: int
    values: int
    warps: int


class Tiles(NamedTuple):
    """Tokens of a chunk, stages of the inter-chunk loads, and blocks before, in, and after inter-chunk."""

    chunk: int
    stages: int
    intra_chunk: Part
    forward: Part
    backward: Part
    gradients: Part


class Scan(NamedTuple):
    """Sizes of one call, and whether there is a decay, and one per key channel."""

    rows: int
    tokens: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    chunks: int
    has_decay: bool
    is_channel: bool
    tiles: Tiles

    @property
    def sizes(self) -> Sizes:
        """What kernels take."""
        return Sizes(self.tokens, self.chunks, self.heads, self.heads // self.key_heads)

    @property
    def programs(self) -> int:
        """Chunks of all heads of all rows."""
        return self.chunks * self.rows * self.heads

    def options(self, part: Part, *names: str) -> dict[str, Any]:
        """Compile-time sizes by name, and warps."""
        keys, values = _padded(self.key_dim), _padded(self.value_dim)
        found = {
            "K": self.key_dim,
            "V": self.value_dim,
            "KEYS": keys,
            "VALUES": values,
            "KEY_BLOCK": min(keys, part.keys),
            "VALUE_BLOCK": min(values, part.values),
        }
        chosen = {name: found[name] for name in names}
        return chosen | {"CHUNK": self.tiles.chunk, "num_warps": part.warps, "num_stages": 1}

    def inter_chunk(self, part: Part, directions: int) -> tuple[tuple[int, int], Sizes, dict[str, Any]]:
        """Grid, sizes and options of a launch that passes the chunks one way, or both at once."""
        options = self.options(part, "K", "V", "KEYS", "VALUE_BLOCK")
        del options["num_stages"]
        options["VALUES"] = options.pop("VALUE_BLOCK")
        grid = (directions * triton.cdiv(self.value_dim, options["VALUES"]), self.rows * self.heads)
        # Decayed per channel, q and k are by value head.
        sizes = self.sizes._replace(repeat=1) if self.is_channel else self.sizes
        return grid, sizes, options | {"IS_CHANNEL": self.is_channel, "STAGES": self.tiles.stages}

    def outputs(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Room for outputs [B T H V] and the final state [B H K V]."""
        end = (self.rows, self.heads, self.key_dim, self.value_dim)
        return new(v, self.rows, self.tokens, self.heads, self.value_dim), v.new_empty(
            end, dtype=torch.float32
        )

    def inter_chunk_buffers(self, v: Tensor, grad_out: Tensor | None) -> InterChunk:
        """Room for what backward finds chunk by chunk, from the gradients of outputs; None is zeros."""
        shape = (self.rows, self.tokens, self.heads, self.value_dim)
        grad_out = torch.zeros(shape, dtype=v.dtype, device=v.device) if grad_out is None else grad_out
        dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
        states = (2, self.rows, self.chunks, self.heads, self.key_dim, self.value_dim)
        before, behind = v.new_empty(states, dtype=dtype).unbind()
        return InterChunk(before, grad_out.to(v.dtype).contiguous(), new(v, *shape), behind)

    def gradients(
        self, q: Tensor, grad_v: Tensor, log_decay: Tensor | None, beta: Tensor | None
    ) -> Gradients:
        """Room for the gradients of all inputs but v; of log_decay and beta only where they are given."""
        grad_q, grad_k = q.new_empty(2, self.rows, self.tokens, self.heads, self.key_dim).unbind()
        others = (None if x is None else new(x, *x.shape) for x in (log_decay, beta))
        return Gradients(grad_q, grad_k, grad_v, *others)

    def per_key_head(self, grad: Tensor) -> Tensor:
        """The sum over the value heads of each key head."""
        return grad.unflatten(2, (self.key_heads, -1)).sum(3) if self.heads > self.key_heads else grad


Family: TypeAlias = Callable[[int, int, int, bool, torch.dtype], Tiles]


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def scan_of(q: Tensor, v: Tensor, log_decay: Tensor | None, tiles: Tiles | None, family: Family) -> Scan:
    """Sizes of a call with these inputs, with the family's tiles unless there are some."""
    rows, tokens, key_heads, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    is_channel = log_decay is not None and log_decay.ndim == 4
    tiles = tiles or family(key_dim, value_dim, rows * heads, is_channel, q.dtype)
    chunks = triton.cdiv(tokens, tiles.chunk)
    has_decay = log_decay is not None
    return Scan(rows, tokens, key_heads, heads, key_dim, value_dim, chunks, has_decay, is_channel, tiles)


def tiles_of(
    key_dim: int,
    value_dim: int,
    heads: int,
    dtype: torch.dtype,
    full: int,
    intra_chunk: Part,
    gradients: Part,
) -> Tiles:
    """Tiles for so many heads of all rows together.

    The inter-chunk kernels take blocks of V such that their programs fill the machine once: `full` do.
    """
    is_small = 2 * key_dim * dtype.itemsize <= 512

    def inter_chunk(directions: int) -> Part:
        is_wide = is_small and directions * heads * triton.cdiv(value_dim, 64) >= full
        return Part(key_dim, 64, 8) if is_wide else Part(key_dim, 32, 4 if is_small else 8)

    return Tiles(64, 2 if is_small else 1, intra_chunk, inter_chunk(1), inter_chunk(2), gradients)


def new(like: Tensor, *shape: int) -> Tensor:
    """A contiguous tensor of that dtype and device without numbers."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def strided(x: Tensor | None) -> Strided:
    """x with the strides that kernels take; 0 for one that is not there."""
    return Strided(None, 0, 0) if x is None else Strided(x, x.stride(1), x.stride(2))


def row_strided(x: Tensor | None) -> Tensor | None:
    """x, copied unless tokens of all rows follow each other at one distance, as kernels take it."""
    if x is None:
        return None
    is_dense = x.ndim == 3 or x.stride(-1) == 1
    return x if is_dense and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()
