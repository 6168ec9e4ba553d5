"""How often a run is saved and how many checkpoints it keeps."""

from pydantic import Field

from conf.compose import Config


class CheckpointConfig(Config):
    """When checkpoints are written and how many verified ones stay on disk."""

    every: int = Field(ge=1)
    keep: int = Field(ge=2)
    accept_step: int | None = Field(ge=0)
