"""How far tensors are apart, how far rounding may take them, and gradients to compare.

Two computations in float32 are never compared with each other: how far they are apart is the rounding of
one processor. Equations are compared in float64, where rounding is many digits below every limit
(`in_float64` has other people's code compute in it as well), and what is computed in float32 is compared with
its own truth in float64, from which it may be as far as rounding takes it (`assert_rounded`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from kernels.spec import KernelCase, exact_results, relative_errors
from kernels.spec import outputs_and_grads as case_outputs

# What float64 leaves of the same equations in another order; rounding alone is some 1e-15.
SAME = 1e-10
# Of the longest gradient: a shorter one may be zero by algebra, so that rounding is all of it.
CANCELS = 1e-4
# A stable computation gives what exact arithmetic gives for inputs a few roundings away (Higham, Accuracy and
# Stability of Numerical Algorithms, section 1.5). Inputs are moved by an eps, twice the largest rounding; n
# independent roundings in a row add up to about sqrt(n / 3) of the largest: FACTOR eps are those of 768.
FACTOR, DRAWS = 8.0, 3
# Many gradients are differences of larger terms, and where these cancel, rounding is all that is left. The
# terms are no tensors of their own: a tenth of the longest tensor stands for them.
TERMS = 0.1


def distance(ours: Tensor, reference: Tensor) -> float:
    """Euclidean; infinite where one is not finite and the other not the same."""
    ours, reference = ours.double(), reference.double()
    is_odd = ~(torch.isfinite(ours) & torch.isfinite(reference))
    if is_odd.any():
        if not torch.equal(ours[is_odd], reference[is_odd]):
            return float("inf")
        ours, reference = ours.masked_fill(is_odd, 0.0), reference.masked_fill(is_odd, 0.0)
    return (ours - reference).norm().item()


def length(x: Tensor) -> float:
    """Euclidean, of what is finite."""
    return x.double().nan_to_num(0.0, 0.0, 0.0).norm().item()


def relative(ours: Tensor, reference: Tensor) -> float:
    """Euclidean distance over the length of the reference; 0 for two zeros."""
    return distance(ours, reference) / (length(reference) or 1.0)


def outputs_and_grads(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs of `function(*inputs)`, then the gradient of each floating input.

    Every output is weighed by fixed random numbers, so that no gradient cancels.
    """
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floating = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(weighed(*outputs), floating, materialize_grads=True)
    return [*(out.detach() for out in outputs), *grads]


def with_grads(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., list[Tensor]]:
    """What gives the outputs of the function and the gradients of its inputs."""
    return lambda *inputs: outputs_and_grads(function, inputs)


def weighed(*outputs: Tensor) -> Tensor:
    """The sum of all numbers, each times a fixed random one."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    total = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor), f"{type(total)=}"
    return total


def function_of(module: nn.Module, *more: Any) -> Callable[..., Any]:
    """The module as a function of its first argument and then of its parameters, in their order."""
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Any:
        return functional_call(module, dict(zip(names, weights, strict=True)), (x, *more))

    return function


def assert_close(
    ours: Sequence[Tensor],
    reference: Sequence[Tensor],
    limit: float,
    *,
    names: Sequence[str] = (),
    cancels: float = 0.0,
) -> None:
    """Each pair within `limit` of each other, relative to the reference.

    A reference shorter than `cancels` times the longest counts as that long: it may be zero by algebra.
    """
    shortest = cancels * max(map(length, reference), default=0.0)
    for index, (a, b) in enumerate(zip(ours, reference, strict=True)):
        name = names[index] if names else f"tensor {index}"
        assert a.shape == b.shape, f"{name}: {a.shape} {b.shape}"
        assert torch.isfinite(a).all(), f"{name} is not finite"
        apart = distance(a, b) / (max(length(b), shortest) or 1.0)
        assert apart <= limit, f"{name}: {apart:.3g} > {limit:g}"


def assert_rounded(
    found: Sequence[Tensor],
    truth: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] = (),
) -> None:
    """Each of `found`, computed in `dtype`, is `truth(*inputs)` in float64 up to rounding; see `rounding`."""
    assert_within(found, *rounding(truth, inputs, dtype), names=names)


def assert_within(
    found: Sequence[Tensor], true: Sequence[Tensor], limits: Sequence[float], *, names: Sequence[str] = ()
) -> None:
    """Each of `found` is at most its limit away from the truth."""
    for index, (a, b, limit) in enumerate(zip(found, true, limits, strict=True)):
        name = names[index] if names else f"tensor {index}"
        assert a.shape == b.shape, f"{name}: {a.shape} {b.shape}"
        apart = distance(a, b)
        assert apart <= limit, f"{name}: {apart:.3g} > {limit:.3g}, of a length of {length(b):.3g}"


def assert_true(
    found: Sequence[Tensor], truth: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], limit: float
) -> None:
    """Each of `found` is `truth(*inputs)`: within `limit` where it is float64, elsewhere up to rounding."""
    if found[0].dtype == torch.float64:
        assert_close(found, truth(*inputs), limit)
    else:
        assert_rounded(found, truth, inputs, dtype=found[0].dtype)


def assert_case(case: KernelCase, found: Mapping[str, Tensor] | None = None) -> None:
    """The kernel in float32, or what was found with it, is its reference up to rounding."""
    names = list(exact_results(case))
    found = case_outputs(case.triton, case.inputs) if found is None else found

    def truth(*inputs: Tensor) -> list[Tensor]:
        true = case_outputs(case.reference, dict(zip(case.inputs, inputs, strict=True)))
        return [true[name] for name in names]

    assert_rounded([found[name] for name in names], truth, list(case.inputs.values()), names=names)


def assert_kernel(case: KernelCase, limit: float = 1e-5) -> None:
    """The kernel is within `limit` of its reference in float64, each result relative to its length.

    In float32 a result may be farther off where rounding takes it there, as `rounding` says.
    """
    found = relative_errors(case)
    assert len(found) > 0
    if not all(error <= limit for error in found.values()):
        is_float32 = all(x.dtype == torch.float32 for x in case.inputs.values() if x.is_floating_point())
        assert is_float32, found
        assert_case(case)


def rounding(
    truth: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[float]]:
    """`truth(*inputs)` in float64, and how far rounding to `dtype` may take each of its tensors."""
    eps = torch.finfo(dtype).eps
    exact = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    true = [x.detach() for x in truth(*exact)]
    return true, limits_of(true, (truth(*moved_by(exact, eps, draw)) for draw in range(DRAWS)), dtype)


def limits_of(true: Sequence[Tensor], moved: Iterable[Sequence[Tensor]], dtype: torch.dtype) -> list[float]:
    """How far rounding to `dtype` may take each tensor of a truth, given what moved inputs give.

    FACTOR times how far it goes when every number of the inputs goes up or down by an eps, the farthest of
    DRAWS, and an eps of itself, or of the terms that it may be the difference of.
    """
    farthest = [0.0] * len(true)
    for tensors in moved:
        farthest = [max(far, distance(a, b)) for far, a, b in zip(farthest, tensors, true, strict=True)]
    eps, lengths = torch.finfo(dtype).eps, [length(x) for x in true]
    terms = TERMS * max(lengths, default=0.0)
    return [FACTOR * (far + eps * max(own, terms)) for far, own in zip(farthest, lengths, strict=True)]


def moved_by(inputs: Sequence[Tensor], eps: float, draw: int) -> list[Tensor]:
    """The inputs with every floating number up or down by eps of itself, at random."""
    generator = torch.Generator().manual_seed(draw)
    signs = [2 * torch.randint(2, x.shape, generator=generator) - 1 for x in inputs]
    return [
        x * (1 + eps * sign) if x.is_floating_point() else x for x, sign in zip(inputs, signs, strict=True)
    ]


# Here float32 says what the bytes are, as a file has them.
_OF_BYTES = {Tensor.view, torch.frombuffer}


class _InFloat64(TorchFunctionMode):
    """Puts float64 where a call of torch names float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _OF_BYTES:
            return func(*args, **(kwargs or {}))
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    """Within it nothing is rounded to float32: what would be is float64. Modules are made within it too."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(default)
