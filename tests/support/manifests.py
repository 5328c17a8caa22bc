"""Read manifests and check rows in tests."""

import gzip
from pathlib import Path
from typing import Any

from tests.support.settings import make_settings
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.manifest.validate import RowDefaults, read_rows
from tinysd_batch.model.checkpoint.info import read_model_info
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.settings.schema import EMBEDDED_MODEL

DEFAULTS = RowDefaults(make_settings(height=64, width=64, steps=25, scale=4.0), read_model_info(EMBEDDED_MODEL))


def read_all_rows(path: Path) -> list[Row | InvalidRow]:
    return list(read_rows(path, DEFAULTS))


def get_reason(row: Row | InvalidRow) -> str:
    assert isinstance(row, InvalidRow), row
    return row.reason


def write_and_read(path: Path, content: str | bytes, **options: Any) -> tuple[list[Row | InvalidRow], list[str]]:
    """Write a file with that content; return its rows and the reader's notes."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    notes = ReadingNotes()
    return list(read_rows(path, DEFAULTS, notes=notes, **options)), list(notes.lines())
