"""Memory of the fullest rank, from formulas: what training keeps, by cause."""

from typing import NamedTuple

from model.count import activation_bytes, count
from train.config import RunConfig

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


class Memory(NamedTuple):
    """Bytes of one rank, by cause."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All together; allocator, libraries and communication buffers come on top."""
        return sum(self)


def memory_per_rank(config: RunConfig, world_size: int) -> Memory:
    """Bytes of the fullest rank of `world_size`.

    Weights are kept in the optimizer's precision and sharded, with gradients and both moments; a rank's part
    of two blocks and of the tables is gathered in the precision of the computation. Nothing is recomputed.
    The few weights that ranks of the tensor axis all hold are counted as if they were cut.
    """
    architecture = config.architecture
    counts = count(architecture)
    kept, computed = _BYTES[config.precision.parameters], _BYTES[config.precision.compute]
    degrees = config.parallel.degrees(world_size)
    shards = degrees.dp_shard * degrees.cp * degrees.tp
    owned = -(-counts.total // shards)
    layers = [(layer.params - layer.routed, layer.routed) for layer in counts.layers]
    largest = max(dense // degrees.tp + routed // degrees.ep for dense, routed in layers)
    tables = (counts.embedding + counts.head) // degrees.tp + counts.norm
    # Alone, the weights are used where they are; a narrower copy of each stays until backward.
    gathered = (
        computed * (2 * largest + tables) if shards > 1 else computed * counts.total * (computed < kept)
    )
    row = config.data.sequence_length // (degrees.cp * degrees.tp)
    tokens = config.rank_rows(degrees.rows)[1] * row
    depth = architecture.model.depth
    activations = sum(activation_bytes(architecture, n, element_bytes=computed) for n in range(depth))
    # The loss holds some rows of logits at a time, and the gradient of the whole head in float32.
    rows = min(512, tokens) * architecture.model.vocab_size
    head = architecture.model.vocab_size * architecture.model.width
    return Memory(
        weights=kept * owned,
        gradients=kept * owned,
        optimizer=2 * kept * owned,
        gathered=gathered,
        activations=tokens * activations,
        logits=3 * max(4, computed) * rows + max(4, computed) * head,
    )
