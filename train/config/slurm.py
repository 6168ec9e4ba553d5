"""What a job asks of SLURM, and what surrounds the trainer in it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from conf.compose import Config


def _as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value


# A number that is typed here is the text of it.
Text = Annotated[str, BeforeValidator(_as_text)]
# Of these SLURM and the shell read no second word.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Names = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(,[A-Za-z0-9][A-Za-z0-9._-]{0,63})*$")]
Hosts = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,\[\]-]*$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]


class ContainerConfig(Config):
    """The container that each task runs in."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: Line | None = None
    mounts: list[Annotated[str, Field(pattern=r"^/[^:,\x00-\x1f]*:/[^:,\x00-\x1f]*(:[A-Za-z0-9+,]+)?$")]] = (
        Field(default=[])
    )
    python: Line = "python3"

    @model_validator(mode="after")
    def _fits(self) -> "ContainerConfig":
        if (self.kind != "none") != (self.image is not None):
            raise ValueError(f"kind {self.kind} and image {self.image}: a container has both or neither")
        return self


class SlurmConfig(Config):
    """Keys of the group slurm. Runs that were started before it was there have none in their config.json."""

    job_name: Name = "weft"
    time: str | None = Field(default=None, pattern=r"^([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]$")
    partition: Names | None = None
    account: Name | None = None
    qos: Name | None = None
    reservation: Names | None = None
    constraint: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._*&|()\[\],-]+$")
    exclusive: bool = True
    memory: Annotated[Text, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = "0"
    exclude: Hosts | None = None
    exclude_failed: bool = True
    mail_user: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._%+@-]+$")
    mail_types: list[Annotated[str, Field(pattern=r"^[A-Z0-9_]+$")]] = Field(
        default=["FAIL", "REQUEUE", "END"], min_length=1
    )
    notice_seconds: int | None = Field(default=None, ge=60, le=65535)
    max_restarts: int = Field(default=100, ge=0)
    max_crashes: int = Field(default=3, ge=0)
    snapshot: bool = True
    modules: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+/-]*$")]] = Field(default=[])
    prolog: Line | None = None
    container: ContainerConfig = ContainerConfig()
    env: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")],
        Annotated[Text, Field(pattern=r"^[^\x00-\x1f\x7f]+$")] | None,
    ] = Field(default={})
