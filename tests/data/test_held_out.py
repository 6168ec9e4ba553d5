"""What is held out: a share of the documents by their hash, of which neither model nor tokenizer learns."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conf.errors import DataError
from data.config import DataConfig
from data.prepare import prepare
from data.shards import ShardStore, is_held_out, make_shard
from data.tokenizer.files import load_tokenizer

MakeConfig = Callable[..., DataConfig]
SHARE = 0.15


def by_hand(content: bytes) -> bool:
    """The first eight bytes of the sha256 as a share of all numbers of eight bytes."""
    return int(hashlib.sha256(content).hexdigest()[:16], 16) / 2**64 < SHARE


def test_the_hash_decides_at_the_share_that_was_asked_for() -> None:
    assert is_held_out(bytes.fromhex("1fffffffffffffff") + bytes(24), 0.125)
    assert not is_held_out(bytes.fromhex("2000000000000000") + bytes(24), 0.125)
    assert not is_held_out(bytes(32), 0.0)
    digests = [hashlib.sha256(f"{number}".encode()).digest() for number in range(4000)]
    # Five deviations of the binomial.
    assert abs(np.mean([is_held_out(digest, SHARE) for digest in digests]) - SHARE) < 5 * 0.0057


def test_the_tokenizer_learns_nothing_of_what_is_held_out(make_config: MakeConfig, tmp_path: Path) -> None:
    def tokenizer_of(name: str, held_out: bytes) -> str:
        source = tmp_path / name
        source.mkdir()
        # Words with numbers, until the hash puts the document on the side where it is wanted.
        wanted = {
            f"{n:02}.txt": (b"some words of document %d, and again\n" % n * 9, False) for n in range(12)
        }
        wanted |= {f"9{n}.txt": (held_out * 40 + b"%d" % n, True) for n in range(3)}
        for file, (content, is_out) in wanted.items():
            content = next(
                found for tail in range(1000) if by_hand(found := content + b" %d\n" % tail) == is_out
            )
            (source / file).write_bytes(content)
        config = make_config(
            tmp_path / f"{name}-data",
            corpora={"mine": {"kind": "text", "source": str(source)}},
            held_out=SHARE,
            tokenizer={"vocab_size": 390, "train_bytes": 60_000},
        )
        card = prepare(config, progress=False).card
        assert card.held_out.documents == 3
        return card.tokenizer.digest

    assert tokenizer_of("one", b"zebra quagga ") == tokenizer_of("other", b"unlike xylophone ")


def test_a_shard_that_is_not_what_was_recorded_is_never_merged(dataset, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.write(
        "code-000000",
        make_shard([b"one document\n"], 0.0, load_tokenizer(dataset.directory / "tokenizer.model")),
    )
    assert store.read("code-000000").sizes.tolist() == [13]
    path = tmp_path / "code-000000.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"code-000000\.npz: digest \w+, expected \w+; delete it"):
        store.read("code-000000")
