"""Which form of a kernel runs: Triton on a GPU, plain torch elsewhere, or what the run's config says.

The choice is the process's own and made once, before the first call: autograd recomputes parts of a model in
threads of its own, and these must choose as forward did.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Form = Literal["auto", "triton", "reference"]
# Those with Triton kernels; the selective scan has none and always runs in plain torch.
FAMILIES = (
    "activation",
    "attention",
    "block_attention",
    "block_selection",
    "compress",
    "compressed_attention",
    "convolution",
    "cross_entropy",
    "delta_rule",
    "experts",
    "indexer",
    "linear_attention",
    "norm",
    "rotary",
    "selected_attention",
    "sinkhorn",
)
# Work on each token alone: inside compiled code they are plain torch, which the compiler fuses with the rest.
FUSED = ("activation", "norm", "rotary", "sinkhorn")
# What the kernels compute in; a run in float64 is a proof and takes the plain form.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_chosen: dict[str, Form] = {}


def choose(forms: Mapping[str, Form]) -> None:
    """Sets the form of each family named, for this process; a family not named is `auto`.

    Raises ValueError for an unknown family or form.
    """
    for family, form in forms.items():
        if family not in FAMILIES:
            raise ValueError(f"kernels.{family}: no such family; there are {', '.join(FAMILIES)}")
        if form not in ("auto", "triton", "reference"):
            raise ValueError(f"kernels.{family}: expected auto, triton or reference, found {form}")
    _chosen.clear()
    _chosen.update(forms)


@contextmanager
def chosen(forms: Mapping[str, Form]) -> Iterator[None]:
    """Within it families take the forms named; for checks and tests."""
    before = dict(_chosen)
    choose({**before, **forms})
    try:
        yield
    finally:
        choose(before)


def takes_triton(family: str, x: Tensor) -> bool:
    """Whether a call of the family on x runs its Triton kernel.

    Raises ValueError where the config asks for Triton and x is not on a GPU or not of DTYPES; in code that is
    being compiled where it asks for Triton or the family is not of FUSED.
    """
    form = _chosen.get(family, "auto")
    if torch.compiler.is_compiling():
        if family not in FUSED or form == "triton":
            raise ValueError(f"kernels.{family}: {form} is not for code that is compiled")
        return False
    if form == "auto":
        return x.is_cuda and x.dtype in DTYPES and has_triton()
    if form == "reference":
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
    """One line that says which families run in which form on tensors of this device and dtype."""
    probe = torch.empty(0, dtype=dtype, device=device)
    triton = [family for family in FAMILIES if takes_triton(family, probe)]
    plain = [family for family in FAMILIES if family not in triton]
    parts = [f"triton: {', '.join(triton)}"] if triton else []
    parts += [f"plain torch: {', '.join(plain) if triton else 'all'}"] if plain else []
    return f"kernels on {device.type} in {str(dtype).removeprefix('torch.')}: " + "; ".join(parts)
