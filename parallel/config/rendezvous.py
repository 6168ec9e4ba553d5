"""The rendezvous of the processes of a run; without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rendezvous:
    """An address that every process reaches, and the machine of this one.

    is_hosted: the launcher keeps a store of keys there; otherwise rank 0 opens it.
    """

    address: str
    port: int
    is_hosted: bool
    host: str
