"""Read manifests and check rows in tests."""

import gzip
from pathlib import Path
from typing import Any

from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.manifest.validate import RowDefaults, read_rows
from tinysd_batch.records import InvalidRow, Row

DEFAULTS = RowDefaults(
    negative_prompt="",
    prompt_syntax="seed",
    height=64,
    width=64,
    steps=25,
    scale=4.0,
    sampler="plms",
    eta=0.0,
    n_iter=1,
    n_samples=1,
    size_multiple_px=16,
)


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
