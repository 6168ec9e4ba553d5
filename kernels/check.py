"""`python -m kernels.check [FAMILY ...]`: every Triton kernel against float64 on this machine, and its speed.

On a GPU each kernel runs with the dims of a model: forward and backward in bfloat16 beside the same in plain
torch, and its time beside the least that the device allows. Elsewhere Triton interprets small cases; that
shows whether results are right, and nothing about speed. Exits with 1 if a kernel is wrong.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from kernels.choose import FAMILIES, has_triton, is_interpreted
from kernels.trial import Subject, Trial, distance, outputs_and_grads, setting, subjects, truth_of

# Tokens of a check on a GPU, and of its timing.
CHECKED, TIMED = 256, 8192
# Relative errors that are always right in the interpreter, and what bfloat16 may reach at most on a GPU.
EXACT = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
ROUNDED = 5e-2


class Verdict(NamedTuple):
    """The worst output or gradient of a kernel: its relative error, and the limit that it must keep."""

    subject: str
    dtype: torch.dtype
    name: str
    error: float
    limit: float

    @property
    def is_right(self) -> bool:
        """Whether the kernel may be used."""
        return self.error <= self.limit


def check_on_gpu(subject: Subject, device: torch.device) -> Verdict:
    """The kernel in bfloat16 with the dims of a model, beside plain torch in bfloat16.

    Errors are those to the truth in float64; a kernel may have twice that of plain torch.
    """
    drawn = setting(torch.bfloat16, device)
    trial = subject.draw(subject.at(CHECKED), drawn)
    truth, found = truth_of(trial), outputs_and_grads(trial.triton, trial.inputs)
    plain = outputs_and_grads(trial.truth, trial.inputs)
    worst = Verdict(subject.name, torch.bfloat16, "", 0.0, EXACT[torch.bfloat16])
    for name, true in truth.items():
        by_torch = distance(plain.get(name), true)
        limit = max(EXACT[torch.bfloat16], min(2 * by_torch, ROUNDED))
        verdict = Verdict(subject.name, torch.bfloat16, name, distance(found.get(name), true), limit)
        # Not `max`: an error that is no number is the worst.
        if not verdict.error / verdict.limit <= worst.error / worst.limit:
            worst = verdict
    return worst


def check_interpreted(subject: Subject) -> Iterator[Verdict]:
    """The first two cases of the kernel in the interpreter, in float32 and bfloat16."""
    for dtype, limit in EXACT.items():
        for case in subject.cases[:2]:
            trial = subject.draw(case, setting(dtype, is_small=True))
            yield worst_of(trial, subject.name, dtype, limit)


def worst_of(trial: Trial, subject: str, dtype: torch.dtype, limit: float) -> Verdict:
    """The output or gradient that is farthest from the truth."""
    found = outputs_and_grads(trial.triton, trial.inputs)
    errors = {name: distance(found.get(name), true) for name, true in truth_of(trial).items()}
    name = max(errors, key=lambda name: errors[name])
    return Verdict(subject, dtype, name, errors[name], limit)


def wrong_kernels(families: Sequence[str], device: torch.device) -> list[Verdict]:
    """What a run does at its start: the verdicts on kernels of these families that are wrong on this GPU."""
    found = []
    for family in families:
        found += [check_on_gpu(subject, device) for subject in subjects(family)]
    return [verdict for verdict in found if not verdict.is_right]


def main(arguments: Sequence[str]) -> int:
    """Prints a line per kernel; 1 if one is wrong, 64 for an unknown family."""
    unknown = sorted(set(arguments) - set(FAMILIES))
    if unknown:
        print(f"no such family: {', '.join(unknown)}; there are {', '.join(FAMILIES)}", file=sys.stderr)
        return 64
    if not has_triton():
        print("triton is not installed: all kernels run in plain torch", file=sys.stderr)
        return 1
    is_gpu = torch.cuda.is_available()
    if not is_gpu and not is_interpreted():
        print("no GPU on this machine: small cases in Triton's interpreter, which says nothing about speed")
        command = [sys.executable, "-m", "kernels.check", *arguments]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    wanted = [subject for family in arguments or FAMILIES for subject in subjects(family)]
    return on_gpu(wanted) if is_gpu else in_interpreter(wanted)


def in_interpreter(wanted: Sequence[Subject]) -> int:
    """Checks small cases and prints a line for each subject."""
    from kernels.interpreter import corrected

    wrong = 0
    with corrected():
        for subject in wanted:
            for verdict in check_interpreted(subject):
                wrong += not verdict.is_right
                print(line(verdict), flush=True)
    print(f"{wrong} wrong" if wrong else "every kernel is right")
    return min(1, wrong)


def on_gpu(wanted: Sequence[Subject]) -> int:
    """Checks and times each subject and prints a line for it."""
    from kernels.limits import measured_limits, seconds, share

    device = torch.device("cuda")
    limits = measured_limits(device)
    print(
        f"{torch.cuda.get_device_name()}: {limits.flops / 1e12:.0f} TFLOP/s, {limits.bytes / 1e12:.2f} TB/s"
    )
    wrong = 0
    for subject in wanted:
        verdict = check_on_gpu(subject, device)
        wrong += not verdict.is_right
        case = subject.at(TIMED)
        forward, backward = times(subject.draw(case, setting(torch.bfloat16, device)), seconds)
        of_forward, of_backward = share(subject.work(case), limits, forward, backward)
        print(line(verdict) + f"  forward {forward * 1e3:8.3f} ms {of_forward:5.0%} of the limit", end="")
        print(
            "" if backward is None else f"  backward {backward * 1e3:8.3f} ms {of_backward:5.0%}", flush=True
        )
    print(f"{wrong} wrong" if wrong else "every kernel is right")
    return min(1, wrong)


def times(trial: Trial, seconds: Callable[..., float]) -> tuple[float, float | None]:
    """Seconds of forward, and of backward where there is one."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in trial.inputs.items()}
    forward = seconds(lambda: trial.triton(**leaves))
    outputs = [out for out in trial.triton(**leaves) if out.requires_grad]
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
    return f"{word} {verdict.subject:28s} {dtype:9s} {worst:40s}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
