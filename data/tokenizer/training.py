"""Tokenizers trained on a sample of the documents."""

import io
import json
import re
import string
from collections.abc import Iterable
from typing import get_args

import sentencepiece

from conf.errors import DataError
from conf.tokenizer_files import SENTENCEPIECE, TOKENIZER_CONFIG, TOKENIZER_JSON
from data.config import TokenizerKind
from data.tokenizer.files import made_from
from data.tokenizer.pre_tokenizers import PATTERNS
from data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from data.tokenizer.tokenizer import Tokenizer

_BOS, _EOS, _PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
# Those of fill-in-the-middle stand in every vocabulary, so that it can be asked for later.
SPECIAL = (_BOS, _EOS, _PAD, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_REQUIRED_CHARACTERS = "\t\n\r" + string.digits + string.ascii_letters + string.punctuation


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, kind: TokenizerKind = "sentencepiece"
) -> Tokenizer:
    """A tokenizer with exactly `vocab_size` ids that keeps any text; the same texts give the same bytes.

    sentencepiece: BPE with byte fallback, where words, digits and punctuation never share a piece and a run
    of spaces or newlines may be one. byte_level_bpe: a tokenizer.json whose words are cut as GPT-4's are.

    Raises DataError when the texts are too few for so many pieces.
    """
    assert kind in get_args(TokenizerKind), f"{kind=}"
    train = _train_sentencepiece if kind == "sentencepiece" else _train_bpe
    return train(texts, vocab_size)


def _train_sentencepiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=True,
            split_by_unicode_script=True,
            split_by_number=True,
            split_digits=True,
            max_sentencepiece_length=24,
            # Characters rarer than this cost a piece each and are as well spelt in bytes.
            character_coverage=0.9995,
            required_chars=_REQUIRED_CHARACTERS,
            max_sentence_length=1 << 20,
            # One thread: the model must not depend on the machine.
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_cannot_train(vocab_size, str(error))) from error
    return SentencePieceTokenizer({SENTENCEPIECE: model.getvalue()}, "the trained tokenizer")


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trained

    trained = Trained(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS["cl100k"]), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(iter(texts), trainer)
    if (found := trained.get_vocab_size()) < vocab_size:
        raise DataError(_too_few(vocab_size, found))
    names = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": _PAD}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    files = {TOKENIZER_JSON: trained.to_str(), TOKENIZER_CONFIG: json.dumps(config, indent=1)}
    return made_from({name: text.encode() for name, text in files.items()}, "the trained tokenizer")


def _cannot_train(vocab_size: int, message: str) -> str:
    limit = re.search(r"value <= (\d+)", message)
    if limit:
        return _too_few(vocab_size, int(limit[1]))
    said = f"sentencepiece says: {message.splitlines()[0]}"
    return f"data.tokenizer.vocab_size={vocab_size}: {said}; raise it, or add documents"


def _too_few(vocab_size: int, found: int) -> str:
    fix = f"set it to {found} or less, or add documents"
    return f"data.tokenizer.vocab_size={vocab_size}: the text has pieces for only {found}; {fix}"
