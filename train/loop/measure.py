"""What a step costs: time, tokens per second, share of peak, memory."""

import time

import psutil
import torch

from model.count import count
from train.config.run_config import RunConfig


class Meter:
    """Clocks the steps of one rank. Share of peak counts useful FLOPs, three times forward."""

    def __init__(self, config: RunConfig, device: torch.device, world_size: int) -> None:
        self._device, self._world_size = device, world_size
        self._flops_per_token = count(config.architecture).training_flops(config.data.sequence_length)
        given = config.cluster.peak_tflops
        compute = getattr(torch, config.precision.compute)
        self._peak = given * 1e12 if given else measured_peak(device, compute)
        self._process = psutil.Process()
        self._start = self._after_data = time.perf_counter()

    def start_step(self) -> None:
        """Starts the clock of a step."""
        self._start = time.perf_counter()

    def end_data(self) -> None:
        """The batch is there; what follows is computing."""
        self._after_data = time.perf_counter()

    def end_step(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._start

    def readings(self, targets: int, seconds: float) -> dict[str, float]:
        """Speed and memory of a step with `targets` predicted tokens over all ranks."""
        per_second = targets / seconds
        readings = {
            "speed/tokens_per_second": per_second,
            "speed/share_of_peak": per_second * self._flops_per_token / (self._peak * self._world_size),
            "data/wait_seconds": self._after_data - self._start,
            "memory/process_gib": self._process.memory_info().rss / 2**30,
        }
        if self._device.type == "cuda":
            readings["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return readings


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product here, best of three."""
    size = 512 if device.type == "cpu" else 8192
    # No random numbers: those of the run must not depend on when it was started.
    x = torch.linspace(-1, 1, size * size, device=device).to(dtype).view(size, size)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        _ = x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
