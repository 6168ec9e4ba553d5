"""`python -m kernels.compiled [SPEC ...]`: every kernel compiled for Hopper without a GPU, and its size.

The kernels of each spec run once, forward and backward, on tensors without memory and with the dims of a
model; whatever would be launched is compiled with the very types and sizes of a run on an H100, and not
launched. Exits with 1 if a kernel asks for more shared memory than there is, or if it spills or multiplies
matrices off the fast tensor cores and its `spec.py` does not list it in known_spills.
"""

from collections.abc import Sequence

from conf.help import Page, run
from kernels.families import refuse_unknown

PAGE = Page(
    __doc__ or "",
    ("python -m kernels.compiled", "python -m kernels.compiled attention.full"),
    {"SPEC": "a kernel as FAMILY.NAME of kernels/FAMILY/spec.py; without any, all"},
)


def main(names: Sequence[str]) -> int:
    """Prints the table and the faults; 1 if there is a fault, 64 for an unknown spec.

    Raises ConfigError for an unknown family.
    """
    refuse_unknown([name.partition(".")[0] for name in names])
    from kernels.binaries import compile_all

    return compile_all(names)


if __name__ == "__main__":
    run(main, PAGE)
