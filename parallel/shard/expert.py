"""Expert parallelism: each rank holds some experts of a layer; tokens are sent to them and back."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.language_model import ModelPart
from model.mixer import TPShard
from model.moe.dispatch import Compute, Dispatch, Overlapped
from model.moe.layer import Experts
from parallel.mesh.axes import Axes, Axis
from parallel.mesh.collectives import AsyncAllToAll, exchange, exchanged
from parallel.shard.shard_map import ShardMap, replicated, tp_shard_map


@dataclass(frozen=True)
class AllToAll:
    """Dispatch over an axis whose ranks hold `held` experts each, in order.

    No token is dropped: splits are as uneven as the choices, and may be empty. Each rank sends k rows per
    token and gets them back. The device is waited for once per layer, for the numbers of rows. Rows travel to
    experts, and their gradients back from them, while the shared expert computes.
    """

    axis: Axis
    held: int
    scales_input: bool

    def __call__(
        self,
        x: Float[Tensor, "N D"],
        chosen: Int[Tensor, "N k"],
        weights: Float[Tensor, "N k"],
        run: Compute,
        overlapped: Overlapped,
    ) -> tuple[Float[Tensor, "N D"], Tensor | None]:
        """Weights scale the token before it is sent, or what comes back, as the experts want it."""
        tokens, top_k = chosen.shape
        order, counts = self._sorted(chosen)
        arriving = exchanged(counts, self.axis, [self.held] * self.axis.size, [self.held] * self.axis.size)
        sent, received = self.splits(counts, arriving, chosen.numel())
        order = order[: sum(sent)]
        weight = weights.to(x.dtype).flatten()[order, None]
        rows = x[order // top_k]
        rows = rows * weight if self.scales_input else rows
        transfer = AsyncAllToAll(self.axis, sent, received)
        rows = transfer.start(rows)
        beside = overlapped()
        rows = transfer.wait(rows)
        held = torch.arange(self.held, device=x.device).repeat(self.axis.size)
        experts = held.repeat_interleave(arriving, output_size=sum(received))
        out = run(rows, experts[:, None], rows.new_ones(len(experts), 1))
        out = exchange(out, self.axis, received, sent)
        out = out if self.scales_input else out * weight
        # Back in the slot of each choice, so that the sum over k is in the order of one process.
        slots = out.new_zeros(tokens * top_k, out.shape[1]).index_copy(0, order, out)
        return slots.view(tokens, top_k, -1).sum(1), beside

    def splits(
        self, counts: Int[Tensor, "E"], arriving: Int[Tensor, "E"], rows: int
    ) -> tuple[list[int], list[int]]:
        """How many of this rank's rows go to each rank, and how many come from each."""
        totals = [part.view(self.axis.size, -1).sum(1) for part in (counts, arriving)]
        sent, received = torch.stack(totals).tolist()
        return sent, received

    def _sorted(self, chosen: Int[Tensor, "N k"]) -> tuple[Int[Tensor, "M"], Int[Tensor, "E"]]:
        """Choices by expert, those of no expert last, and how many each expert got."""
        experts = self.held * self.axis.size
        flat = chosen.flatten().clamp(max=experts)
        counts = flat.new_zeros(experts + 1).scatter_add_(0, flat, torch.ones_like(flat))
        return flat.argsort(stable=True), counts[:experts]


# The dispatch of a layer from the axis, the experts that a rank holds, and whether weights scale the input.
Dispatcher: TypeAlias = Callable[[Axis, int, bool], Dispatch]


def apply_ep(model: ModelPart, axes: Axes, dispatcher: Dispatcher = AllToAll) -> dict[str, ShardMap]:
    """Leaves this rank its experts of every layer. Mutates the model; gives their shard maps by name."""
    shard_maps = {}
    axis = axes.ep
    for prefix, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        for name, parameter in list(module.named_parameters()):
            shape = parameter.shape
            if shape[0] % axis.size:
                raise ValueError(f"{prefix}.{name}: {axis.size} ranks do not divide {shape[0]} experts")
            part = torch.Size((shape[0] // axis.size, *shape[1:]))
            if axis.size > 1:
                setattr(module, name, nn.Parameter(parameter.new_empty(part)))
            shard_maps[f"{prefix}.{name}"] = expert_shard_map(shape, axis.rank, axis.size)
        if axis.size > 1:
            module.dispatch = dispatcher(axis, module.gate_up.shape[0], module.form.scales_input)
    return shard_maps


def expert_shard_map(shape: torch.Size, rank: int, degree: int) -> ShardMap:
    """Where the experts of one of `degree` ranks lie in a parameter of all experts."""
    part = torch.Size((shape[0] // degree, *shape[1:]))
    split = TPShard(0)
    found = tp_shard_map(shape, split, split, part, rank, degree) if degree > 1 else replicated(shape)
    return replace(found, is_expert=True)
