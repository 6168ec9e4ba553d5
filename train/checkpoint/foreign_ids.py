"""Token ids of one tokenizer under weights of another, told by the digests of both.

Two tokenizers with as many pieces give ids of one range: nothing else shows that they mean other text.
"""

from typing import NamedTuple

from conf.errors import ConfigError, Violation


class Ids(NamedTuple):
    """What holds or learned ids, and the sha256 of their tokenizer; None where nothing says it."""

    where: str
    tokenizer: str | None


def compare_ids(weights: Ids, data: Ids, key: str, fix: str, *, are_meant: bool = False) -> str | None:
    """The line to print where ids cannot be compared, or differ and `are_meant` to; None where they agree.

    Raises ConfigError with `key` where they differ and are not meant to.
    """
    if weights.tokenizer is None:
        return (
            f"{weights.where}: carries no digest of its tokenizer; whether its ids are those of {data.where} "
            f"(tokenizer sha256 {data.tokenizer}) could not be compared"
        )
    if weights.tokenizer == data.tokenizer:
        return None
    found = (
        f"{weights.where} has ids of the tokenizer with sha256 {weights.tokenizer}, "
        f"{data.where} those of {data.tokenizer}"
    )
    if are_meant:
        return f"{found}; taken as train.foreign_ids=true asks"
    raise ConfigError([Violation(key, f"{found}; {fix}")])
