"""Where a tokenizer is read from: a file, a directory, or a name of the Hugging Face hub."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from conf.errors import DataError
from conf.tokenizer_files import BESIDE, SENTENCEPIECE, TOKENIZER_DIGEST, TOKENIZER_JSON
from data.durable import write_whole
from data.tokenizer.hugging_face import HuggingFaceTokenizer, meaning_digest, read_json
from data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from data.tokenizer.tiktoken_ranks import from_ranks, is_ranks
from data.tokenizer.tokenizer import Ends, Tokenizer

MAX_FILE_BYTES = 256 << 20
_RANKS_ENDING = ".tiktoken"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_AS_TOKENIZER_SAYS = Ends()


def load_tokenizer(path: Path, ends: Ends = _AS_TOKENIZER_SAYS, *, parses_special: bool = False) -> Tokenizer:
    """The tokenizer in a file or a directory, with these tokens around a document.

    Raises DataError when it cannot be used.
    """
    return made_from(read_files(path), str(path), ends, parses_special=parses_special)


def made_from(
    files: Mapping[str, bytes], origin: str, ends: Ends = _AS_TOKENIZER_SAYS, *, parses_special: bool = False
) -> Tokenizer:
    """The tokenizer that its files make, as `read_files` gives them. Raises DataError."""
    tokenizer: Tokenizer
    if TOKENIZER_JSON in files:
        tokenizer = HuggingFaceTokenizer(files, origin, parses_special=parses_special)
    else:
        tokenizer = SentencePieceTokenizer(files, origin)
    tokenizer.take_ends(ends, origin)
    return tokenizer


def tokenizer_digest(files: Mapping[str, bytes], origin: str) -> str:
    """`Tokenizer.digest` of the tokenizer that its files make, without loading it. Raises DataError."""
    if TOKENIZER_JSON in files:
        return meaning_digest(read_json(files[TOKENIZER_JSON], f"{origin}/{TOKENIZER_JSON}"))
    return hashlib.sha256(files[SENTENCEPIECE]).hexdigest()


def read_files(path: Path, pattern: str | None = None) -> dict[str, bytes]:
    """The files that make a tokenizer, by name: tokenizer.json or tokenizer.model, and those that go along.

    path is a file of any name or a directory. A file of tiktoken, whose words `pattern` cuts, becomes a
    tokenizer.json.

    Raises DataError where there is no tokenizer.
    """
    directory, model = (path, _model_in(path)) if path.is_dir() else (path.parent, path)
    content = _read(model)
    beside = {name: _read(directory / name) for name in BESIDE if (directory / name).is_file()}
    if model.suffix == ".json" or content.lstrip()[:1] == b"{":
        return {**beside, TOKENIZER_JSON: content}
    if is_ranks(content):
        return from_ranks(content, beside, pattern, str(model))
    # One that is given by itself has no others: a folder may hold the files of several.
    return {**(beside if path.is_dir() else {}), SENTENCEPIECE: content}


def write_files(files: Mapping[str, bytes], directory: Path) -> None:
    """Writes the files of a tokenizer, each whole. Raises OSError."""
    for name, content in files.items():
        write_whole(directory / name, content)


def find_tokenizer(model: str) -> Path:
    """What data.tokenizer.model names: a path that is there, else a name of the hub, which is fetched.

    Raises DataError where there is neither.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(model) or path.suffix in (".json", ".model", _RANKS_ENDING):
        raise DataError(f"data.tokenizer.model={model}: no such file or directory; correct it")
    from huggingface_hub import snapshot_download

    wanted = [TOKENIZER_JSON, SENTENCEPIECE, f"*{_RANKS_ENDING}", "tiktoken.model", *BESIDE]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    # Of the library, of what it fetches with, and of the network: none of them documented.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise DataError(
            f"data.tokenizer.model={model}: no such file or directory, and the hub did not give it: {why}; "
            "correct it, or fetch it where there is a network and give its directory"
        ) from error


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((directory / name).exists() for name in (TOKENIZER_JSON, SENTENCEPIECE))


def _model_in(directory: Path) -> Path:
    if (directory / SENTENCEPIECE).exists() and _is_said_to_be(directory, SENTENCEPIECE):
        return directory / SENTENCEPIECE
    for name in (TOKENIZER_JSON, SENTENCEPIECE, "tiktoken.model"):
        if (directory / name).exists():
            return directory / name
    if ranks := sorted(directory.glob(f"*{_RANKS_ENDING}")):
        return ranks[0]
    raise DataError(
        f"{directory}: holds no tokenizer: neither {TOKENIZER_JSON} nor {SENTENCEPIECE} nor *{_RANKS_ENDING}"
    )


def _is_said_to_be(directory: Path, name: str) -> bool:
    """Whether weights beside it name this file as the one whose ids they learned."""
    if not (directory / TOKENIZER_DIGEST).is_file():
        return False
    said = read_json(_read(directory / TOKENIZER_DIGEST), str(directory / TOKENIZER_DIGEST)).get("sha256")
    return said == hashlib.sha256(_read(directory / name)).hexdigest()


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path}: {size} bytes, it has at most {MAX_FILE_BYTES}; check the path")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the model: {error.strerror}; check the path") from error
