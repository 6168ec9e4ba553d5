"""What kernels give for tensors that are shapes alone (FakeTensorMode): more shapes, and no work.

The plain form of a kernel takes thousands of operations on a long row, each a fraction of a millisecond with
fake tensors; on the meta device the same code runs in microseconds.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

P = ParamSpec("P")
R = TypeVar("R")


class _Form(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def made(self, device: torch.device | str) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def of_shapes(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Fake tensors of the shapes, strides and dtypes that the function gives.

    Those that it would compute from inputs with a gradient have one.
    """
    leaves, spec = tree_flatten((args, kwargs))
    forms = tuple(_form_of(leaf) for leaf in leaves)
    found, out_spec = _results(function, forms, spec, torch.is_grad_enabled())
    wanted = [leaf for leaf in found if isinstance(leaf, _Form)]
    made = iter(_Shapes.apply(wanted, *(leaf for leaf in leaves if isinstance(leaf, Tensor))))
    return tree_unflatten([next(made) if isinstance(leaf, _Form) else leaf for leaf in found], out_spec)


def _form_of(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return _Form(leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad)


@cache
def _results(
    function: Callable[..., Any], leaves: tuple[Any, ...], spec: TreeSpec, has_grad: bool
) -> tuple[list[Any], TreeSpec]:
    """The results on the meta device, tensors as forms. Layers that are alike ask for the same."""
    with _disable_current_modes(), torch.set_grad_enabled(has_grad):
        inputs = [
            leaf.made("meta").requires_grad_(leaf.requires_grad) if isinstance(leaf, _Form) else leaf
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(inputs, spec)
        found, out_spec = tree_flatten(function(*args, **kwargs))
    return [_form_of(leaf) for leaf in found], out_spec


class _Shapes(torch.autograd.Function):
    """wanted, inputs -> tensors of the forms wanted, on the inputs' device; gradients like the inputs."""

    @staticmethod
    def forward(ctx: Any, wanted: list[_Form], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        made = [form.made(inputs[0].device) for form in wanted]
        constant = [out for out, form in zip(made, wanted, strict=True) if not form.requires_grad]
        ctx.mark_non_differentiable(*constant)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(x) if is_needed else None for x, is_needed in needed)
