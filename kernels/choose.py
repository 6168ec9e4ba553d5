"""Which backend of a kernel runs: Triton on a GPU, plain torch elsewhere, or what the run's config says.

The choice is the process's own and made once, before the first call: autograd recomputes parts of a model in
threads of its own, and these must choose as forward did.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from kernels.families import FAMILIES

KernelBackend = Literal["auto", "triton", "reference"]
# Work on each token alone: inside compiled code they are plain torch, which the compiler fuses with the rest.
FUSED = ("activation", "norm", "rotary", "sinkhorn")
# What the kernels compute in; a run in float64 is a proof and takes plain torch.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_backends: dict[str, KernelBackend] = {}


def set_backends(backends: Mapping[str, KernelBackend]) -> None:
    """Sets the backend of each family named, for this process; a family not named is `auto`.

    Raises ValueError for an unknown family or backend.
    """
    for family, backend in backends.items():
        if family not in FAMILIES:
            raise ValueError(f"kernels.{family}: no such family; there are {', '.join(FAMILIES)}")
        if backend not in ("auto", "triton", "reference"):
            raise ValueError(f"kernels.{family}: expected auto, triton or reference, found {backend}")
    _backends.clear()
    _backends.update(backends)


@contextmanager
def use_backends(backends: Mapping[str, KernelBackend]) -> Iterator[None]:
    """Within it families take the backends named; for checks and tests."""
    before = dict(_backends)
    set_backends({**before, **backends})
    try:
        yield
    finally:
        set_backends(before)


def takes_triton(family: str, x: Tensor) -> bool:
    """Whether a call of the family on x runs its Triton kernel.

    Raises ValueError where the config asks for Triton and x is not on a GPU or not of DTYPES; in code that is
    being compiled where it asks for Triton or the family is not of FUSED.
    """
    backend = _backends.get(family, "auto")
    if torch.compiler.is_compiling():
        if family not in FUSED or backend == "triton":
            raise ValueError(f"kernels.{family}: {backend} is not for code that is compiled")
        return False
    if backend == "auto":
        return x.is_cuda and x.dtype in DTYPES and has_triton()
    if backend == "reference":
        return False
    if not (x.is_cuda or is_interpreted()):
        raise ValueError(f"kernels.{family}: triton was asked for, which needs a GPU; found {x.device}")
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels.{family}: triton takes {DTYPES}, found {x.dtype}; set it to reference")
    return True


def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device (TRITON_INTERPRET, which Triton reads)."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """One line that says which families run on which backend for tensors of this device and dtype."""
    probe = torch.empty(0, dtype=dtype, device=device)
    triton = [family for family in FAMILIES if takes_triton(family, probe)]
    plain = [family for family in FAMILIES if family not in triton]
    parts = [f"triton: {', '.join(triton)}"] if triton else []
    parts += [f"plain torch: {', '.join(plain) if triton else 'all'}"] if plain else []
    return f"kernels on {device.type} in {str(dtype).removeprefix('torch.')}: " + "; ".join(parts)
