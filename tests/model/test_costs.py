"""What mixers cost, counted one query and one number at a time."""

import pytest

from tests.architectures import small_architecture

HEADS, KEY, VALUE = 4, 8, 6


def seen(query: int, window: int | None, chunk: int | None) -> int:
    """How many keys a query sees, itself included."""
    first = 0
    if window is not None:
        first = max(0, query - window + 1)
    if chunk is not None:
        first = query // chunk * chunk
    return query - first + 1


@pytest.mark.parametrize("context", [1, 7, 20, 23])
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (7, None), (1, None), (None, 6)])
def test_attention_counts_the_keys_that_are_seen(context: int, window: int | None, chunk: int | None) -> None:
    sizes = f"head_dim: {KEY}, value_dim: {VALUE}, num_heads: {HEADS}"
    reach = f"window: {window or 'null'}, chunk: {chunk or 'null'}"
    entry = small_architecture([f"mixer.attn={{{sizes}, {reach}}}"]).mixer["attn"]
    keys = sum(seen(query, window, chunk) for query in range(context)) / context
    # Products of a query with a key and of a weight with a value: a multiplication and an addition each.
    assert entry.flops(32, context).core == pytest.approx(2 * HEADS * (KEY + VALUE) * keys, rel=1e-12)


@pytest.mark.parametrize(
    ("entry", "fields", "numbers"),
    [
        # Keys of 2 heads of 8 and values of 2 heads of 6 for every token, or for the last 6 of 20: the
        # next query has one of its own.
        ("attn", "head_dim: 8, value_dim: 6, num_key_heads: 2", 20 * 2 * (8 + 6)),
        ("attn", "head_dim: 8, value_dim: 6, num_key_heads: 2, window: 7", 6 * 2 * (8 + 6)),
        # One latent and one shared key for all heads.
        ("mla", "num_heads: 16, latent_dim: 10, shared_key_dim: 4", 20 * (10 + 4)),
    ],
)
def test_a_cache_holds_what_later_queries_read(entry: str, fields: str, numbers: int) -> None:
    found = small_architecture([f"mixer.{entry}={{{fields}}}"]).mixer[entry]
    assert found.cache_bytes(20, element_bytes=2) == 2 * numbers
