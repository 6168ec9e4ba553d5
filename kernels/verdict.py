"""Triton kernels against float64 on this machine: the worst error of each, its limit and its time.

On a GPU each kernel runs with the dims of a model: forward and backward in bfloat16 beside the same in plain
torch, and its time beside the least that the device allows. Elsewhere Triton interprets small shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from kernels.spec import (
    KernelCase,
    KernelSpec,
    exact_results,
    input_factory,
    kernel_specs,
    outputs_and_grads,
    relative_error,
    relative_errors,
)

# Tokens of a check on a GPU, and of its timing.
CHECKED, TIMED = 256, 8192
# Relative errors that are always right in the interpreter, and what bfloat16 may reach at most on a GPU.
EXACT = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
ROUNDED = 5e-2


class Verdict(NamedTuple):
    """The worst output or gradient of a kernel: its relative error, and the limit that it must keep."""

    spec: str
    dtype: torch.dtype
    name: str
    error: float
    limit: float

    @property
    def is_right(self) -> bool:
        """Whether the kernel may be used."""
        return self.error <= self.limit


def check_on_gpu(spec: KernelSpec, device: torch.device) -> Verdict:
    """The kernel in bfloat16 with the dims of a model, beside plain torch in bfloat16.

    Errors are those to the reference in float64; a kernel may have twice that of plain torch.
    """
    case = spec.draw(spec.shape_at(CHECKED), input_factory(torch.bfloat16, device))
    exact, found = exact_results(case), outputs_and_grads(case.triton, case.inputs)
    plain = outputs_and_grads(case.reference, case.inputs)
    worst = Verdict(spec.name, torch.bfloat16, "", 0.0, EXACT[torch.bfloat16])
    for name, true in exact.items():
        by_torch = relative_error(plain.get(name), true)
        limit = max(EXACT[torch.bfloat16], min(2 * by_torch, ROUNDED))
        verdict = Verdict(spec.name, torch.bfloat16, name, relative_error(found.get(name), true), limit)
        # Not `max`: an error that is no number is the worst.
        if not verdict.error / verdict.limit <= worst.error / worst.limit:
            worst = verdict
    return worst


def check_interpreted(spec: KernelSpec) -> Iterator[Verdict]:
    """The first two shapes of the kernel in the interpreter, in float32 and bfloat16."""
    for dtype, limit in EXACT.items():
        for shape in spec.shapes[:2]:
            case = spec.draw(shape, input_factory(dtype, uses_small_tiles=True))
            yield worst_of(case, spec.name, dtype, limit)


def worst_of(case: KernelCase, spec: str, dtype: torch.dtype, limit: float) -> Verdict:
    """The output or gradient that is farthest from the reference."""
    errors = relative_errors(case)
    name = max(errors, key=lambda name: errors[name])
    return Verdict(spec, dtype, name, errors[name], limit)


def wrong_kernels(families: Sequence[str], device: torch.device) -> list[Verdict]:
    """What a run does at its start: the verdicts on kernels of these families that are wrong on this GPU."""
    found = []
    for family in families:
        found += [check_on_gpu(spec, device) for spec in kernel_specs(family)]
    return [verdict for verdict in found if not verdict.is_right]


def in_interpreter(wanted: Sequence[KernelSpec]) -> int:
    """Checks small shapes and prints a line for each kernel."""
    from kernels.interpreter import corrected

    wrong = 0
    with corrected():
        for spec in wanted:
            for verdict in check_interpreted(spec):
                wrong += not verdict.is_right
                print(line(verdict), flush=True)
    print(f"{wrong} wrong" if wrong else "every kernel is right")
    return min(1, wrong)


def on_gpu(wanted: Sequence[KernelSpec]) -> int:
    """Checks and times each kernel and prints a line for it."""
    from kernels.limits import measured_limits, seconds, share

    device = torch.device("cuda")
    limits = measured_limits(device)
    print(
        f"{torch.cuda.get_device_name()}: {limits.flops / 1e12:.0f} TFLOP/s, {limits.bytes / 1e12:.2f} TB/s"
    )
    wrong = 0
    for spec in wanted:
        verdict = check_on_gpu(spec, device)
        wrong += not verdict.is_right
        shape = spec.shape_at(TIMED)
        forward, backward = times(spec.draw(shape, input_factory(torch.bfloat16, device)), seconds)
        of_forward, of_backward = share(spec.cost(shape), limits, forward, backward)
        print(line(verdict) + f"  forward {forward * 1e3:8.3f} ms {of_forward:5.0%} of the limit", end="")
        print(
            "" if backward is None else f"  backward {backward * 1e3:8.3f} ms {of_backward:5.0%}", flush=True
        )
    print(f"{wrong} wrong" if wrong else "every kernel is right")
    return min(1, wrong)


def times(case: KernelCase, seconds: Callable[..., float]) -> tuple[float, float | None]:
    """Seconds of forward, and of backward where there is one."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in case.inputs.items()}
    forward = seconds(lambda: case.triton(**leaves))
    outputs = [out for out in case.triton(**leaves) if out.requires_grad]
    if not outputs:
        return forward, None
    weights = [torch.randn_like(out) for out in outputs]
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    options = {"retain_graph": True, "allow_unused": True}
    return forward, seconds(lambda: torch.autograd.grad(outputs, wanted, weights, **options))


def line(verdict: Verdict) -> str:
    """One line on one verdict."""
    dtype = str(verdict.dtype).removeprefix("torch.")
    word = "ok   " if verdict.is_right else "WRONG"
    worst = f"{verdict.error:.1e} of {verdict.limit:.1e} in {verdict.name}"
    return f"{word} {verdict.spec:28s} {dtype:9s} {worst:40s}"
