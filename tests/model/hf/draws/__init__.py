"""For each family of checkpoints: small configs to draw from, as overrides of our config groups.

A file per file of model/hf/families/, found by name; its FAMILIES are by model_type.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st


class Drawn(NamedTuple):
    """One family under test.

    overrides: a strategy of config overrides. open: transformers' model of a directory, and by kind the
    tensors that it missed or did not expect; None opens AutoModelForCausalLM."""

    overrides: st.SearchStrategy[list[str]]
    open: Callable[[Path], tuple[Any, dict[str, set[str]]]] | None = None


def drawn_families() -> dict[str, Drawn]:
    """Every family under test."""
    found: dict[str, Drawn] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").FAMILIES
    return found


def lines(groups: list[str], **drawn: st.SearchStrategy) -> st.SearchStrategy[list[str]]:
    """Overrides with the drawn values; `__` in a name stands for a dot."""
    return st.fixed_dictionaries(drawn).map(
        lambda values: [*groups, *(f"{name.replace('__', '.')}={value}" for name, value in values.items())]
    )


heads = st.sampled_from([(4, 2), (2, 1), (6, 3), (4, 4)])
top_k = st.integers(2, 4)  # with one expert the normalised weight is 1 and the router has no gradient
window = st.sampled_from(["null", "1", "9", "200"])


def with_heads(strategy: st.SearchStrategy[list[str]], mixer: str = "attn") -> st.SearchStrategy[list[str]]:
    """With query and key heads that fit each other."""
    return st.tuples(strategy, heads).map(
        lambda pair: [
            *pair[0],
            f"mixer.{mixer}.num_heads={pair[1][0]}",
            f"mixer.{mixer}.num_key_heads={pair[1][1]}",
        ]
    )
