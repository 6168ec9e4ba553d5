"""Where the numbers of a run go."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from conf.compose import Config


class TrackConfig(Config):
    """How a run is shown on Weights & Biases. The files in the run directory are written in any case."""

    wandb: Literal["offline", "online", "disabled"]
    project: str = Field(min_length=1)
    entity: str | None
    name: str | None
    tags: Annotated[tuple[str, ...], Strict(False)]
    timeout_seconds: float = Field(gt=0, le=15)
