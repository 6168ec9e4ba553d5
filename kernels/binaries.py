"""Every kernel compiled for Hopper without a GPU, and its size.

The kernels of each spec run once, forward and backward, on tensors without memory and with the dims of a
model; whatever would be launched is compiled with the very types and sizes of a run on an H100, and not
launched.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from conf.interrupts import end_at_interrupt, shielded
from kernels.spec import KernelSpec, input_factory, kernel_specs, outputs_and_grads

TARGET = GPUTarget("cuda", 90, 32)
# Bytes that a block may ask for on an H100 or H200, and other limits of the chip.
SHARED = 232448
LIMITS = {
    "max_shared_mem": SHARED,
    "multiprocessor_count": 132,
    "max_num_regs": 65536,
    "warpSize": 32,
    "sm_clock_rate": 1980000,
    "mem_clock_rate": 2619000,
    "mem_bus_width": 5120,
}
TOKENS = 8192


class Binary(NamedTuple):
    """What one kernel became. spills counts instructions that move registers to memory and back."""

    spec: str
    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int
    fast_products: int
    small_products: int
    has_dot: bool


def compile_spec(spec: KernelSpec, dtype: torch.dtype = torch.bfloat16) -> list[Binary]:
    """The distinct binaries of one forward and backward of the spec at TOKENS tokens."""
    with recording(spec.name) as binaries:
        case = spec.draw(spec.shape_at(TOKENS), input_factory(dtype, "meta"))
        outputs_and_grads(case.triton, case.inputs)
    return binaries


def compile_named(name: str) -> list[Binary]:
    """The same by the spec's name, in whatever process."""
    return compile_spec(next(spec for spec in kernel_specs(name.split(".")[0]) if spec.name == name))


def faults(spec: KernelSpec, binaries: Sequence[Binary]) -> list[str]:
    """What is wrong with the binaries and not known, one line each."""
    found = []
    for binary in binaries:
        own = []
        if binary.shared > SHARED:
            found.append(f"{binary.kernel}: {binary.shared} bytes of shared memory, there are {SHARED}")
        if binary.spills:
            own.append(f"{binary.kernel}: {binary.spills} instructions spill registers")
        if binary.has_dot and not binary.fast_products:
            own.append(f"{binary.kernel}: multiplies matrices without HGMMA")
        if known_spill(spec, binary.kernel) is None:
            found += own
    return found


def known_spill(spec: KernelSpec, kernel: str) -> str | None:
    """Why a kernel spills, with this release of triton or with any; None where it must not."""
    release = ".".join(triton.__version__.split(".")[:2])
    return spec.known_spills.get(kernel) or spec.known_spills.get(f"{kernel}@{release}")


def known_spills(spec: KernelSpec, binaries: Sequence[Binary]) -> list[str]:
    """The binaries that spill and may, each with its reason, one line each."""
    found = {}
    for binary in binaries:
        reason = known_spill(spec, binary.kernel)
        if reason and (binary.spills or (binary.has_dot and not binary.fast_products)):
            found[binary.kernel, binary.spills] = f"{binary.kernel}: {binary.spills} spills: {reason}"
    return list(found.values())


@contextmanager
def recording(spec: str) -> Iterator[list[Binary]]:
    """Within it, launches compile for TARGET and are recorded instead of run; once per binary."""
    binaries: list[Binary] = []
    before = driver._active
    driver.set_active(cast(Any, _Driver(spec, binaries)))
    try:
        yield binaries
    finally:
        driver._active = before


class _Driver:
    """A GPU that takes every binary and runs none."""

    def __init__(self, spec: str, binaries: list[Binary]) -> None:
        self.utils = self
        self._spec, self._binaries, self._pending = spec, binaries, {}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Called once for each binary before it is loaded."""
        self._pending = {"warps": metadata.num_warps, "source": source}
        return lambda *arguments, **options: None

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Reads what the compiler made of the kernel instead of loading it."""
        usage = _dump("--dump-resource-usage", cubin)
        match = re.search(r"REG:(\d+)", usage)
        assert match is not None, usage
        code = _dump("--dump-sass", cubin)
        count = lambda pattern: len(re.findall(pattern, code))  # noqa: E731
        self._binaries.append(
            Binary(
                self._spec,
                name,
                self._pending["warps"],
                int(match[1]),
                count(r"\b(?:STL|LDL)\b"),
                shared,
                count(r"\b[HQI]GMMA\b"),
                count(r"\b[HQI]MMA\b"),
                _has_dot(self._pending["source"]),
            )
        )
        return 1, 1, int(match[1]), 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of an H100."""
        return LIMITS

    def fill_tma_descriptor_tiled(self, *arguments: Any) -> None:
        """Nothing is launched."""

    def get_current_target(self) -> GPUTarget:
        """The target."""
        return TARGET

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int = 0) -> int:
        """The only one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Not needed without a launcher."""
        return kind


def _has_dot(source: Any) -> bool:
    # Also in functions that the kernel calls.
    pending, seen = [source.fn], set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        if "tl.dot(" in function.src:
            return True
        scope = function.__globals__
        names = re.findall(r"\b([A-Za-z_]\w*)\(", function.src)
        pending += [scope[n] for n in names if isinstance(scope.get(n), triton.runtime.jit.JITFunction)]
    return False


def _dump(what: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def table(binaries: Sequence[Binary]) -> str:
    """One line per binary."""
    head = ("spec", "kernel", "warps", "registers", "spills", "shared", "HGMMA", "HMMA")
    rows = [tuple(str(x) for x in binary[:-1]) for binary in binaries]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def compile_all(names: Sequence[str]) -> int:
    """Prints the binaries of some specs, without names of all, and their faults; 1 if there is a fault.

    64 for a name that no spec has.
    """
    families = {name.split(".")[0] for name in names} or {None}
    specs = {spec.name: spec for family in families for spec in kernel_specs(family)}
    unknown = [name for name in names if name not in specs]
    if unknown:
        print(f"no such spec: {', '.join(unknown)}", file=sys.stderr)
        return 64
    binaries, found, known = [], [], []
    wanted = list(names or specs)
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=end_at_interrupt) as pool:
        with shielded():
            compiled = pool.map(compile_named, wanted)
        for name, own in zip(wanted, compiled, strict=True):
            binaries += own
            found += [f"{name}: {fault}" for fault in faults(specs[name], own)]
            known += [f"known spills: {name}: {line}" for line in known_spills(specs[name], own)]
    print(f"triton {triton.__version__}, sm_{TARGET.arch}, bfloat16, {TOKENS} tokens")
    print(table(binaries))
    print("\n".join([*known, *(found or ["every kernel fits"])]))
    return 1 if found else 0
