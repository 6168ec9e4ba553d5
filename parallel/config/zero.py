"""The keys of ZeRO; without torch and DeepSpeed."""

from typing import Literal

from pydantic import Field

from conf.compose import Config

# Where this release keeps its partitions is read by parallel/deepspeed.py.
RELEASE = "0.19.8"
# Numbers that go through one collective together; DeepSpeed allocates as many.
BUCKET = 50_000_000


class ZeroConfig(Config):
    """What DeepSpeed cuts over the ranks, and what of it waits in host memory."""

    stage: Literal[1, 2, 3]
    offload: Literal["none", "optimizer", "parameters"]
    whole_below: int = Field(ge=0)
