"""What a GPU can do at most, measured on it: matrix products, and copies in memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels.spec import KernelCost


class Limits(NamedTuple):
    """Multiplications and additions per second in bfloat16, and bytes read and written per second."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many flops and bytes."""
        return max(flops / self.flops, moved / self.bytes)


def measured_limits(device: torch.device) -> Limits:
    """The best of a large product and of a large copy; takes about a second and 2 GB."""
    size = 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = seconds(lambda: torch.mm(a, b))
    numbers = torch.empty(2**28, device=device, dtype=torch.float32)
    target = torch.empty_like(numbers)
    copy = seconds(lambda: target.copy_(numbers))
    return Limits(2 * size**3 / product, 2 * numbers.numel() * 4 / copy)


def seconds(function: Callable[[], object], *, repeats: int = 10) -> float:
    """The median time of a call on the GPU, after three to warm up; caches are emptied before each."""
    # More than the second-level cache holds, so that no call finds its inputs there.
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def share(
    cost: KernelCost, limits: Limits, forward: float, backward: float | None
) -> tuple[float, float | None]:
    """Least time over measured time, forward and backward."""
    least = limits.seconds(cost.forward_flops, cost.forward_bytes)
    if backward is None:
        return least / forward, None
    return least / forward, limits.seconds(cost.backward_flops, cost.backward_bytes) / backward
