"""Adopt image files that a lost worker wrote."""

import hashlib
from pathlib import Path
from types import UnionType
from typing import Any, TypeGuard

from tinysd_batch.config import MAX_SEED
from tinysd_batch.records import ImageRequest, ImageResult, Status
from tinysd_batch.storage.atomic import MAX_FILE_BYTES, storage_errors, sync_existing_file
from tinysd_batch.text import has_surrogates, make_printable

MAX_TOKEN_COUNT = 2**31 - 1  # of tokens, as the table holds it

# The columns that are stored inside the image, for a run that adopts it. No host names: people share images. No
# measurements: equal settings on one machine give equal files.
EMBEDDED_COLUMNS: dict[str, type | UnionType] = {
    "n_tokens": int | None,
    "truncated": str | None,
    "negative_truncated": str | None,
    "precision": str,
    "degraded": list,
    "device_name": str,
}

METADATA_SCHEMA_VERSION = 2

EMBEDDED_COLUMNS_BY_SCHEMA: dict[int, dict[str, type | UnionType]] = {  # the stored columns by the metadata's schema
    1: EMBEDDED_COLUMNS
    | {"text_s": int | float, "denoise_s": int | float, "decode_s": int | float, "peak_memory_bytes": int},
    METADATA_SCHEMA_VERSION: EMBEDDED_COLUMNS,
}


def adopt_image(job_folder: Path, request: ImageRequest) -> ImageResult | None:
    """The result of an image that is on disk already: a worker that died after the file and before its row left it.

    The file is made durable before it is reported. Raises StorageError.
    """
    path = job_folder / request.file_name
    with storage_errors(path):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        data = path.read_bytes()
    made = read_embedded_record(data, request)
    if made is None:
        return None
    sync_existing_file(path)
    return add_file_columns(ImageResult(request.index, Status.OK, **made), request, data)


def add_file_columns(result: ImageResult, request: ImageRequest, data: bytes) -> ImageResult:
    result.file_name = request.file_name
    result.sha256 = hashlib.sha256(data).hexdigest()
    result.bytes = len(data)
    return result


def read_embedded_record(data: bytes, request: ImageRequest) -> dict[str, Any] | None:
    """What a file says of how it was made, if it is the whole image asked for in size and format, by its own word."""
    from tinysd_batch.images import is_complete_file, read_metadata

    suffix = request.file_name.rpartition(".")[2]
    _, found = read_metadata(data, (request.params.width, request.params.height), [suffix])
    schema, made = found.get("schema"), found.get("made")
    columns = EMBEDDED_COLUMNS_BY_SCHEMA.get(schema) if type(schema) is int else None
    if columns is None or found.get("image_id") != request.image_id or not is_complete_file(data, suffix):
        return None
    return made if is_valid_record(made, columns) else None


def is_valid_record(made: object, columns: dict[str, type | UnionType]) -> TypeGuard[dict[str, Any]]:
    """Whether what a file holds fits the table: anybody may have written the file."""
    return (
        isinstance(made, dict)
        and made.keys() == columns.keys()
        and all(isinstance(made[name], kind) for name, kind in columns.items())
        and all(isinstance(step, str) for step in made["degraded"])
        and all(make_printable(text) == text for text in [*made["degraded"], made["precision"], made["device_name"]])
        and not any(isinstance(value, bool) or is_unstorable(value) for value in made.values())
        and abs(made["n_tokens"] or 0) <= MAX_TOKEN_COUNT
    )


def is_unstorable(value: object) -> bool:
    """Numbers too large, or half characters, which the table cannot hold."""
    if isinstance(value, str):
        return has_surrogates(value)
    return isinstance(value, int | float) and not abs(value) < MAX_SEED
