"""Adopt image files that are on disk without a row in the results: a lost worker wrote them and did not report them."""

import hashlib
from pathlib import Path
from types import UnionType
from typing import Any, TypeGuard

from tinysd_batch.job.results.columns import EMBEDDED_COLUMNS
from tinysd_batch.records import ImageRequest, ImageResult, Status
from tinysd_batch.settings.limits import MAX_SEED
from tinysd_batch.storage.atomic import MAX_FILE_BYTES, sync_existing_file
from tinysd_batch.storage.filesystem import storage_errors
from tinysd_batch.text import has_surrogates, make_printable

MAX_TOKEN_COUNT = 2**31 - 1  # the largest int32, the column's type

METADATA_SCHEMA_VERSION = 2
EMBEDDED_COLUMNS_BY_SCHEMA: dict[int, dict[str, type | UnionType]] = {
    1: EMBEDDED_COLUMNS
    | {"text_s": int | float, "denoise_s": int | float, "decode_s": int | float, "peak_memory_bytes": int},
    METADATA_SCHEMA_VERSION: EMBEDDED_COLUMNS,
}


def adopt_image(job_folder: Path, request: ImageRequest) -> ImageResult | None:
    """Return the result of an image whose file is on disk already, or None. The file is synced first.

    Raises:
        StorageError: the file cannot be read or synced.
    """
    path = job_folder / request.file_name
    with storage_errors(path):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        data = path.read_bytes()
    record = read_embedded_record(data, request)
    if record is None:
        return None
    sync_existing_file(path)
    return add_file_columns(ImageResult(request.index, Status.OK, **record), request, data)


def add_file_columns(result: ImageResult, request: ImageRequest, data: bytes) -> ImageResult:
    result.file_name = request.file_name
    result.sha256 = hashlib.sha256(data).hexdigest()
    result.bytes = len(data)
    return result


def read_embedded_record(data: bytes, request: ImageRequest) -> dict[str, Any] | None:
    """Return the columns stored in a file, or None unless it is a complete image of this request, by its metadata."""
    from tinysd_batch.images import is_complete_file, read_metadata

    suffix = request.file_name.rpartition(".")[2]
    _, metadata = read_metadata(data, (request.settings.width, request.settings.height), [suffix])
    schema, record = metadata.get("schema"), metadata.get("made")
    columns = EMBEDDED_COLUMNS_BY_SCHEMA.get(schema) if type(schema) is int else None
    if columns is None or metadata.get("image_id") != request.image_id or not is_complete_file(data, suffix):
        return None
    return record if is_valid_record(record, columns) else None


def is_valid_record(record: object, columns: dict[str, type | UnionType]) -> TypeGuard[dict[str, Any]]:
    """Whether the record fits the results table. The file may come from anywhere."""
    return (
        isinstance(record, dict)
        and record.keys() == columns.keys()
        and all(isinstance(record[name], column_type) for name, column_type in columns.items())
        and all(isinstance(fallback, str) for fallback in record["degraded"])
        and all(
            make_printable(text) == text for text in [*record["degraded"], record["precision"], record["device_name"]]
        )
        and not any(isinstance(value, bool) or is_unstorable(value) for value in record.values())
        and abs(record["n_tokens"] or 0) <= MAX_TOKEN_COUNT
    )


def is_unstorable(value: object) -> bool:
    """Whether the table cannot hold a value: text with surrogates, or a number that is too large."""
    if isinstance(value, str):
        return has_surrogates(value)
    return isinstance(value, int | float) and not abs(value) < MAX_SEED
