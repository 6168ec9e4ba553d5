"""Memory of the fullest rank, from formulas: what training keeps, by cause."""

from collections.abc import Collection
from typing import NamedTuple

from model.config import Architecture
from model.count import count, half_bytes
from model.layout import DENSE, HASH, NONE, Layer
from parallel.regions import FULL, ffn_region
from train.config import RunConfig

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


class Memory(NamedTuple):
    """Bytes of one rank, by cause.

    activations wait for backward; recomputed are those of the part that backward computes again, or brings
    back, at a time. host is not memory of the device.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    recomputed: int
    logits: int
    host: int

    @property
    def total(self) -> int:
        """All of the device together; allocator, libraries and communication buffers come on top."""
        return sum(self) - self.host


class Kept(NamedTuple):
    """Bytes per token of one layer.

    kept wait for backward. again are those of the largest part that is computed again.
    """

    kept: int
    again: int


def kept_bytes(
    config: Architecture, names: Layer, regions: Collection[str], *, element_bytes: int, is_cut: bool = False
) -> Kept:
    """What a layer keeps if backward computes `regions` again; regions and is_cut as elsewhere."""
    halves = half_bytes(config, names, element_bytes=element_bytes, is_cut=is_cut)
    # Of what is computed again the input stays, and the experts that a learned router chose, as int64.
    choice = 0 if names.ffn in (DENSE, HASH, NONE) else 8 * config.moe.top_k
    if FULL in regions:
        return Kept(halves.stream + choice, halves.mixer + halves.ffn)
    kept = again = 0
    for name, whole, rest in (
        (names.mixer, halves.mixer, halves.stream),
        (ffn_region(names.ffn), halves.ffn, halves.stream + choice),
    ):
        is_again = name != NONE and name in regions
        kept += rest if is_again else whole
        again = max(again, whole if is_again else 0)
    return Kept(kept, again)


def memory_per_rank(config: RunConfig, world_size: int) -> Memory:
    """Bytes of the fullest rank of `world_size`.

    Weights are kept in the optimizer's precision and sharded, with gradients and both moments; a rank's part
    of two blocks and of the tables is gathered in the precision of the computation. The few weights that
    ranks of the tensor axis all hold are counted as if they were cut.
    """
    architecture = config.architecture
    counts = count(architecture)
    kept, computed = _BYTES[config.precision.parameters], _BYTES[config.precision.compute]
    degrees = config.parallel.degrees(world_size)
    shards = degrees.dp_shard * degrees.cp * degrees.tp
    owned = -(-counts.total // shards)
    largest = max(
        (layer.params - layer.routed) // degrees.tp + layer.routed // degrees.ep for layer in counts.layers
    )
    tables = (counts.embedding + counts.head) // degrees.tp + counts.norm
    # Alone, the weights are used where they are; a narrower copy of each stays until backward.
    gathered = (
        computed * (2 * largest + tables) if shards > 1 else computed * counts.total * (computed < kept)
    )
    row = config.data.sequence_length // (degrees.cp * degrees.tp)
    tokens = config.rank_rows(degrees.rows)[1] * row
    ahead = architecture.model.prediction
    names = [*architecture.layers, *[Layer(ahead.mixer, ahead.ffn)] * ahead.depth]
    regions, is_cut = config.parallel.recomputed, degrees.cp > 1
    layers = [
        kept_bytes(architecture, layer, regions, element_bytes=computed, is_cut=is_cut) for layer in names
    ]
    kept, again = tokens * sum(layer.kept for layer in layers), tokens * max(layer.again for layer in layers)
    is_away = config.parallel.offload == "activations"
    if is_away:
        # Backward brings back what it needs of a block, all of it at worst.
        again = tokens * max(max(layer.kept, layer.again) for layer in layers)
    # The loss holds some rows of logits at a time, and the gradient of the whole head in float32.
    rows = min(512, tokens) * architecture.model.vocab_size
    head = architecture.model.vocab_size * architecture.model.width
    return Memory(
        weights=kept * owned,
        gradients=kept * owned,
        optimizer=2 * kept * owned,
        gathered=gathered,
        activations=0 if is_away else kept,
        recomputed=again,
        logits=3 * max(4, computed) * rows + max(4, computed) * head,
        host=kept if is_away else 0,
    )
