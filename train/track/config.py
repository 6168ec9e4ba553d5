"""Where the numbers of a run go."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from conf.compose import Config


class TrackConfig(Config):
    """What a run prints, and how it is shown on Weights & Biases. Its files are written in any case."""

    wandb: Literal["offline", "online", "disabled"]
    project: str = Field(min_length=1)
    entity: str | None
    name: str | None = Field(min_length=1, max_length=128)
    group: str | None = Field(min_length=1, max_length=128)
    tags: Annotated[tuple[str, ...], Strict(False)]
    router_every: int | None = Field(ge=1)
    log_every: int = Field(ge=1)
    timeout_seconds: float = Field(gt=0, le=15)
