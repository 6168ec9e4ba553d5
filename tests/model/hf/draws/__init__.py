"""For each family of checkpoints: small configs to draw from, as overrides of our config groups.

A file per file of model/hf/families/, found by name; its FAMILIES are by model_type.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from model.hf.family import families
from model.hf.pieces import Mapped
from model.hf.pretrained import state_of
from model.language_model import LanguageModel


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


def fit(model: LanguageModel, name: str) -> None:
    """Zeroes buffers that the family does not hold, and gives tables their values. Mutates the model."""
    for key in Mapped(families()[name].pieces(model.config), state_of(model)).uncovered:
        model.get_buffer(key).zero_()
    for router in model.routers():
        if router.is_hashed:
            router.reset_buffers()


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
