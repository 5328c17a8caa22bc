"""Read manifests a row at a time: CSV, TSV, JSONL and plain text here, Parquet in its own module, each also gzipped.

A fault of the whole file is a ManifestError. A fault of one row is a Fault, and reading goes on behind it. Files are
not trusted: a few kilobytes, packed, can hold gigabytes, so nothing is read that has no bound.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from tinysd_batch.config import excerpt
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.columns import Columns, has_surrogates, listed, match_columns, refuse_unknown, table_columns
from tinysd_batch.job.manifest_file import MAX_CELL_CHARACTERS, Fault, Line, open_unpacked, unpacked_name
from tinysd_batch.job.parquet import read_parquet, read_unknown_fields

MAX_RECORD_CHARACTERS = 262_144  # of one line, or of one CSV row over several lines


def read_lines(path: Path, strict: bool = False) -> Iterator[Line | Fault]:
    """Every row in order. `strict`: unknown columns are a fault."""
    return READERS[format_of(path)](path, strict)


def format_of(path: Path) -> str:
    """The suffix that says how to read the file, without .gz."""
    suffix = Path(unpacked_name(path)).suffix.lower()
    if suffix not in READERS:
        raise ManifestError(f"{path}: manifests are {', '.join(READERS)} files, or one of these with .gz behind it")
    return suffix


def is_jsonl(path: Path) -> bool:
    return READERS.get(Path(unpacked_name(path)).suffix.lower()) is read_jsonl


# Text


@contextmanager
def open_text(path: Path) -> Iterator["BoundedLines"]:
    """The lines of a text file. Bytes that are no UTF-8 arrive as lone surrogates, so that only their row is lost."""
    check_encoding(path)
    with open_unpacked(path) as file:
        yield BoundedLines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))


def check_encoding(path: Path) -> None:
    with open_unpacked(path) as file:
        start: bytes = file.read(4096)
    if not start.strip() and len(start) < 4096:
        raise ManifestError(f"{path}: the file is empty; it needs a prompt for each row")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start.split(b"\n", 1)[0]:
        raise ManifestError(f"{path}: not UTF-8 (it looks like UTF-16); save the file as UTF-8")


class BoundedLines:
    """Lines with their ends. One without an end raises csv.Error at the limit; the next call goes on behind it."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self.readline = file.readline
        self.number = 0  # of the last line read
        self.room = MAX_RECORD_CHARACTERS  # left for this record; who reads a new one sets it anew

    def __iter__(self) -> "BoundedLines":
        return self

    def __next__(self) -> str:
        line = self.readline(self.room + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > self.room:
            while line and line[-1] not in "\r\n":
                line = self.readline(MAX_RECORD_CHARACTERS)
            raise csv.Error(f"over {MAX_RECORD_CHARACTERS} characters")
        self.room -= len(line)
        return line


def read_records(reader: Iterator[Any], lines: BoundedLines, hint: str = "") -> Iterator[Any]:
    """What `reader` makes of each row's lines, or what is wrong with them."""
    while True:
        lines.room = MAX_RECORD_CHARACTERS
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Fault(f"line {lines.number}: {error}{hint}")


def read_csv(path: Path, strict: bool) -> Iterator[Line | Fault]:
    with open_text(path) as lines:
        reader, header = start_csv(path, lines)
        columns = table_columns(path, header, strict)
        for cells in read_records(reader, lines, "; check the quotes of this line and those before it"):
            if isinstance(cells, Fault):
                yield cells
            elif len(cells) == len(header):
                values = {name: cell for name, cell in zip(columns.names, cells, strict=True) if cell}
                yield Line(values, columns.shown)
            elif cells:  # a blank line is no row
                yield ragged(lines.number, cells, columns)


def start_csv(path: Path, lines: BoundedLines) -> tuple[Iterator[list[str]], tuple[str, ...]]:
    """A reader that stands behind the header, and the header."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    reader = csv.reader(lines, delimiter="\t" if format_of(path) == ".tsv" else ",", strict=True)
    try:
        return reader, tuple(name.strip() for name in next(reader, []))
    except csv.Error as error:
        raise ManifestError(f"{path}: header: {error}") from None


def ragged(number: int, cells: list[str], columns: Columns) -> Fault:
    reason = f"line {number}: {len(cells)} cells where the header has {len(columns.names)} columns"
    prompt = dict(zip(columns.names, cells, strict=False)).get("prompt")
    return Fault(f"{reason}; quote cells that hold commas, tabs or line ends", prompt)


def read_txt(path: Path, strict: bool) -> Iterator[Line | Fault]:  # noqa: ARG001 - a reader as the others are
    with open_text(path) as lines:
        for line in read_records(lines, lines):
            if isinstance(line, Fault):
                yield line
            elif line.strip():
                yield Line({"prompt": line.rstrip("\r\n")}, {})


# JSON lines


def read_jsonl(path: Path, strict: bool) -> Iterator[Line | Fault]:
    found: dict[str, None] = {}  # names met so far, while none of them is a prompt
    empty, prompts = True, False
    with open_text(path) as lines:
        for text in read_records(lines, lines):
            if not isinstance(text, Fault) and not text.strip():
                continue
            row = text if isinstance(text, Fault) else read_object(text, lines.number, strict)
            empty = False
            if isinstance(row, Fault):
                prompts = prompts or row.prompt is not None
            elif not prompts:
                prompts = "prompt" in row.shown
                found |= dict.fromkeys(list(row.values)[:8]) if len(found) < 8 else {}
            yield row
    if not (empty or prompts):
        raise ManifestError(f"{path}: no object with a key named prompt; found {listed(found)}")


def read_object(text: str, number: int, strict: bool) -> Line | Fault:
    """The object of one line, or what is wrong with it."""
    prompt = None
    try:
        keys = parse_object(text)
        columns = match_columns(tuple(keys))
        named = dict(zip(columns.names, keys.values(), strict=True))
        prompt = named.get("prompt")
        if strict:
            refuse_unknown(columns)
        values = {name: json_cell(name, value, columns) for name, value in named.items() if value not in (None, "")}
    except (ValueError, RecursionError) as error:
        return Fault(f"line {number}: {told(error)}", prompt if isinstance(prompt, str) else None)
    return Line(values, columns.shown)


def parse_object(text: str) -> dict[str, Any]:
    """Raises ValueError or RecursionError."""
    if has_surrogates(text):
        raise ValueError("not UTF-8; save the file as UTF-8")
    value = DECODER.decode(text.rstrip())
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if "\\ud" in text.lower() and has_surrogates(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half a character: a \\u escape of a surrogate pair without its other half")
    return value


def told(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"not a JSON object: {error.msg} at character {error.pos + 1}"
        case RecursionError():
            return "nested too deep"
    return str(error)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {excerpt(min(name for name in values if names.count(name) > 1))} stands there twice")
    return values


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant)


def json_cell(name: str, value: Any, columns: Columns) -> Any:
    """Known keys hold single values; what unknown ones hold is kept as text, as JSON where it is none."""
    if name not in columns.shown:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | dict):
        raise ValueError(f"column {columns.shown[name]}: a single value was expected")
    return value


# The manifest's own columns


def read_extra_fields(path: Path, seen: Iterable[str]) -> list[pa.Field]:
    """Unknown columns as the results will hold them: Parquet's numbers kept, all else text.

    `seen` are the names that the rows had, which are all there is to know of a JSONL file's.
    """
    match format_of(path):
        case ".csv" | ".tsv":
            with open_text(path) as lines:
                _, header = start_csv(path, lines)
            return [pa.field(name, pa.string()) for name in table_columns(path, header, strict=False).unknown]
        case ".parquet" | ".pq":
            return read_unknown_fields(path)
    return [pa.field(name, pa.string()) for name in seen]


READERS: dict[str, Callable[[Path, bool], Iterator[Line | Fault]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".pq": read_parquet,
    ".txt": read_txt,
}
