"""Read manifests a row at a time, in whatever format; each has a module of its own.

A fault of the whole file is a ManifestError. A fault of one row is a Fault, and reading goes on behind it. Files are
not trusted: a few kilobytes, packed, can hold gigabytes, so nothing is read that has no bound.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.files import (
    is_folder_of_parts,
    is_packed,
    unpacked_name,
)
from tinysd_batch.job.manifest.formats.csv_table import read_csv, read_unknown_names
from tinysd_batch.job.manifest.formats.json_rows import begins_with_bracket, read_json, read_jsonl
from tinysd_batch.job.manifest.formats.parquet import read_parquet, read_unknown_fields
from tinysd_batch.job.manifest.formats.prompt_lines import read_txt
from tinysd_batch.job.manifest.raw_rows import ReadingOptions, RowRead
from tinysd_batch.job.manifest.reading_notes import ReadingNotes

Reader = Callable[[Path, ReadingOptions], Iterator[RowRead]]


def read_lines(
    path: Path,
    strict: bool = False,
    *,
    notes: ReadingNotes | None = None,
    interpret_lines: bool = False,
    as_0_1_0: bool = False,
) -> Iterator[RowRead]:
    """Every row in order; a blank one has no values. The arguments are those of `ReadingOptions`."""
    options = ReadingOptions(notes if notes is not None else ReadingNotes(), strict, interpret_lines, as_0_1_0)
    return READERS[format_of(path)](path, options)


def format_of(path: Path) -> str:
    """The suffix that says how to read the file, without .gz; that of its parts for a folder."""
    suffix = Path(unpacked_name(path)).suffix.lower()
    if suffix in READERS:
        return suffix
    if is_folder_of_parts(path):
        return ".parquet"
    is_folder = os.path.isdir(path)  # noqa: PTH112 - what is no path is no folder, and no error
    folder = "; this is a folder, neither a job (no job.json) nor a table in Parquet files" if is_folder else ""
    raise ManifestError(f"{path}: manifests are {', '.join(READERS)} files, or one of these with .gz behind it{folder}")


def is_jsonl(path: Path) -> bool:
    """Whether each row names its own columns."""
    return READERS.get(Path(unpacked_name(path)).suffix.lower()) in (read_jsonl, read_json)


def read_extra_fields(path: Path, seen: Iterable[str], *, as_text: bool = False) -> list[pa.Field]:
    """Unknown columns as the results will hold them: of the type that Parquet gives them, all else text.

    `seen` are the names that the rows had. `as_text` keeps numbers only, and all else as text: so did jobs begin whose
    rows were read before other types were kept.
    """
    names = list(seen)
    match format_of(path):
        case ".csv" | ".tsv":
            fields = [pa.field(name, pa.string()) for name in read_unknown_names(path, set(names), as_0_1_0=as_text)]
        case ".parquet" | ".pq":
            fields = read_unknown_fields(path, as_text=as_text)
        case _:
            fields = []
    there = {field.name for field in fields}
    return fields + [pa.field(name, pa.string()) for name in names if name not in there]


READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".pq": read_parquet,
    ".txt": read_txt,
}


GROWING = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")  # files to which lines are appended


def can_grow(manifest: Path) -> bool:
    """Whether lines behind such a file are new rows; with one behind it, a JSON array is read otherwise."""
    is_growing = format_of(manifest) in GROWING and not is_packed(manifest)
    return is_growing and not (is_jsonl(manifest) and begins_with_bracket(manifest))
