"""Families of kernels by name, without torch: a mistyped one is answered at once."""

from collections.abc import Sequence

from conf.errors import ConfigError, Violation
from conf.known_keys import did_you_mean

# Those with Triton kernels; the selective scan has none and always runs in plain torch.
FAMILIES = (
    "activation",
    "attention",
    "block_attention",
    "block_selection",
    "compress",
    "compressed_attention",
    "convolution",
    "cross_entropy",
    "delta_rule",
    "experts",
    "indexer",
    "linear_attention",
    "norm",
    "rotary",
    "selected_attention",
    "sinkhorn",
)


def refuse_unknown(names: Sequence[str]) -> None:
    """Raises ConfigError where one is no family."""
    unknown = [name for name in dict.fromkeys(names) if name not in FAMILIES]
    legal = f"no such family; there are {', '.join(FAMILIES)}"
    if unknown:
        raise ConfigError([Violation(name, legal + did_you_mean(name, FAMILIES)) for name in unknown])
