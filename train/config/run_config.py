"""The run config: everything that a run is, typed and frozen."""

from model.config import Architecture
from train.config.fields import RunFields


class RunConfig(RunFields, Architecture):
    """Everything that a run is."""

    def rank_rows(self, ranks: int) -> tuple[int, int]:
        """Sequences of one rank per step, and how many of them go through the model at a time."""
        rows = self.train.global_batch // ranks
        return rows, self.train.micro_batch or self.parallel.largest_micro_batch(rows)

    @property
    def architecture(self) -> Architecture:
        """The part that the model is built from."""
        return Architecture(**{name: getattr(self, name) for name in Architecture.model_fields})
