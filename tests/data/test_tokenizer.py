import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from conf.errors import DataError
from conf.tokenizer_files import SENTENCEPIECE
from data.tokenizer import sentencepiece_model
from data.tokenizer.files import MAX_FILE_BYTES, load_tokenizer, read_files, tokenizer_digest
from data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from data.tokenizer.tokenizer import Ends
from data.tokenizer.training import train_tokenizer

TEXTS = ["def total(values):\n        return sum(values)\n\n\tindex = 1234 + naïve\r\n" * 20] * 4
TRAINED = train_tokenizer(TEXTS, 400)


def train_otherwise(**changes: Any) -> bytes:
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **(settings | changes)
    )
    return model.getvalue()


@given(st.binary(max_size=200))
@example(b"\0\xff\xc3\x28 \xe2\x96\x81 ")
@example(b"\xed\xa0\x80\xed\xb0\x80")  # surrogates in UTF-8
@example(b"\xef\xbb\xbfa\r\nb\rc\n")
@example("\u2581 \u2581".encode())
def test_any_bytes_survive(content: bytes) -> None:
    assert TRAINED.decode(TRAINED.encode(content)) == content


@given(st.text(max_size=200))
@example("<s></s><unk><0x41> \ufb01 e\u0301 \U0001f600")
@example("   leading, trailing   \t\n ")
def test_any_text_survives(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text.encode("utf-8", "surrogatepass"))) == text.encode(
        "utf-8", "surrogatepass"
    )


@given(st.binary(max_size=300), st.sampled_from([1, 3, 16]))
def test_long_documents_survive_their_cuts(content: bytes, block_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_model, "_BLOCK_BYTES", block_bytes)
        assert TRAINED.decode(TRAINED.encode(content)) == content


def test_ids_are_in_the_vocabulary_and_text_holds_no_control_id() -> None:
    ids = TRAINED.encode(b"<s>def</s><unk>\0" + bytes(range(256)))
    assert ids.dtype == "int32"
    assert ids.min() >= 0
    assert ids.max() < TRAINED.vocab_size == 400
    assert not {TRAINED.bos, TRAINED.eos, 0} & set(ids.tolist())
    assert TRAINED.decode([TRAINED.bos, *TRAINED.encode(b"x").tolist(), TRAINED.eos]) == b"x"


def test_a_batch_is_its_parts() -> None:
    contents = [b"def total", b"", b"\xff"]
    for ids, content in zip(TRAINED.encode_batch(contents), contents, strict=True):
        assert ids.tolist() == TRAINED.encode(content).tolist()


def test_pieces_suit_source_code() -> None:
    def pieces(text: str) -> list[bytes]:
        return [TRAINED.decode([id]) for id in TRAINED.encode(text.encode()).tolist()]

    assert pieces("\n        return")[1] == b"        "
    assert pieces("1234") == [b"1", b"2", b"3", b"4"]
    assert b"\t" in pieces("\tindex")
    assert len(pieces("{~}@\r\n")) <= 6  # printable ASCII never falls back to bytes beyond one each


def test_training_is_deterministic() -> None:
    assert train_tokenizer(iter(TEXTS), 400).digest == TRAINED.digest
    assert train_tokenizer(TEXTS, 401).digest != TRAINED.digest


def test_more_pieces_than_the_text_has_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab_size=5000: .* only \d+; set it to"):
        train_tokenizer(TEXTS, 5000)
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab_size=4096: "):
        train_tokenizer([], 4096)


def test_files_load_with_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(TRAINED.files[SENTENCEPIECE])
    loaded = load_tokenizer(path)
    assert loaded.digest == TRAINED.digest == tokenizer_digest(read_files(tmp_path), "")
    assert (loaded.bos, loaded.eos, loaded.vocab_size) == (1, 2, 400)


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 50, TRAINED.files[SENTENCEPIECE][:1500]], ids=["empty", "noise", "cut"]
)
def test_what_is_not_a_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"{path}: {len(content)} bytes that are no sentencepiece model"
    ) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_a_huge_or_absent_file_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(path)
    with path.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(DataError, match=f"at most {MAX_FILE_BYTES}"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False, "vocab_size": 100},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_models_that_normalise_encode_as_sentencepiece_does(changes: dict[str, object]) -> None:
    model = train_otherwise(**changes)
    tokenizer = SentencePieceTokenizer({SENTENCEPIECE: model})
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "  def total(values):\n\treturn sum( values )  na\u0131ve \ufb01 e\u0301 \u2581x\n" * 200
    assert not tokenizer.keeps_bytes
    ids = tokenizer.encode(text.encode())
    assert ids.tolist() == processor.encode(text)
    assert tokenizer.decode(ids) == processor.decode(ids.tolist()).encode() != text.encode()
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        tokenizer.encode(b"a\xff")


def test_ends_are_those_of_the_model_or_those_asked_for(tmp_path: Path) -> None:
    (tmp_path / SENTENCEPIECE).write_bytes(
        train_otherwise(bos_id=-1, eos_id=-1, user_defined_symbols=["<end>"])
    )
    with pytest.raises(DataError, match=r"says no token that ends a text; name one .*data\.tokenizer\.eos"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"data\.tokenizer\.eos=<stop>: .* has no such token"):
        load_tokenizer(tmp_path, Ends(eos="<stop>"))
    asked = load_tokenizer(tmp_path, Ends(eos="<end>"))
    assert (asked.bos, asked.decode([asked.eos])) == (None, b"<end>")
    (tmp_path / SENTENCEPIECE).write_bytes(TRAINED.files[SENTENCEPIECE])
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(tmp_path, Ends(bos="")).bos is None
    # What stands beside it goes along.
    assert load_tokenizer(tmp_path).files["chat_template.jinja"] == b"{{ messages }}"
    assert load_tokenizer(tmp_path, Ends(bos=2)).bos == 2
