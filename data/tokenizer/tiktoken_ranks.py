"""Files of tiktoken: a token in base64 and its rank in each line. They become a tokenizer.json."""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from conf.errors import DataError
from conf.tokenizer_files import TOKENIZER_CONFIG, TOKENIZER_JSON
from data.tokenizer.hugging_face import byte_characters, read_json
from data.tokenizer.pre_tokenizers import PATTERNS


def is_ranks(content: bytes) -> bool:
    """Whether a file looks like one of tiktoken, by its first line."""
    first = content.split(b"\n", 1)[0].split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except binascii.Error:
        return False


def from_ranks(
    content: bytes, files: Mapping[str, bytes], pattern: str | None, origin: str
) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer that gives the same ids.

    `files` are those beside it: their tokenizer_config.json names the special tokens. `pattern` is a name of
    PATTERNS, how a text is cut into words, which the file of ranks does not say.

    Raises DataError for a damaged file, and without a pattern.
    """
    if pattern is None:
        names = ", ".join(PATTERNS)
        raise DataError(
            f"{origin}: tiktoken's ranks do not say how a text is cut into words; set data.tokenizer.pattern "
            f"to that of its model, one of {names}"
        )
    ranks = _ranks(content, origin)
    characters = byte_characters()

    def name(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERNS[pattern]},
        "behavior": "Isolated",
        "invert": False,
    }
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    made = {
        "version": "1.0",
        "added_tokens": _special_tokens(files, origin),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_of]},
        "post_processor": None,
        "decoder": bytes_of,
        "model": {
            "type": "BPE",
            # A word that is a token is that token, also where no merges lead to it.
            "ignore_merges": True,
            "vocab": {name(token): rank for token, rank in ranks.items()},
            "merges": [[name(left), name(right)] for left, right in _merges(ranks)],
        },
    }
    config = {name: value for name, value in _config_of(files, origin).items() if name != "auto_map"}
    # Not the class that comes as code with the ranks: this is a file for the library.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    written = {TOKENIZER_CONFIG: json.dumps(config, indent=1).encode()}
    return {**files, **written, TOKENIZER_JSON: json.dumps(made, ensure_ascii=False).encode()}


def _ranks(content: bytes, origin: str) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:  # binascii.Error is one
            raise DataError(
                f"{origin}:{number}: not a token in base64 and its rank; fetch it again"
            ) from error
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing or len({*ranks.values()}) != len(ranks):
        found = f"{missing} of 256 bytes have no rank" if missing else "two tokens have one rank"
        raise DataError(f"{origin}: {found}; the file is cut short or damaged, fetch it again")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs that make a token, those of the token of lowest rank first: tiktoken merges any of them."""
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        ways = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        legal = [(left, right) for left, right in ways if left in ranks and right in ranks]
        pairs += sorted(legal, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs


def _config_of(files: Mapping[str, bytes], origin: str) -> dict[str, Any]:
    return read_json(files.get(TOKENIZER_CONFIG, b"{}"), f"{origin}: {TOKENIZER_CONFIG}")


def _special_tokens(files: Mapping[str, bytes], origin: str) -> list[dict[str, Any]]:
    try:
        named = _config_of(files, origin).get("added_tokens_decoder", {})
        return [
            {
                "id": int(id),
                "content": token["content"],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": bool(token.get("special", True)),
            }
            for id, token in sorted(named.items(), key=lambda item: int(item[0]))
        ]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{origin}: the added_tokens_decoder of its {TOKENIZER_CONFIG} is damaged; fetch it again"
        ) from error
