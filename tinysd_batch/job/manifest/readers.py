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
    is_gzipped,
    is_parquet_folder,
    remove_gz_suffix,
)
from tinysd_batch.job.manifest.formats.csv_table import read_csv_extra_names, read_csv_rows
from tinysd_batch.job.manifest.formats.json_rows import read_json_rows, read_jsonl_rows, starts_with_bracket
from tinysd_batch.job.manifest.formats.parquet import read_parquet_extra_fields, read_parquet_rows
from tinysd_batch.job.manifest.formats.prompt_lines import read_txt_rows
from tinysd_batch.job.manifest.raw_rows import ReaderItem, ReadingOptions
from tinysd_batch.job.manifest.reading_notes import ReadingNotes

ManifestReader = Callable[[Path, ReadingOptions], Iterator[ReaderItem]]


def read_raw_rows(
    path: Path,
    strict: bool = False,
    *,
    notes: ReadingNotes | None = None,
    interpret_lines: bool = False,
    compat_0_1_0: bool = False,
) -> Iterator[ReaderItem]:
    """Every row in order; a blank one has no values. The arguments are those of `ReadingOptions`."""
    options = ReadingOptions(notes if notes is not None else ReadingNotes(), strict, interpret_lines, compat_0_1_0)
    return READERS_BY_SUFFIX[detect_format(path)](path, options)


def detect_format(path: Path) -> str:
    """The suffix that says how to read the file, without .gz; that of its parts for a folder."""
    suffix = Path(remove_gz_suffix(path)).suffix.lower()
    if suffix in READERS_BY_SUFFIX:
        return suffix
    if is_parquet_folder(path):
        return ".parquet"
    is_folder = os.path.isdir(path)  # noqa: PTH112 - what is no path is no folder, and no error
    folder = "; this is a folder, neither a job (no job.json) nor a table in Parquet files" if is_folder else ""
    raise ManifestError(
        f"{path}: manifests are {', '.join(READERS_BY_SUFFIX)} files, or one of these with .gz behind it{folder}"
    )


def is_json_manifest(path: Path) -> bool:
    """Whether each row names its own columns."""
    return READERS_BY_SUFFIX.get(Path(remove_gz_suffix(path)).suffix.lower()) in (read_jsonl_rows, read_json_rows)


def read_extra_fields(path: Path, seen: Iterable[str], *, as_text: bool = False) -> list[pa.Field]:
    """Unknown columns as the results will hold them: of the type that Parquet gives them, all else text.

    `seen` are the names that the rows had. `as_text` keeps numbers only, and all else as text: so did jobs begin whose
    rows were read before other types were kept.
    """
    names = list(seen)
    match detect_format(path):
        case ".csv" | ".tsv":
            fields = [
                pa.field(name, pa.string()) for name in read_csv_extra_names(path, set(names), compat_0_1_0=as_text)
            ]
        case ".parquet" | ".pq":
            fields = read_parquet_extra_fields(path, as_text=as_text)
        case _:
            fields = []
    there = {field.name for field in fields}
    return fields + [pa.field(name, pa.string()) for name in names if name not in there]


READERS_BY_SUFFIX: dict[str, ManifestReader] = {
    ".csv": read_csv_rows,
    ".tsv": read_csv_rows,
    ".jsonl": read_jsonl_rows,
    ".ndjson": read_jsonl_rows,
    ".json": read_json_rows,
    ".parquet": read_parquet_rows,
    ".pq": read_parquet_rows,
    ".txt": read_txt_rows,
}


APPENDABLE_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")  # files to which lines are appended


def can_append_rows(manifest: Path) -> bool:
    """Whether lines behind such a file are new rows; with one behind it, a JSON array is read otherwise."""
    is_growing = detect_format(manifest) in APPENDABLE_FORMATS and not is_gzipped(manifest)
    return is_growing and not (is_json_manifest(manifest) and starts_with_bracket(manifest))
