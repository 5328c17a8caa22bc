"""Read the rows of a manifest in any of its formats; each format has a module in `formats`.

An error of the whole file raises ManifestError. An error of one row yields an UnreadableRow, and reading continues
after it. Files are not trusted: a few kilobytes of gzip can hold gigabytes, so everything is read within bounds.
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
APPENDABLE_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")


def read_raw_rows(
    path: Path,
    strict: bool = False,
    *,
    notes: ReadingNotes | None = None,
    interpret_lines: bool = False,
    own_columns: frozenset[str] = frozenset(),
    compat_0_1_0: bool = False,
) -> Iterator[ReaderItem]:
    """Yield every row in order; a blank row has no values. The arguments are those of `ReadingOptions`."""
    options = ReadingOptions(
        notes if notes is not None else ReadingNotes(), strict, interpret_lines, own_columns, compat_0_1_0
    )
    return READERS_BY_SUFFIX[detect_format(path)](path, options)


def detect_format(path: Path) -> str:
    """Return the suffix that determines the reader, without .gz; .parquet for a folder. Raises ManifestError."""
    suffix = Path(remove_gz_suffix(path)).suffix.lower()
    if suffix in READERS_BY_SUFFIX:
        return suffix
    if is_parquet_folder(path):
        return ".parquet"
    is_folder = os.path.isdir(path)  # noqa: PTH112 - False instead of an error for an impossible path
    hint = "; this is a folder, neither a job (no job.json) nor a table in Parquet files" if is_folder else ""
    raise ManifestError(
        f"{path}: manifests are {', '.join(READERS_BY_SUFFIX)} files, or one of these with .gz appended{hint}"
    )


def is_json_manifest(path: Path) -> bool:
    """Whether the manifest is JSON, where each row names its own columns."""
    return READERS_BY_SUFFIX.get(Path(remove_gz_suffix(path)).suffix.lower()) in (read_jsonl_rows, read_json_rows)


def read_extra_fields(path: Path, extra_names: Iterable[str], *, as_text: bool = False) -> list[pa.Field]:
    """Return the Arrow fields of the manifest's unknown columns in the results: Parquet's types, or text.

    Args:
        extra_names: Names of the unknown columns that the rows had.
        as_text: Keep the types of numbers only and convert all others to text, as 0.1.0 did.
    """
    names = list(extra_names)
    match detect_format(path):
        case ".csv" | ".tsv":
            header = read_csv_extra_names(path, set(names), compat_0_1_0=as_text)
            fields = [pa.field(name, pa.string()) for name in header]
        case ".parquet" | ".pq":
            fields = read_parquet_extra_fields(path, as_text=as_text)
        case _:
            fields = []
    typed_names = {field.name for field in fields}
    return fields + [pa.field(name, pa.string()) for name in names if name not in typed_names]


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


def can_append_rows(manifest: Path) -> bool:
    """Whether lines appended to the file are new rows. Appending to a JSON array changes how the file is read."""
    is_line_based = detect_format(manifest) in APPENDABLE_FORMATS and not is_gzipped(manifest)
    return is_line_based and not (is_json_manifest(manifest) and starts_with_bracket(manifest))
