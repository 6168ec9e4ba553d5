"""Small JSON files that a run cannot do without, each with a digest of its own, so that damage shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import CheckpointError, as_storage_error
from data.durable import refuse_not_finite, sha256_of
from train.checkpoint.atomic import write_atomically
from train.checkpoint.transient import PASSING, retried

_DIGEST = "sha256"


def write_record(path: Path, fields: Mapping[str, Any]) -> None:
    """Replaces `path` by the fields and their digest. Raises StorageError; the old file is then untouched."""
    plain = json.loads(json.dumps(fields))
    write_atomically(path, (json.dumps({_DIGEST: sha256_of(plain), **plain}, indent=2) + "\n").encode())


def read_record(path: Path) -> dict[str, Any] | None:
    """The fields as they were written; None where there is no file.

    A file without digest, as versions before 2026-11-29 wrote, is taken as it is. Raises CheckpointError for
    one that is damaged, changed by hand, or may not be read, StorageError where storage fails, several times.
    """
    try:
        fields = json.loads(retried(path.read_bytes), parse_constant=refuse_not_finite)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in PASSING:
            raise as_storage_error(error, path, "read") from error
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: no JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: damaged: found a {type(fields).__name__}, expected an object")
    expected = fields.pop(_DIGEST, None)
    if expected is not None and sha256_of(fields) != expected:
        raise CheckpointError(f"{path}: damaged, or changed by hand: its sha256 is not the one written in it")
    return fields
