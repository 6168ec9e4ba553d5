"""Routed experts in Triton: choices sorted by expert, grouped products, sums over a token's rows.

Backward needs x, the weights and the first projection's result; active rows are computed again. No sum
depends on the order in which programs run.

Letters: N tokens, D width, E experts, k experts per token, R = N k choices, F expert hidden, H columns before
the activation: 2 F for gated forms, else F.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# A kernel's launch looks to pyright like a call of the Python function.

from typing import Any, NamedTuple, cast

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from kernels.activation import is_gated
from kernels.experts.reference import PLAIN, ExpertBiases, ExpertForm
from kernels.experts.triton_activation import gate_limit_of
from kernels.experts.triton_products import (
    experts_down,
    experts_down_grad,
    experts_outer,
    experts_up,
    experts_up_grad,
)
from kernels.experts.triton_sort import BLOCK, Sorted, sort_by_expert
from kernels.experts.triton_sums import experts_bias_grad, experts_collect, experts_weight_grad


class Tiles(NamedTuple):
    """Tiles of products over rows: rows by columns, inner dims of a step, warps and stages.

    sort: choices that a program sorts.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    sort: int = BLOCK


def tiles_for(choices: int, experts: int, dtype: torch.dtype) -> Tiles:
    """Tiles that experts of the mean number of rows fill."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    return Tiles(128, 256, 64, 8, 3) if choices >= 256 * experts else Tiles(64, 256, 64, 4, 3)


class Sizes(NamedTuple):
    """Sizes of one call."""

    tokens: int
    width: int
    experts: int
    top_k: int
    hidden: int
    depth: int

    @property
    def choices(self) -> int:
        """Rows, those of idle experts too."""
        return self.tokens * self.top_k


class RoutedExperts(torch.autograd.Function):
    """x [N D], gate_up [E H D], down [E D F], weights [N k], biases [E H] and [E D] or None -> [N D]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        chosen: Tensor,
        form: ExpertForm,
        tiles: Tiles,
    ) -> Tensor:
        """Two products and a sum."""
        (tokens, width), (experts, depth), hidden = x.shape, gate_up.shape[:2], down.shape[2]
        sizes = Sizes(tokens, width, experts, chosen.shape[1], hidden, depth)
        order = sort_by_expert(chosen.flatten(), experts, tiles.rows, block=tiles.sort)
        pre = x.new_empty(sizes.choices, depth)
        active, rows = x.new_empty(sizes.choices, hidden), x.new_empty(sizes.choices, width)
        _run_up(x, gate_up, up_bias, weights, order, pre, active, sizes, form, tiles)
        _run_down(active, down, down_bias, weights, order, rows, sizes, form, tiles)
        ctx.save_for_backward(x, gate_up, down, weights, up_bias, down_bias, chosen, pre, *order)
        ctx.sizes, ctx.form, ctx.tiles = sizes, form, tiles
        return _collect(rows, order, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Four products and their sums."""
        x, gate_up, down, weights, up_bias, down_bias, chosen, pre, *rest = ctx.saved_tensors
        order, grad = Sorted(*rest), grads[0].contiguous()
        sizes, form, tiles = ctx.sizes, ctx.form, ctx.tiles
        active, grad_pre = x.new_empty(sizes.choices, sizes.hidden), torch.empty_like(pre)
        share = _run_down_grad(grad, down, weights, order, pre, active, grad_pre, sizes, form, tiles)
        # A weight on the input stands at x, one on the output already in the active rows.
        by_input = form.scales_input
        shared = (weights, order, sizes, tiles)
        grad_down = _outer(grad, active, down, *shared, gathers=(True, False), scales=False)
        grad_up = _outer(grad_pre, x, gate_up, *shared, gathers=(False, True), scales=by_input)
        rows = x.new_empty(sizes.choices, sizes.width)
        share = _run_up_grad(grad_pre, gate_up, x, weights, order, rows, share, sizes, form, tiles)
        bias = None if by_input else down_bias
        grad_weights = _weight_grad(share, grad, bias, chosen, weights, order, sizes)
        grad_biases: list[Tensor | None] = [None, None]
        if up_bias is not None and down_bias is not None:
            shared = (weights, order, sizes)
            grad_biases[0] = _bias_grad(grad_pre, up_bias, *shared, gathers=False, scales=False)
            grad_biases[1] = _bias_grad(grad, down_bias, *shared, gathers=True, scales=not by_input)
        return _collect(rows, order, sizes), grad_up, grad_down, grad_weights, *grad_biases, None, None, None


def _row_grid(columns: int, block: int, sizes: Sizes, tiles: Tiles) -> tuple[int, dict[str, Any]]:
    """Column tiles, and the options of a product over rows."""
    per_expert = triton.cdiv(sizes.choices, tiles.rows * sizes.experts)
    group = min(16, triton.next_power_of_2(max(1, per_expert)))
    return triton.cdiv(columns, block), {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "INNER": tiles.inner,
        "GROUP": group,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _limits(form: ExpertForm, dtype: torch.dtype) -> tuple[bool, tuple[float, ...], tuple[float, ...]]:
    """Whether there is a limit; that of gates and of ups, each with the numbers of the dtype next to it."""
    is_free = form.kind == "relu2" or (form.kind == "shifted_swiglu" and form.clamps_product)
    if form.limit is None or is_free:
        return False, (0.0,) * 3, (0.0,) * 3
    found = []
    for limit in (gate_limit_of(form.kind, form.limit, form.clamps_product), form.limit):
        exact = torch.tensor(limit, dtype=torch.float32)
        near = exact.to(dtype)
        up, down = torch.tensor(float("inf"), dtype=dtype), torch.tensor(0.0, dtype=dtype)
        below = near if near <= exact else torch.nextafter(near, down)
        found.append((limit, below.item(), torch.nextafter(below, up).item()))
    gates, ups = found
    return True, gates, ups


def _run_up(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    order: Sorted,
    pre: Tensor,
    active: Tensor,
    sizes: Sizes,
    form: ExpertForm,
    tiles: Tiles,
) -> None:
    block = tiles.columns // 2 if is_gated(form.kind) else tiles.columns
    columns, options = _row_grid(sizes.hidden, block, sizes, tiles)
    has_limit, gates, ups = _limits(form, x.dtype)
    experts_up[(order.tile_expert.shape[0] * columns,)](
        x, gate_up, bias, weights, _lists(order), pre, active,
        sizes.width, sizes.hidden, columns, gates, ups,
        TOP_K=sizes.top_k, KIND=form.kind, HAS_LIMIT=has_limit, HAS_BIAS=bias is not None,
        SCALES_INPUT=form.scales_input, IS_EVEN=sizes.width % tiles.inner == 0, **options,
    )  # fmt: skip


def _run_down(
    active: Tensor,
    down: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    order: Sorted,
    out: Tensor,
    sizes: Sizes,
    form: ExpertForm,
    tiles: Tiles,
) -> None:
    columns, options = _row_grid(sizes.width, tiles.columns, sizes, tiles)
    experts_down[(order.tile_expert.shape[0] * columns,)](
        active, down, bias, weights, *_lists(order), out, sizes.width, sizes.hidden, columns,
        HAS_BIAS=bias is not None, SCALES_INPUT=form.scales_input,
        IS_EVEN=sizes.hidden % tiles.inner == 0, **options,
    )  # fmt: skip


def _run_down_grad(
    grad: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Sorted,
    pre: Tensor,
    active: Tensor,
    grad_pre: Tensor,
    sizes: Sizes,
    form: ExpertForm,
    tiles: Tiles,
) -> Tensor:
    """The parts of the weights' gradients, by column tile and row."""
    # Half as wide as other products, so that two programs share a core: one multiplies while the other
    # moves its many rows to and from memory.
    tiles = tiles._replace(columns=tiles.columns // 2)
    columns, options = _row_grid(sizes.hidden, tiles.columns, sizes, tiles)
    if tiles.warps == 8:
        options["maxnreg"] = 128
    share = torch.empty(columns, sizes.choices, dtype=torch.float32, device=grad.device)
    has_limit, gates, ups = _limits(form, grad.dtype)
    experts_down_grad[(order.tile_expert.shape[0] * columns,)](
        grad, down, weights, _lists(order), pre, active, grad_pre, share,
        sizes.width, sizes.hidden, columns, sizes.choices, gates[0], ups[0],
        TOP_K=sizes.top_k, KIND=form.kind, HAS_LIMIT=has_limit, SCALES_INPUT=form.scales_input,
        IS_EVEN=sizes.width % tiles.inner == 0, IS_EVEN_HIDDEN=sizes.hidden % tiles.columns == 0, **options,
    )  # fmt: skip
    return share


def _run_up_grad(
    grad_pre: Tensor,
    gate_up: Tensor,
    x: Tensor,
    weights: Tensor,
    order: Sorted,
    out: Tensor,
    share: Tensor,
    sizes: Sizes,
    form: ExpertForm,
    tiles: Tiles,
) -> Tensor:
    """The parts of the weights' gradients: those given, or where weights scale the input its own."""
    columns, options = _row_grid(sizes.width, tiles.columns, sizes, tiles)
    if form.scales_input:
        share = torch.empty(columns, sizes.choices, dtype=torch.float32, device=x.device)
    experts_up_grad[(order.tile_expert.shape[0] * columns,)](
        grad_pre, gate_up, x, weights, *_lists(order), out, share,
        sizes.width, sizes.depth, columns, sizes.choices,
        TOP_K=sizes.top_k, SCALES_INPUT=form.scales_input, IS_EVEN=sizes.depth % tiles.inner == 0,
        IS_EVEN_WIDTH=sizes.width % tiles.columns == 0, **options,
    )  # fmt: skip
    return share


def _lists(order: Sorted) -> tuple[Tensor, ...]:
    return order.order, order.tile_expert, order.tile_first, order.ends, order.tiles


def _outer(
    left: Tensor,
    right: Tensor,
    matrices: Tensor,
    weights: Tensor,
    order: Sorted,
    sizes: Sizes,
    tiles: Tiles,
    *,
    gathers: tuple[bool, bool],
    scales: bool,
) -> Tensor:
    """Gradient of all experts' matrices; which side is gathered, and whether weights scale the right one."""
    out = torch.empty_like(matrices)
    _, height, width = out.shape
    left_tiles, right_tiles = triton.cdiv(height, tiles.rows), triton.cdiv(width, tiles.columns)
    experts_outer[(sizes.experts * left_tiles * right_tiles,)](
        left, right, weights, order.order, order.ends, out, height, width, left_tiles, right_tiles,
        TOP_K=sizes.top_k, GATHERS_LEFT=gathers[0], GATHERS_RIGHT=gathers[1], SCALES=scales,
        ROWS=tiles.rows, COLUMNS=tiles.columns, INNER=tiles.inner, GROUP=8, num_warps=tiles.warps,
        # Two more for the same depth: a step's choices are loaded ahead of its rows.
        num_stages=tiles.stages + 2,
    )  # fmt: skip
    return out


def _collect(rows: Tensor, order: Sorted, sizes: Sizes) -> Tensor:
    out = rows.new_empty(sizes.tokens, sizes.width)
    block = min(2048, triton.next_power_of_2(sizes.width))
    if sizes.tokens:
        experts_collect[(sizes.tokens, triton.cdiv(sizes.width, block))](
            rows, order.row_of, order.ends, out, sizes.experts, sizes.width, TOP_K=sizes.top_k, COLUMNS=block
        )
    return out


def _weight_grad(
    share: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    chosen: Tensor,
    weights: Tensor,
    order: Sorted,
    sizes: Sizes,
) -> Tensor:
    out = torch.empty_like(weights)
    block = 128 if bias is None else 16
    if sizes.choices:
        experts_weight_grad[(triton.cdiv(sizes.choices, block),)](
            share, grad, bias, chosen, order.row_of, order.ends, out,
            sizes.choices, sizes.experts, sizes.width, share.shape[0],
            TOP_K=sizes.top_k, HAS_BIAS=bias is not None, CHOICES=block, COLUMNS=256,
        )  # fmt: skip
    return out


def _bias_grad(
    rows: Tensor, bias: Tensor, weights: Tensor, order: Sorted, sizes: Sizes, *, gathers: bool, scales: bool
) -> Tensor:
    out, block = torch.empty_like(bias), 128
    experts_bias_grad[(sizes.experts, triton.cdiv(bias.shape[1], block))](
        rows, weights, order.order, order.ends, out, bias.shape[1],
        TOP_K=sizes.top_k, GATHERS=gathers, SCALES=scales, ROWS=32, COLUMNS=block,
    )  # fmt: skip
    return out


def routed_experts_triton(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E H D"],
    down: Float[Tensor, "E D F"],
    chosen: Int[Tensor, "N k"],
    weights: Float[Tensor, "N k"],
    form: ExpertForm = PLAIN,
    biases: ExpertBiases | None = None,
    *,
    tiles: Tiles | None = None,
) -> Float[Tensor, "N D"]:
    """`kernels.experts.routed_experts` in Triton; it needs no number of idle ids."""
    tiles = tiles or tiles_for(chosen.numel(), gate_up.shape[0], x.dtype)
    up, down_bias = (None, None) if biases is None else (x.contiguous() for x in biases)
    inputs = [part.contiguous() for part in (x, gate_up, down, weights)]
    return cast(Tensor, RoutedExperts.apply(*inputs, up, down_bias, chosen.contiguous(), form, tiles))
