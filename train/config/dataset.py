"""What a prepared dataset says of itself, in place of keys that would have to be typed again."""

from pathlib import Path
from typing import Any

from conf.compose import composed_value
from conf.user_files import Given

DIRECTORY, CORPORA = "data.directory", "data.corpora"
VOCABULARY, MULTIPLE = "model.vocab_size", "train.vocab_multiple"


def dataset_values(given: Given, has_weights: bool) -> dict[str, Any]:
    """Values of keys by the card of the dataset in data.directory, where that is typed and one is there.

    Its corpora and its tokenizer, unless a group `data` or a source is typed, which may be of another
    dataset; and as many rows of the vocabulary as its tokenizer needs, unless they are typed or come with
    weights. Raises ConfigError for overrides that cannot be read, DataError for a damaged card.
    """
    keys = given.all_keys()
    directory = composed_value(given, DIRECTORY) if DIRECTORY in keys else None
    if not isinstance(directory, str) or not (Path(directory).expanduser() / "card.json").exists():
        return {}
    from data.card import read_card

    card, found = read_card(Path(directory).expanduser()), dict[str, Any]()
    corpora = {key for key in keys if key.startswith(f"{CORPORA}.")}
    if "data" not in keys and all(key.endswith((".weight", ".epochs")) for key in corpora):
        found |= {CORPORA: _corpora(given, card.settings, list(card.corpora))}
        found["data.tokenizer.model"] = card.settings.get("data.tokenizer.model")
        found["data.tokenizer.vocab_size"] = card.tokenizer.vocab_size
        found["data.held_out"] = card.settings["data.held_out"]
    rows, multiple = (composed_value(given, key) for key in (VOCABULARY, MULTIPLE))
    is_given = has_weights or VOCABULARY in keys or not isinstance(rows, int) or not isinstance(multiple, int)
    if not is_given and rows < card.tokenizer.vocab_size and multiple > 0:
        found[VOCABULARY] = -(-card.tokenizer.vocab_size // multiple) * multiple
    return found


def _corpora(given: Given, settings: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The corpora as they were prepared, with the weights that a recipe has for them."""
    composed, found = composed_value(given, CORPORA), dict[str, Any]()
    for name in names:
        prefix = f"{CORPORA}.{name}."
        values = {
            key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)
        }
        now = composed.get(name) if isinstance(composed, dict) else None
        weights = {key: now[key] for key in ("weight", "epochs") if isinstance(now, dict) and key in now}
        found[name] = values | weights
    return found
