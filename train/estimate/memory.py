"""Memory of the fullest rank, from formulas: what training keeps, by cause."""

from collections.abc import Collection
from typing import NamedTuple

from conf.errors import Violation
from model.config import Architecture
from model.count import count, half_bytes
from model.layout import DENSE, HASH, NONE, Layer
from parallel.config.degrees import Degrees
from parallel.config.regions import FULL, ffn_region
from parallel.config.zero import BUCKET, ZeroConfig
from parallel.pipeline.partition import stage_layers
from parallel.pipeline.schedules import action_order
from train.config.run_config import RunConfig

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


class Memory(NamedTuple):
    """Bytes of one rank, by cause.

    gathered are weights that other ranks keep, and of a pipeline the gradients that are not summed yet.
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


class Held(NamedTuple):
    """Bytes of one rank that depend on how weights are cut and not on tokens."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    host: int


class Kept(NamedTuple):
    """Bytes per token of one layer.

    kept wait for backward. again are those of the largest part that is computed again.
    """

    kept: int
    again: int


def kept_bytes(
    config: Architecture,
    names: Layer,
    regions: Collection[str],
    *,
    element_bytes: int,
    is_cut: bool = False,
    is_dispatched: bool = False,
) -> Kept:
    """What a layer keeps if backward computes `regions` again; the other arguments as in `half_bytes`."""
    spread = {"is_cut": is_cut, "is_dispatched": is_dispatched}
    halves = half_bytes(config, names, element_bytes=element_bytes, **spread)
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


class Share(NamedTuple):
    """What one rank of a pipeline holds: the layers of its stages, and the ends of the model.

    waiting is how many micro-batches of each stage wait for backward when most bytes do.
    """

    stages: tuple[range, ...]
    waiting: tuple[tuple[int, ...], ...]
    is_first: bool
    is_last: bool


def shares_of(config: RunConfig, degrees: Degrees) -> list[Share]:
    """The share of each rank of the pipeline; without one, a rank has all and one micro-batch waits."""
    rows, micro = config.rank_rows(degrees.batch)
    plan = config.parallel.plan(rows // micro)
    depth = config.model.depth
    if plan is None:
        return [Share((range(depth),), ((1,),), is_first=True, is_last=True)]
    layers = stage_layers(config.architecture, plan, config.data.sequence_length, config.parallel.pp_layout)
    shares = []
    for rank, actions in enumerate(action_order(plan)):
        here = plan.stages_of(rank)
        counts, waiting = dict.fromkeys(here, 0), set()
        for action in actions:
            # What a weight's gradient needs waits until that is computed.
            counts[action.stage] += {"forward": 1, "input": 0}.get(action.kind, -1)
            waiting.add(tuple(counts.values()))
        ends = plan.stages - 1 in here
        own = tuple(layers[stage] for stage in here)
        shares.append(Share(own, tuple(sorted(waiting)), is_first=0 in here, is_last=ends))
    return shares


def memory_per_rank(config: RunConfig, world_size: int) -> Memory:
    """Bytes of the fullest rank of `world_size`.

    Weights are kept in the optimizer's precision and sharded, with gradients and optimizer state; a rank's
    part of two blocks, or of more by `prefetch`, and of the tables is gathered in the precision of the
    computation. The few weights that ranks of the tensor axis all hold are counted as if they were cut.
    """
    degrees = config.parallel.degrees(world_size)
    found = [memory_of(config, degrees, share) for share in shares_of(config, degrees)]
    return max(found, key=lambda memory: memory.total)


# Of the memory of a device; the rest is for what the formulas leave out.
FITTING_SHARE = 0.95


def share_of_device(config: RunConfig, needed: int) -> float | None:
    """What the bytes of a rank are of its device's memory; None where that is unknown."""
    available = config.cluster.memory_gib
    return None if available is None else needed / (available * 2**30)


def memory_violations(config: RunConfig) -> list[Violation]:
    """What keeps the fullest rank from fitting into the memory of a device of its cluster."""
    needed = memory_per_rank(config, config.cluster.nodes * config.cluster.gpus_per_node)
    share = share_of_device(config, needed.total)
    if share is None or share <= FITTING_SHARE:
        return []
    largest = sorted(needed._replace(host=0)._asdict().items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
    message = (
        f"the fullest rank needs {needed.total / 2**30:.1f} GiB ({parts}), {share:.0%} of "
        f"{config.cluster.memory_gib:g}; take more ranks, a smaller train.micro_batch or parallel.recompute, "
        "or set it to null to pass over the estimate"
    )
    return [Violation("cluster.memory_gib", message)]


def memory_of(config: RunConfig, degrees: Degrees, share: Share) -> Memory:
    """Bytes of a rank with a share of the layers."""
    architecture = config.architecture
    counts = count(architecture)
    stored, computed = _BYTES[config.precision.parameters], _BYTES[config.precision.compute]
    shards = degrees.dp_shard * degrees.cp * degrees.tp
    mtp = architecture.model.mtp
    # Where a pipeline ends on another rank than it begins on, the embedding may be needed at both.
    has_copy = degrees.pp > 1 and (architecture.model.has_tied_embeddings or mtp.depth > 0)
    tables = counts.embedding * (share.is_first + (has_copy and share.is_last))
    tables += (counts.head + counts.norm) * share.is_last
    layers = [counts.layers[layer] for stage in share.stages for layer in stage]
    total = tables + sum(layer.params for layer in layers) + (counts.total - counts.main) * share.is_last
    owned = -(-total // shards)
    largest = max(
        (layer.params - layer.routed) // degrees.tp + layer.routed // degrees.ep for layer in layers
    )
    # Alone, the weights are used where they are; a narrower copy of each stays until backward.
    blocks = 1 + max(1, config.parallel.prefetch)
    gathered = computed * (blocks * largest + tables // degrees.tp) if shards > 1 else 0
    if shards > 1 and degrees.pp > 1:
        # A stage sums its gradients over ranks once a step, in float32 or wider: between its micro-batches it
        # keeps them, and its weights, as no shard.
        experts = sum(layer.routed for layer in layers)
        gathered = (computed + max(4, computed)) * ((total - experts) // degrees.tp + experts // degrees.ep)
    elif shards == 1 and computed < stored:
        gathered = computed * total
    slots = len(config.optim.slots)
    held = Held(stored * owned, stored * owned, slots * stored * owned, gathered, 0)
    if config.parallel.data == "zero":
        held = held_by_zero(config.parallel.zero, slots, total, shards, tables + 2 * largest, computed)
    away = config.parallel.offload == "activations"
    kept, again = _activations(config, degrees, share)
    rows = min(512, _tokens(config, degrees)) * architecture.model.vocab_size * share.is_last
    head = architecture.model.vocab_size * architecture.model.width * share.is_last
    return Memory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        gathered=held.gathered,
        activations=0 if away else kept,
        recomputed=again,
        logits=3 * max(4, computed) * rows + max(4, computed) * head,
        host=held.host + (kept if away else 0),
    )


def held_by_zero(config: ZeroConfig, slots: int, numbers: int, ranks: int, used: int, computed: int) -> Held:
    """Bytes of a rank under DeepSpeed, for so many numbers of which `used` are used at a time.

    slots: entries of the optimizer's state for each number.

    All float32; of what a rank updates there is a second copy beside the weights of forward. Narrower copies
    of all weights stay until backward in every stage, since the model makes them itself.
    """
    part, bucket = 4 * -(-numbers // ranks), 4 * min(numbers, BUCKET)
    weights = 4 * numbers if config.stage < 3 else part
    gradients = bucket + (4 * numbers if config.stage < 2 else part)
    gathered = (4 * used if config.stage == 3 else 0) + (computed * numbers if computed < 4 else 0)
    held = Held(weights, gradients, (1 + slots) * part, gathered, 0)
    if config.offload != "none":
        held = held._replace(optimizer=0, host=(2 + slots) * part)
        held = held if config.stage < 2 else held._replace(gradients=bucket)
    if config.offload == "parameters":
        held = held._replace(weights=0, host=(3 + slots) * part)
    return held


def _tokens(config: RunConfig, degrees: Degrees) -> int:
    # Of a micro-batch on a rank.
    row = config.data.sequence_length // (degrees.cp * degrees.tp)
    return config.rank_rows(degrees.batch)[1] * row


def _activations(config: RunConfig, degrees: Degrees, share: Share) -> tuple[int, int]:
    """Bytes that wait for backward, and those of the part that is there again at a time."""
    architecture, mtp = config.architecture, config.model.mtp
    names = [[architecture.layers[layer] for layer in stage] for stage in share.stages]
    names[-1] += [Layer(mtp.mixer, mtp.ffn)] * (mtp.depth if share.is_last else 0)
    stages = [
        [
            kept_bytes(
                architecture,
                layer,
                config.parallel.recomputed,
                element_bytes=_BYTES[config.precision.compute],
                is_cut=degrees.cp > 1,
                is_dispatched=degrees.ep > 1,
            )
            for layer in stage
        ]
        for stage in names
    ]
    each = [sum(layer.kept for layer in stage) for stage in stages]
    kept = max(sum(n * size for n, size in zip(counts, each, strict=True)) for counts in share.waiting)
    layers = [layer for stage in stages for layer in stage]
    again = max(layer.again for layer in layers)
    if config.parallel.offload == "activations":
        # Backward brings back what it needs of a block, all of it at worst.
        again = max(max(layer.kept, layer.again) for layer in layers)
    tokens = _tokens(config, degrees)
    return tokens * kept, tokens * again
