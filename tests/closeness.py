"""How far tensors are apart, and gradients to compare."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relative(ours: Tensor, reference: Tensor) -> float:
    """Euclidean distance over the length of the reference; 0 for two zeros."""
    distance = (ours.double() - reference.double()).norm().item()
    length = reference.double().norm().item()
    return distance / length if length else distance


def outputs_and_grads(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs of `function(*inputs)`, then the gradient of each floating input.

    Every output is weighed by fixed random numbers, so that no gradient cancels.
    """
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    total = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor), f"{type(total)=}"
    floating = [leaf for leaf in leaves if leaf.requires_grad]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(total, floating)]


def assert_close(ours: Sequence[Tensor], reference: Sequence[Tensor], limit: float) -> None:
    """Each pair within `limit` of each other, relative to the reference."""
    for index, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.shape == b.shape, f"{index}: {a.shape} {b.shape}"
        assert torch.isfinite(a).all(), f"tensor {index} is not finite"
        assert relative(a, b) <= limit, f"tensor {index}: {relative(a, b):.3g} > {limit:g}"
