"""The run config: everything that a run is, typed and frozen."""

from pathlib import Path
from typing import Any

from conf.errors import Violation
from model.config import Architecture
from train.checkpoint.run_files import CONFIG_FILE, read_config
from train.config.fields import RunFields
from train.config.versions import upgraded


class RunConfig(RunFields, Architecture):
    """Everything that a run is."""

    def rank_rows(self, ranks: int) -> tuple[int, int]:
        """Sequences of one rank per step, and how many of them go through the model at a time."""
        rows = self.train.global_batch // ranks
        return rows, self.train.micro_batch or rows

    @property
    def architecture(self) -> Architecture:
        """The part that the model is built from."""
        return Architecture(**{name: getattr(self, name) for name in Architecture.model_fields})


# What may change between two starts of one run without making it another run.
CHANGEABLE = (
    *("run", "kernels", "checkpoint", "track", "cluster", "slurm", "plan", "rehearse", "parallel", "sample"),
)
CHANGEABLE_KEYS = (
    *(
        "train.micro_batch",
        "train.evaluate_every",
        "train.evaluate_rows",
        "train.final_rows",
        "train.max_skipped",
        # It is about the first start; what a resumed run reads is compared with its own checkpoint.
        "train.foreign_ids",
        "train.gc_every",
        "train.profile",
    ),
    "data.verify",
)


def saved_differences(directory: Path, wanted: dict[str, Any]) -> list[Violation]:
    """The keys in which a plain config differs from that of the run in a directory, if one is there.

    Raises CheckpointError where the run's config is damaged and has no copy, ConfigError where an older
    version started it in a way that this one does not know.
    """
    saved = read_config(directory)
    if saved is None:
        return []
    saved = upgraded(saved, str(directory / CONFIG_FILE))
    # Mixers that are newer than the run, which it cannot have.
    saved["mixer"] = wanted["mixer"] | saved["mixer"]
    return differences(saved, wanted)


def differences(saved: object, now: object, prefix: str = "") -> list[Violation]:
    """The keys whose values differ between two plain config trees, changeable ones left out."""
    if prefix in CHANGEABLE or prefix in CHANGEABLE_KEYS or saved == now:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        found = []
        for key in sorted(saved.keys() | now.keys()):
            name = f"{prefix}.{key}" if prefix else str(key)
            found += differences(saved.get(key), now.get(key), name)
        return found
    return [Violation(prefix, f"the run was started with {saved!r}; found {now!r}")]
