"""Kernels under FakeTensorMode: outputs that are shapes without numbers, from inputs that are.

The reference of a kernel takes thousands of operations on a long row, each a fraction of a millisecond with
fake tensors; on the meta device the same code runs in microseconds.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

P = ParamSpec("P")
R = TypeVar("R")


class _TensorMeta(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def made(self, device: torch.device | str) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def fake_outputs(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Fake tensors of the shapes, strides and dtypes that the function gives.

    Those that it would compute from inputs with a gradient have one.
    """
    leaves, spec = tree_flatten((args, kwargs))
    metas = tuple(_meta_of(leaf) for leaf in leaves)
    found, out_spec = _results(function, metas, spec, torch.is_grad_enabled())
    wanted = [leaf for leaf in found if isinstance(leaf, _TensorMeta)]
    made = iter(_FakeOutputs.apply(wanted, *(leaf for leaf in leaves if isinstance(leaf, Tensor))))
    return tree_unflatten([next(made) if isinstance(leaf, _TensorMeta) else leaf for leaf in found], out_spec)


def _meta_of(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return _TensorMeta(leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad)


@cache
def _results(
    function: Callable[..., Any], leaves: tuple[Any, ...], spec: TreeSpec, has_grad: bool
) -> tuple[list[Any], TreeSpec]:
    """The results on the meta device, tensors as their metadata. Layers that are alike ask for the same."""
    # Whoever counts what is saved for backward is not to count this run, which is made once for all calls.
    unseen = saved_tensors_hooks(lambda x: x, lambda x: x)
    with _disable_current_modes(), torch.set_grad_enabled(has_grad), unseen:
        inputs = [
            leaf.made("meta").requires_grad_(leaf.requires_grad) if isinstance(leaf, _TensorMeta) else leaf
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(inputs, spec)
        found, out_spec = tree_flatten(function(*args, **kwargs))
    return [_meta_of(leaf) for leaf in found], out_spec


class _FakeOutputs(torch.autograd.Function):
    """wanted, inputs -> fake tensors as wanted, on the inputs' device; gradients like the inputs."""

    @staticmethod
    def forward(ctx: Any, wanted: list[_TensorMeta], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        made = [meta.made(inputs[0].device) for meta in wanted]
        constant = [out for out, meta in zip(made, wanted, strict=True) if not meta.requires_grad]
        ctx.mark_non_differentiable(*constant)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(x) if is_needed else None for x, is_needed in needed)
