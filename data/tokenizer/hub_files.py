"""The files by which transformers opens the tokenizer of a dataset."""

import json
from typing import Any

import sentencepiece

from conf.tokenizer_files import GENERATION, SENTENCEPIECE, TOKENIZER_CONFIG, TOKENIZER_JSON
from data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from data.tokenizer.tokenizer import Tokenizer

_SPACE = "\u2581"
# How sentencepiece numbers its kinds of model.
_BPE = 2
CLASS = "PreTrainedTokenizerFast"


def hub_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a directory of the hub, by name: those that the tokenizer came with, and what they lack.

    A sentencepiece model that keeps every byte gets a tokenizer.json with the same ids for every text without
    U+2581, which sentencepiece's own form cannot tell from a space. Another one goes along as it is.
    """
    files = dict(tokenizer.files)
    if (
        isinstance(tokenizer, SentencePieceTokenizer)
        and tokenizer.keeps_bytes
        and _is_bpe(files[SENTENCEPIECE])
    ):
        files[TOKENIZER_JSON] = json.dumps(_bpe(files[SENTENCEPIECE]), ensure_ascii=False).encode()
    if TOKENIZER_JSON in files:
        files.setdefault(TOKENIZER_CONFIG, _config(tokenizer))
    files.setdefault(GENERATION, json.dumps(special_ids(tokenizer), indent=1).encode())
    return files


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of a config that begin and end a text; padding is the end where nothing else is named."""
    named = json.loads(tokenizer.files.get(TOKENIZER_CONFIG, b"{}")).get("pad_token")
    name = named.get("content") if isinstance(named, dict) else named
    pad = tokenizer.id_of(name) if isinstance(name, str) else None
    found = {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos if pad is None else pad}
    return found if tokenizer.bos is None else {"bos_token_id": tokenizer.bos, **found}


def _config(tokenizer: Tokenizer) -> bytes:
    fields: dict[str, Any] = {"tokenizer_class": CLASS, "clean_up_tokenization_spaces": False}
    for name, id in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        if id is not None:
            fields[name] = tokenizer.name_of(id)
    return json.dumps(fields, indent=1).encode()


def _proto(model: bytes) -> Any:
    # sentencepiece brings the description of its file, and wandb the library that reads it.
    from sentencepiece import sentencepiece_model_pb2 as form

    found: Any = form.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    found.ParseFromString(model)
    return found


def _is_bpe(model: bytes) -> bool:
    return _proto(model).trainer_spec.model_type == _BPE


def _bpe(model: bytes) -> dict[str, Any]:
    """The tokenizer.json of a BPE model with byte fallback."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    names = [processor.id_to_piece(id) for id in range(processor.vocab_size())]
    normal, special, own = list[int](), list[int](), list[int]()
    kinds = [piece.type for piece in _proto(model).pieces]
    for id, kind in enumerate(kinds):
        # Of sentencepiece's kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte.
        (normal if kind == 1 else own if kind == 4 else special if kind in (2, 3) else []).append(id)
    added = [_added(names[id], id, is_special=id in special) for id in sorted(special + own)]
    unknown = names[processor.unk_id()]
    decoders = [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": _replace(" ", _SPACE),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": False,
            "byte_fallback": True,
            "vocab": {name: id for id, name in enumerate(names)},
            "merges": _merges({names[id]: processor.get_score(id) for id in normal}),
        },
    }


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs that make a piece, the piece of the highest score first: sentencepiece joins any of them."""
    pairs = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        ways = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs += [(left, right) for left, right in ways if left in scores and right in scores]
    return pairs


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _added(name: str, id: int, *, is_special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": name, **plain, "special": is_special}
