"""A tokenizer.json and files of tiktoken, beside what transformers and tiktoken make of them."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conf.errors import DataError
from conf.tokenizer_files import TOKENIZER_CONFIG, TOKENIZER_DIGEST, TOKENIZER_JSON
from data.shards import ShardStore, content_hash, input_digest, make_shard
from data.tokenizer.files import (
    find_tokenizer,
    load_tokenizer,
    made_from,
    read_files,
    tokenizer_digest,
    write_files,
)
from data.tokenizer.hub_files import hub_files
from data.tokenizer.pre_tokenizers import PATTERNS
from data.tokenizer.tiktoken_ranks import from_ranks
from data.tokenizer.tokenizer import Ends, Tokenizer
from data.tokenizer.training import SPECIAL, train_tokenizer
from tests.qwen_like import SIZE, TEXTS, write_qwen_like

TRAINED = train_tokenizer(TEXTS, SIZE, "byte_level_bpe")
TEXT = st.text(alphabet=st.one_of(st.sampled_from("abelrstu '\n\r\t 1240=_,."), st.characters(codec="utf-8")))


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as of Qwen."""
    return write_qwen_like(tmp_path_factory.mktemp("qwen"))


def transformers_of(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


@given(TEXT)
@example("<|begin_of_text|><|pad|>")
def test_a_trained_one_keeps_any_text_and_holds_no_special_token(text: str) -> None:
    ids = TRAINED.encode(text.encode())
    assert TRAINED.decode(ids) == text.encode()
    assert not {*range(len(SPECIAL))} & {*ids.tolist()}


def test_training_is_deterministic_and_says_what_is_too_much() -> None:
    again = train_tokenizer(iter(TEXTS), SIZE, "byte_level_bpe")
    assert again.files == TRAINED.files
    assert TRAINED.vocab_size == SIZE
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab_size=50000: .* only \d+; set it to"):
        train_tokenizer(TEXTS, 50_000, "byte_level_bpe")


def test_ids_are_those_of_transformers(qwen_like: Path) -> None:
    theirs = transformers_of(qwen_like)
    ours, parsing = load_tokenizer(qwen_like), load_tokenizer(qwen_like, parses_special=True)

    @given(TEXT)
    @example("a<think>b</think>")
    @example("e\u0301 \ufb01")
    def check(text: str) -> None:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text.encode()).tolist() == expected
        # Not normalised further, so what decodes is what was encoded.
        assert ours.decode(expected).decode() == theirs.decode(expected, clean_up_tokenization_spaces=False)

    check()
    text = "one<|endoftext|>two"
    assert parsing.encode(text.encode()).tolist() == theirs.encode(text, add_special_tokens=False)
    assert parsing.eos in parsing.encode(text.encode())
    assert parsing.decode(parsing.encode(text.encode())) == text.encode()
    assert ours.eos not in ours.encode(text.encode())
    assert ours.decode(ours.encode(text.encode())) == text.encode()


def test_documents_end_as_the_files_say_or_as_asked(qwen_like: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(qwen_like)
    assert (ours.bos, ours.eos, ours.vocab_size) == (None, SIZE, SIZE + 4)
    asked = load_tokenizer(qwen_like, Ends(bos="<|im_end|>", eos="<|im_end|>"))
    assert (asked.bos, asked.eos) == (SIZE + 1, SIZE + 1)
    shutil.copytree(qwen_like, tmp_path / "bare")
    (tmp_path / "bare" / TOKENIZER_CONFIG).unlink()
    with pytest.raises(DataError, match="says no token that ends a text"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": {"content": "<|none|>"}}))
    with pytest.raises(DataError, match=r"eos_token is '<\|none\|>', which is no token"):
        load_tokenizer(tmp_path / "bare")


def test_a_document_that_is_changed_is_said_or_refused(qwen_like: Path) -> None:
    ours, contents = load_tokenizer(qwen_like), [b"plain", "caf\u0065\u0301".encode()]
    with pytest.raises(DataError, match=r"b'cafe.*' becomes b'caf.*' at byte 3; set data\.tokenizer\.allows"):
        make_shard(contents, 0.0, ours)
    shard = make_shard(contents, 0.0, ours, allows_changes=True)
    assert shard.changed.tolist() == [False, True]
    assert "at byte 3" in shard.changed_example.tobytes().decode()
    assert [tokens[-1] for tokens, _ in shard.documents()] == [ours.eos, ours.eos]
    assert shard.lengths.tolist() == [1 + len(ours.encode(content)) for content in contents]


def test_the_digest_is_of_the_meaning(qwen_like: Path, tmp_path: Path) -> None:
    transformers_of(qwen_like).save_pretrained(tmp_path / "saved")
    digest = load_tokenizer(qwen_like).digest
    assert load_tokenizer(tmp_path / "saved").digest == digest == tokenizer_digest(read_files(qwen_like), "")
    fields = json.loads((qwen_like / TOKENIZER_JSON).read_text())
    for change in ("normalizer", "pre_tokenizer"):
        assert tokenizer_digest({TOKENIZER_JSON: json.dumps(fields | {change: None}).encode()}, "") != digest
    # As older releases write it: merges as text, options that are off left out.
    model = {name: value for name, value in fields["model"].items() if value not in (None, False)}
    older = model | {"merges": [" ".join(pair) for pair in model["merges"]]}
    assert older != fields["model"]
    assert tokenizer_digest({TOKENIZER_JSON: json.dumps(fields | {"model": older}).encode()}, "") == digest
    fields["added_tokens"][-1]["id"] += 1
    assert tokenizer_digest({TOKENIZER_JSON: json.dumps(fields).encode()}, "") != digest


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"model": 3}', b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'],
)
def test_damage_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_JSON).write_bytes(content)
    with pytest.raises(DataError, match="tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_name_of_the_hub_is_fetched_or_refused_in_a_line(
    qwen_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns, TOKENIZER_JSON in allow_patterns))
        if name == "owner/none":
            raise OSError("cannot reach the hub\nof many lines")
        return str(qwen_like)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_tokenizer(find_tokenizer("owner/name")).eos == SIZE
    assert asked == [("owner/name", False, True)]
    with pytest.raises(
        DataError, match="the hub did not give it: cannot reach the hub; correct it, or"
    ) as error:
        find_tokenizer("owner/none")
    assert "\n" not in str(error.value)
    for path in ("some/tokenizer.json", "/not/there", "a b"):
        with pytest.raises(DataError, match="no such file or directory; correct it"):
            find_tokenizer(path)
    assert len(asked) == 2


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Ranks as of tiktoken, from the vocabulary of a trained tokenizer."""
    found = {tokenizer.decode([id]): id for id in range(len(SPECIAL), tokenizer.vocab_size)}
    return {token: rank for rank, token in enumerate(found)}


def rank_files(directory: Path) -> Iterator[tuple[str, bytes]]:
    lines = [b"%s %d" % (base64.b64encode(token), rank) for token, rank in ranks_of(TRAINED).items()]
    content = b"\n".join(lines) + b"\n"
    (directory / "some.tiktoken").write_bytes(content)
    decoder = {
        str(len(lines)): {"content": "[EOS]"},
        str(len(lines) + 1): {"content": "<think>", "special": False},
    }
    config = {"eos_token": "[EOS]", "added_tokens_decoder": decoder}
    (directory / TOKENIZER_CONFIG).write_text(json.dumps(config))
    yield "some.tiktoken", content


@pytest.mark.parametrize("pattern", [*PATTERNS])
def test_ids_are_those_of_tiktoken(pattern: str, tmp_path: Path) -> None:
    import tiktoken

    ranks = ranks_of(TRAINED)
    [(name, _)] = rank_files(tmp_path)
    special = {"[EOS]": len(ranks), "<think>": len(ranks) + 1}
    theirs = tiktoken.Encoding(
        "given", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special
    )
    files = read_files(tmp_path, pattern)
    (tmp_path / TOKENIZER_JSON).write_bytes(files[TOKENIZER_JSON])
    ours = load_tokenizer(tmp_path)
    assert (ours.eos, ours.vocab_size) == (len(ranks), theirs.n_vocab)

    @given(TEXT)
    @example("a<think>b [EOS]")
    @example(" ".join(TEXTS[:2]))
    def check(text: str) -> None:
        expected = theirs.encode(text, allowed_special={"<think>"}, disallowed_special=())
        assert ours.encode(text.encode()).tolist() == expected
        assert ours.decode(expected) == text.encode()

    check()
    with pytest.raises(DataError, match=r"set data\.tokenizer\.pattern"):
        from_ranks((tmp_path / name).read_bytes(), {}, None, name)


def test_ranks_that_are_cut_short_are_named(tmp_path: Path) -> None:
    [(name, content)] = rank_files(tmp_path)
    with pytest.raises(DataError, match=r"\d+ of 256 bytes have no rank"):
        from_ranks(content[:1000].rsplit(b"\n", 1)[0], {}, "qwen", name)
    with pytest.raises(DataError, match=rf"{name}:3: not a token in base64"):
        from_ranks(content.replace(b"\n", b"\n?\n", 3).replace(b"?\n", b"", 1), {}, "qwen", name)


def test_transformers_opens_a_trained_sentencepiece_model(tmp_path: Path) -> None:
    trained = train_tokenizer(TEXTS, 420)
    write_files(hub_files(trained), tmp_path)
    theirs = transformers_of(tmp_path)

    @given(TEXT)
    @example("  two  spaces\n\n\n and 12345 <s>")
    def check(text: str) -> None:
        # Sentencepiece's mark for a space, and NUL, are bytes to ours alone.
        plain = text.replace("\u2581", "").replace("\0", "")
        parts = [part for part in re.split("(<s>|</s>|<unk>)", plain) if part]
        if len(parts) == 1:
            assert theirs.encode(plain, add_special_tokens=False) == trained.encode(plain.encode()).tolist()
        assert theirs.decode(trained.encode(plain.encode()), clean_up_tokenization_spaces=False) == plain

    check()
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, 420)
    # Weights beside say which of the two forms their ids are of.
    assert load_tokenizer(tmp_path).digest != trained.digest
    (tmp_path / TOKENIZER_DIGEST).write_text(json.dumps({"sha256": trained.digest}))
    assert load_tokenizer(tmp_path).digest == trained.digest


def test_any_two_parts_of_a_token_are_merged() -> None:
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257, b"bc": 258}
    theirs = tiktoken.Encoding(
        "few", pat_str=PATTERNS["qwen"], mergeable_ranks=ranks, special_tokens={"[EOS]": 259}
    )
    content = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    decoder = {"eos_token": "[EOS]", "added_tokens_decoder": {"259": {"content": "[EOS]"}}}
    files = from_ranks(content, {TOKENIZER_CONFIG: json.dumps(decoder).encode()}, "qwen", "few")
    assert made_from(files, "few").encode(b"abcx").tolist() == theirs.encode("abcx") == [257, ord("x")]


def test_a_shard_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    store, contents = ShardStore(tmp_path), [b"one", b"two"]
    shard = make_shard(contents, 0.0, TRAINED)
    wanted = input_digest(map(content_hash, contents))
    store.write("a", shard)
    assert store.has("a", wanted)
    record = json.loads((tmp_path / "a.json").read_text())
    del record["form"]
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert not store.has("a", wanted)
