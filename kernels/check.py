"""`python -m kernels.check [FAMILY ...]`: every Triton kernel against float64 on this machine, and its speed.

On a GPU each kernel runs with the dims of a model: forward and backward in bfloat16 beside the same in plain
torch, and its time beside the least that the device allows. Elsewhere Triton interprets small shapes; that
shows whether results are right, and nothing about speed. Exits with 1 if a kernel is wrong.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from conf.help import Page, run
from kernels.families import FAMILIES, refuse_unknown

PAGE = Page(
    __doc__ or "",
    (
        "python -m kernels.check",
        "python -m kernels.check attention experts",
        "python -m kernels.check --help=kernels",
    ),
    {"FAMILY": "kernels of one family, as --help=kernels names them; without any, all"},
    sections=lambda: ("kernels",),
)


def main(arguments: Sequence[str]) -> int:
    """Prints a line per kernel; 1 if one is wrong. Raises ConfigError for an unknown family."""
    refuse_unknown(arguments)
    import torch

    from kernels.choose import has_triton, is_interpreted
    from kernels.spec import kernel_specs
    from kernels.verdict import in_interpreter, on_gpu

    if not has_triton():
        print("triton is not installed: all kernels run in plain torch", file=sys.stderr)
        return 1
    is_gpu = torch.cuda.is_available()
    if not is_gpu and not is_interpreted():
        print("no GPU on this machine: small shapes in Triton's interpreter, which says nothing about speed")
        command = [sys.executable, "-m", "kernels.check", *arguments]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    wanted = [spec for family in arguments or FAMILIES for spec in kernel_specs(family)]
    return on_gpu(wanted) if is_gpu else in_interpreter(wanted)


if __name__ == "__main__":
    run(main, PAGE)
