"""Running out of memory, as one line with the keys that help."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from conf.errors import ConfigError, Violation
from train.config.run_config import RunConfig

# How torch's allocator for CPUs says it; that for GPUs has an exception of its own.
_CPU = ("can't allocate memory", "not enough memory")


@contextmanager
def memory_explained(config: RunConfig, rank: int, keys: Sequence[str] = ()) -> Iterator[None]:
    """Turns an allocation that failed into a ConfigError: the same run would fail again.

    keys are what to try, those of training by default.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and not any(text in str(error) for text in _CPU):
            raise
        raise ConfigError([Violation(f"rank {rank}", _advice(error, keys or _training(config)))]) from error


def _training(config: RunConfig) -> list[str]:
    keys = ["train.micro_batch=1"] * (config.train.micro_batch != 1)
    keys += ["parallel.recompute=full"] * (config.parallel.recompute != "full")
    return [*keys, "a smaller data.sequence_length or model, or more ranks"]


def _advice(error: BaseException, keys: Sequence[str]) -> str:
    said = str(error).splitlines()[0].strip() if str(error) else "no more memory"
    return f"out of memory: {said}; try {', '.join(keys)}; python -m train.plan counts what is needed"
