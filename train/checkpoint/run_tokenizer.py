"""The tokenizer of a run, kept in its directory: whoever exports weights needs no dataset."""

from pathlib import Path

from pydantic import ValidationError

from conf.errors import CheckpointError, as_storage_error
from data.card import TokenizerCard, read_card
from data.durable import write_whole
from data.tokenizer.files import has_tokenizer, read_files, tokenizer_digest, write_files
from data.tokenizer.tokenizer import Tokenizer

TOKENIZER = "tokenizer"
# The tokens around a document as the run has them; the files may say others.
CARD = "card.json"


def keep_tokenizer(run: Path, tokenizer: Tokenizer, card: TokenizerCard) -> None:
    """Writes the tokenizer of a dataset into the directory of a run. Raises StorageError."""
    directory = run / TOKENIZER
    try:
        directory.mkdir(exist_ok=True)
        write_files(tokenizer.files, directory)
        write_whole(directory / CARD, card.model_dump_json(indent=1).encode())
    except OSError as error:
        raise as_storage_error(error, directory) from error


def read_tokenizer(run: Path, dataset: Path, digest: str | None) -> Tokenizer | None:
    """The tokenizer with this digest, out of the run or else its dataset; None where neither has it.

    Raises CheckpointError and DataError for one that is damaged.
    """
    kept = run / TOKENIZER
    if (kept / CARD).exists() and _is(kept, digest):
        try:
            card = TokenizerCard.model_validate_json((kept / CARD).read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(f"{kept / CARD}: damaged: delete {kept} to take the dataset's") from error
        return card.load(kept)
    if _is(dataset, digest):
        return read_card(dataset).tokenizer.load(dataset)
    return None


def _is(directory: Path, digest: str | None) -> bool:
    return has_tokenizer(directory) and tokenizer_digest(read_files(directory), str(directory)) == digest
