"""Specs of the Triton kernels: inputs, reference and cost, for tests, checks, compilation and benchmarks.

A family of kernels lists its specs in `kernels/<family>/spec.py`.
"""

import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import kernels

Outputs: TypeAlias = tuple[Tensor, ...]


class KernelCost(NamedTuple):
    """The least that one call costs: multiplications and additions on tensor cores, and bytes of memory.

    Bytes are those of inputs and outputs alone, each moved once.
    """

    forward_flops: float
    forward_bytes: float
    backward_flops: float
    backward_bytes: float


class KernelCase(NamedTuple):
    """One call on drawn inputs. Both functions take the inputs by name; floating inputs get gradients.

    reference is plain torch and computes in the dtype of its inputs, so that it is exact when they are
    doubles. Outputs of integers must be equal, and outputs without a gradient are compared without one.
    """

    inputs: dict[str, Tensor]
    triton: Callable[..., Outputs]
    reference: Callable[..., Outputs]


class InputFactory(NamedTuple):
    """Draws inputs of one dtype on one device.

    With `uses_small_tiles` kernels take small tiles, so that few tokens fill several.
    """

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator
    uses_small_tiles: bool

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers; drawn on the CPU, so that every device gets the same."""
        return self._on_device(lambda: torch.randn(*shape, generator=self.generator) * scale, shape, dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers, in float32 at least."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        draw = lambda: torch.rand(*shape, generator=self.generator) * (high - low) + low  # noqa: E731
        return self._on_device(draw, shape, dtype)

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from low up to below high; of a floating dtype, products of them are exact."""
        return self._on_device(
            lambda: torch.randint(low, high, shape, generator=self.generator), shape, dtype
        )

    def documents(self, rows: int, tokens: int, mean: float = 12.0) -> tuple[Tensor, Tensor]:
        """Numbers of packed documents of random lengths, and the position of each token in its own."""
        shape = (rows, tokens)
        start = self._on_device(
            lambda: torch.rand(*shape, generator=self.generator) < 1 / mean, shape, torch.bool
        )
        index = torch.arange(tokens, device=self.device).expand(shape)
        start = start | (index == 0)
        return start.long().cumsum(1) - 1, index - torch.where(start, index, 0).cummax(1).values

    def _on_device(
        self, draw: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype | None
    ) -> Tensor:
        dtype = self.dtype if dtype is None else dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return draw().to(self.device, dtype)


class KernelSpec(NamedTuple):
    """How to call a kernel: its case for a shape, and what that costs.

    shapes are small ones, for tests; shape_at gives one with the dims of a model for a number of tokens.
    known_spills: for a kernel, by its name, why it spills registers or makes its products without HGMMA on
    Hopper; by `name@3.9` only where that release of triton compiles it.
    """

    name: str
    shapes: tuple[Any, ...]
    shape_at: Callable[[int], Any]
    draw: Callable[[Any, InputFactory], KernelCase]
    cost: Callable[[Any], KernelCost]
    known_spills: Mapping[str, str] = MappingProxyType({})


def input_factory(
    dtype: torch.dtype, device: torch.device | str = "cpu", *, seed: int = 0, uses_small_tiles: bool = False
) -> InputFactory:
    """A factory with its own generator."""
    return InputFactory(dtype, torch.device(device), torch.Generator().manual_seed(seed), uses_small_tiles)


def kernel_specs(family: str | None = None) -> list[KernelSpec]:
    """Every spec of one family or of all, by name. Imports their kernels, so triton must be there."""
    found = []
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.ispkg or module.name != (family or module.name):
            continue
        if importlib.util.find_spec(f"kernels.{module.name}.spec"):
            found.extend(importlib.import_module(f"kernels.{module.name}.spec").SPECS)
    return sorted(found, key=lambda spec: spec.name)


def outputs_and_grads(
    function: Callable[..., Outputs], inputs: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs by index and gradients of floating inputs by name; each output is weighed by random numbers.

    Inputs are converted to `dtype` first; the weights are the same for every dtype and device.
    """
    leaves = {}
    for name, x in inputs.items():
        leaf = x.detach().to(dtype) if dtype and x.is_floating_point() else x.detach()
        leaves[name] = leaf.requires_grad_(leaf.is_floating_point())
    outputs = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    roots, weights = [], []
    for out in outputs:
        weight = torch.randn(out.shape, generator=generator)
        if out.requires_grad:
            roots.append(out)
            weights.append(_like(weight, out))
    found = {f"out{index}": out.detach() for index, out in enumerate(outputs)}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if roots:
        grads = torch.autograd.grad(roots, list(wanted.values()), weights, allow_unused=True)
        found |= {f"grad {name}": x for name, x in zip(wanted, grads, strict=True) if x is not None}
    return found


def _like(weight: Tensor, out: Tensor) -> Tensor:
    # Exact in bfloat16, so that every dtype is asked for the same gradients.
    weight = weight.to(torch.bfloat16)
    return torch.empty_like(out) if out.device.type == "meta" else weight.to(out.device, out.dtype)


def relative_errors(case: KernelCase) -> dict[str, float]:
    """Errors of the kernel to the reference in float64, by output and gradient; see `relative_error`."""
    found = outputs_and_grads(case.triton, case.inputs)
    return {name: relative_error(found.get(name), true) for name, true in exact_results(case).items()}


def exact_results(case: KernelCase) -> dict[str, Tensor]:
    """Outputs and gradients of the reference in float64."""
    return outputs_and_grads(case.reference, case.inputs, torch.float64)


def relative_error(found: Tensor | None, true: Tensor) -> float:
    """Norm of the difference over the norm of `true`; of integers the share of unequal ones.

    Infinite where one is not finite and the other is not the same, or where `found` is missing or misshaped.
    """
    if found is None or found.shape != true.shape:
        return math.inf
    found = found.to(true.device)
    if not true.is_floating_point():
        return (found != true).double().mean().item() if true.numel() else 0.0
    found = found.double()
    is_odd = ~torch.isfinite(true) | ~torch.isfinite(found)
    if is_odd.any():
        if not torch.equal(found[is_odd], true[is_odd]):
            return math.inf
        found, true = found.masked_fill(is_odd, 0.0), true.masked_fill(is_odd, 0.0)
    length = true.norm().item()
    gap = (found - true).norm().item()
    return gap / length if length else gap
