"""Fields of a config.json, each read once; what is left over must be harmless."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from conf.errors import CheckpointError

# Fields of every config that say nothing about the function that a model computes.
SILENT = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id"),
        *("id2label", "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id"),
        *("problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache"),
        *("chunk_size_feed_forward", "router_jitter_noise", "pretraining_tp", "quantization_config"),
    }
)
_MISSING = object()
_COUNT = re.compile(r"(num|n|d)_\w+|\w+_(size|dim|rank|heads|layers|experts)")
_MOST_LAYERS = 10_000


class Fields:
    """A config.json under translation. Every field that is asked for counts as understood.

    aliases are other names that a field may stand under.
    """

    def __init__(
        self, values: Mapping[str, Any], path: str, aliases: Mapping[str, str] | None = None
    ) -> None:
        renamed = {(aliases or {}).get(name, name): value for name, value in values.items()}
        self._values, self._path, self._seen = renamed, path, set[str]()
        # The field asked for last, here or in a nested object.
        self._last = [path]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what a field of a wrong form leads to into a CheckpointError that names the field."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
            message = f"{self._last[0]} has a form that cannot be read ({error or type(error).__name__})"
            raise CheckpointError(f"{message}; fetch the file again, or correct it") from error

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The field, or the default where it is absent.

        Raises CheckpointError without either, and for a count or size that is none.
        """
        self._seen.add(name)
        value = self._values.get(name, default)
        if value is _MISSING:
            raise CheckpointError(f"{self._path}: lacks {name}, which says what the model is")
        self._last[0] = f"{self._path}: {name}"
        is_count = isinstance(value, int | list | None) and not isinstance(value, bool)
        if _COUNT.fullmatch(name) and not is_count:
            raise CheckpointError(f"{self._last[0]} is {value!r}; expected a whole number")
        if name.endswith("_layers") and isinstance(value, int) and value > _MOST_LAYERS:
            raise CheckpointError(f"{self._last[0]} is {value}; expected {_MOST_LAYERS} at most")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Accepts a field that may only have these values, or be absent.

        Raises CheckpointError for another value.
        """
        found = self.take(name, allowed[0])
        if found not in allowed:
            options = " or ".join(repr(value) for value in allowed)
            raise CheckpointError(
                f"{self._path}: {name} is {found!r}; this architecture is built with {options}"
            )

    def require(self, name: str, *allowed: Any) -> None:
        """Accepts a field that may only have these values; absent, it would stand for another one.

        Raises CheckpointError where it is absent or has another value.
        """
        self.take(name)
        self.expect(name, *allowed)

    def settle(self, name: str, value: Any) -> None:
        """Gives a field that is absent this value. Raises CheckpointError where it has another one."""
        self._values.setdefault(name, value)
        self.expect(name, value)

    def node(self, name: str, aliases: Mapping[str, str] | None = None) -> "Fields":
        """A nested object, with fields of its own to read and to finish; empty where it is absent."""
        value = self.take(name, None) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{self._path}: {name} is {value!r}; expected an object")
        found = Fields(value, f"{self._path}: {name}", aliases)
        found._last = self._last
        return found

    def finish(self) -> None:
        """Raises CheckpointError for fields that nobody asked for."""
        unknown = sorted(set(self._values) - self._seen - SILENT)
        if unknown:
            raise CheckpointError(
                f"{self._path}: unknown fields {', '.join(unknown)}; they may change what the model computes"
            )


def shown(value: Any) -> str:
    """A value as an override has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)) if isinstance(value, float) else str(value)
