"""What the layers of a model cost in time, counted from its config and the context length alone."""

from collections.abc import Sequence
from typing import NamedTuple

from model.config import Architecture
from model.count import LayerCount, count
from model.layout import NONE

# What an H100 computes while it moves one byte: 0.7 of 989e12 operations to 0.88 of 3.35e12 bytes a second.
OPERATIONS_PER_BYTE = 235.0


class Cost(NamedTuple):
    """Time per token in floating-point operations: forward, then backward for inputs and for weights."""

    forward: float
    input: float
    weight: float

    @property
    def total(self) -> float:
        """A whole training step."""
        return sum(self)


def sum_costs(costs: Sequence[Cost]) -> Cost:
    """What they take one after the other."""
    return Cost(*(sum(part) for part in zip(*costs, strict=True)))


def layer_costs(config: Architecture, context: int) -> list[Cost]:
    """The cost of each layer at `context` tokens, ends of the model included.

    A product with weights costs as much for its inputs and for its weights as forward. The mixing itself has
    no weights: backward of attention is 2.5 times forward, as it computes its scores again, of a state 2.
    """
    counts, shape = count(config), config.model
    kinds = {layer: _layer_cost(config, layer, context) for layer in set(counts.layers)}
    costs = [kinds[layer] for layer in counts.layers]
    # Two bytes per element are read and written; backward adds two-byte gradients to four-byte sums.
    moved = OPERATIONS_PER_BYTE * shape.width
    costs[0] = sum_costs([costs[0], Cost(4 * moved, 0.0, 10 * moved)])
    head = 2.0 * shape.width * shape.vocab_size
    ends = [_layer_cost(config, layer, context) for layer in counts.mtp_modules]
    ends += [Cost(head, head, head)] * (1 + len(ends))
    costs[-1] = sum_costs([costs[-1], *ends])
    return costs


def _layer_cost(config: Architecture, layer: LayerCount, context: int) -> Cost:
    linear = 2.0 * (layer.ffn_params + layer.active + layer.norm_params)
    if layer.mixer == NONE:
        return Cost(linear, linear, linear)
    mixer = config.mixer[layer.mixer]
    flops = mixer.flops(config.model.width, context)
    linear += flops.projections
    again = 2.5 if mixer.context_exchange == "gather" else 2.0
    return Cost(linear + flops.core, linear + again * flops.core, linear)


def stage_costs(config: Architecture, stages: Sequence[range], context: int) -> list[Cost]:
    """The cost of each stage per token."""
    layers = layer_costs(config, context)
    costs = [sum_costs([layers[layer] for layer in stage]) for stage in stages]
    if config.model.mtp.depth:
        # A stage with MTP modules does all of backward at once.
        costs[-1] = Cost(costs[-1].forward, costs[-1].input + costs[-1].weight, 0.0)
    return costs
