"""Read manifests a row at a time: CSV, TSV, JSONL, Parquet and plain text, each also gzipped.

A fault of the whole file is a ManifestError. A fault of one row is a Fault, and reading goes on behind it. Files are
not trusted: a few kilobytes, packed, can hold gigabytes, so nothing is read that has no bound.
"""

import csv
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinysd_batch.config import MAX_PROMPT_CHARACTERS, excerpt
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.columns import ColumnError, Columns, has_surrogates, match_columns, refuse_unknown
from tinysd_batch.storage import check_regular

MAX_CELL_CHARACTERS = 131_072
MAX_RECORD_CHARACTERS = 262_144  # of one line, or of one CSV row over several lines
MAX_UNPACKED_BYTES = 4 << 30  # of a .parquet.gz, which must be unpacked whole
PARQUET_BATCH_ROWS = 1024
PARQUET_SPARE_BYTES = 64 << 20  # what a row group may hold besides MAX_PROMPT_CHARACTERS a row
SEPARATORS = {";": "semicolons", "\t": "tabs"}


class Line(NamedTuple):
    """A row as the file gives it, without the cells that are empty."""

    values: dict[str, Any]  # known columns under our names
    shown: Mapping[str, str]  # our name -> the file's


class Fault(NamedTuple):
    """A row that cannot be read."""

    reason: str
    prompt: str | None = None


class BadCell(NamedTuple):
    """A cell that cannot be used."""

    reason: str


def read_lines(path: Path, strict: bool = False) -> Iterator[Line | Fault]:
    """Every row in order. `strict`: unknown columns are a fault."""
    return READERS[format_of(path)](path, strict)


# Files


def format_of(path: Path) -> str:
    """The suffix that says how to read the file, without .gz."""
    suffix = Path(unpacked_name(path)).suffix.lower()
    if suffix not in READERS:
        raise ManifestError(f"{path}: manifests are {', '.join(READERS)} files, or one of these with .gz behind it")
    return suffix


def is_jsonl(path: Path) -> bool:
    return READERS.get(Path(unpacked_name(path)).suffix.lower()) is read_jsonl


def is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def unpacked_name(path: Path) -> str:
    return path.stem if is_packed(path) else path.name


def bare_name(path: Path) -> str:
    """The file's name without the suffixes that say how to read it."""
    return Path(unpacked_name(path)).stem


def open_manifest(path: Path) -> Any:
    try:
        check_regular(path)
        return path.open("rb")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None


@contextmanager
def open_unpacked(path: Path) -> Iterator[Any]:
    """The file's bytes, unpacked as they are read. A fault met while reading is a ManifestError."""
    with open_manifest(path) as raw:
        try:
            yield gzip.GzipFile(fileobj=raw) if is_packed(path) else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ManifestError(f"{path}: damaged or cut off gzip: {first_line(error)}; pack it again") from None
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from None


@contextmanager
def open_whole(path: Path) -> Iterator[Any]:
    """A file that can be read in any order, which Parquet needs."""
    with open_unpacked(path) as file:
        if not is_packed(path):
            yield file
            return
        with tempfile.TemporaryFile() as whole:
            while block := file.read(1 << 20):
                whole.write(block)
                if whole.tell() > MAX_UNPACKED_BYTES:
                    raise ManifestError(f"{path}: over {MAX_UNPACKED_BYTES:,} bytes unpacked; unpack it yourself")
            whole.seek(0)
            yield whole


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


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# Text


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


def table_columns(path: Path, names: Iterable[str], strict: bool) -> Columns:
    """The columns of a file that names them once. Raises ManifestError."""
    header = tuple(names)
    try:
        columns = match_columns(header)
        if "prompt" not in columns.shown:
            raise ColumnError(f"no column named prompt; found {listed(header)}{separator_hint(header)}")
        if strict:
            refuse_unknown(columns)
    except ColumnError as error:
        raise ManifestError(f"{path}: header: {error}") from None
    return columns


def listed(names: Iterable[str]) -> str:
    return ", ".join(excerpt(name, 20) for name in list(names)[:8]) or "nothing"


def separator_hint(header: tuple[str, ...]) -> str:
    for separator, name in SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            return f"; its cells seem to be split by {name}: save it with commas, or with tabs as .tsv"
    return ""


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


# Parquet


def read_parquet(path: Path, strict: bool) -> Iterator[Line | Fault]:
    """Text is read as references to its different values: a small file can repeat a huge one many times."""
    with open_whole(path) as whole, parquet_errors(path):
        file = pq.ParquetFile(whole)
        columns = table_columns(path, file.schema_arrow.names, strict)
        check_sizes(path, file.metadata)
        leaves = [file.schema.column(number) for number in range(len(file.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        file = pq.ParquetFile(whole, metadata=file.metadata, read_dictionary=texts)
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
            yield from batch_lines(batch, columns)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise ManifestError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def check_sizes(path: Path, metadata: Any) -> None:
    """Refuse row groups with pages that may not fit into memory.

    Not column by column: asking a damaged file for a column's size ends the process within pyarrow.
    """
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.total_byte_size > PARQUET_SPARE_BYTES + MAX_PROMPT_CHARACTERS * group.num_rows:
            size = f"{group.total_byte_size:,} bytes in {group.num_rows:,} rows"
            raise ManifestError(f"{path}: row group {number}: {size} is too much; leave out columns with long values")


def batch_lines(batch: Any, columns: Columns) -> Iterator[Line | Fault]:
    names = columns.names
    cells = [read_cells(array, name in columns.shown) for name, array in zip(names, batch.columns, strict=True)]
    for row in zip(*cells, strict=True):
        values = {name: cell for name, cell in zip(names, row, strict=True) if cell is not None and cell != ""}
        bad = [(name, cell) for name, cell in values.items() if type(cell) is BadCell]
        if bad:
            prompt = values.get("prompt")
            reasons = (f"column {columns.shown.get(name, excerpt(name))}: {cell.reason}" for name, cell in bad)
            yield Fault("; ".join(reasons), prompt if isinstance(prompt, str) else None)
        else:
            yield Line(values, columns.shown)


def read_cells(array: Any, known: bool) -> list[Any]:
    """Numbers as they are, all else as text; None and BadCell where there is nothing or nothing to be used."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        used = array.indices.unique()
        entries = dict(zip(used.to_pylist(), read_cells(array.dictionary.take(used), known), strict=True))
        return [entries[index] for index in array.indices.to_pylist()]
    if isinstance(kind, pa.BaseExtensionType):
        return read_cells(array.storage, known)
    if pa.types.is_float16(kind):
        return read_cells(array.cast(pa.float32()), known)
    if is_number(kind) or pa.types.is_decimal(kind):
        return array.to_pylist()  # type: ignore[no-any-return]
    if is_text(kind):
        return read_texts(array)
    if pa.types.is_nested(kind) and known:
        return [BadCell("a single value was expected") if one.is_valid else None for one in array]
    return [read_scalar(one) for one in array]


def is_number(kind: Any) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def is_text(kind: Any) -> bool:
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)


def read_texts(array: Any) -> list[Any]:
    is_binary = "binary" in str(array.type)
    array = array.cast(pa.large_binary())
    sizes = pc.binary_length(array)
    short = pc.if_else(pc.less_equal(sizes, MAX_CELL_CHARACTERS), array, None)
    errors = "backslashreplace" if is_binary else "surrogateescape"
    return [
        text.decode("utf-8", errors) if text is not None else size and too_long(size)
        for text, size in zip(short.to_pylist(), sizes.to_pylist(), strict=True)
    ]


def too_long(size: int) -> BadCell:
    return BadCell(f"some {size} bytes, at most {MAX_CELL_CHARACTERS}")


def read_scalar(scalar: Any) -> str | BadCell | None:
    """A time or a nested value as text."""
    if not scalar.is_valid:
        return None
    if (size := weight(scalar)) > MAX_CELL_CHARACTERS:
        return too_long(size)
    try:
        if pa.types.is_nested(scalar.type):
            return json.dumps(scalar.as_py(), ensure_ascii=False, default=as_text)
        return pc.cast(scalar, pa.string()).as_py()  # type: ignore[no-any-return]
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as error:
        return BadCell(f"cannot be read: {first_line(error)}")


def as_text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def weight(scalar: Any) -> int:
    """About how many characters the value has, without making it; just over the limit for anything bigger."""
    if not scalar.is_valid:
        return 4
    if isinstance(scalar, pa.DictionaryScalar):
        return weight(scalar.value)
    if isinstance(scalar, pa.StringScalar | pa.BinaryScalar | pa.LargeStringScalar | pa.LargeBinaryScalar):
        return scalar.as_buffer().size  # type: ignore[no-any-return]
    if not isinstance(scalar, pa.ListScalar | pa.StructScalar):
        return 8
    total = 2
    for part in scalar.values if isinstance(scalar, pa.ListScalar) else scalar.values():
        total += weight(part)
        if total > MAX_CELL_CHARACTERS:
            break
    return total


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
            with open_whole(path) as whole, parquet_errors(path):
                schema = pq.read_schema(whole)
            unknown = set(table_columns(path, schema.names, strict=False).unknown)
            return [pa.field(field.name, kept_type(field.type)) for field in schema if field.name in unknown]
    return [pa.field(name, pa.string()) for name in seen]


def kept_type(kind: Any) -> Any:
    if pa.types.is_dictionary(kind):
        return kept_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return kept_type(kind.storage_type)
    if pa.types.is_float16(kind):
        return pa.float32()
    return kind if is_number(kind) else pa.string()


READERS: dict[str, Callable[[Path, bool], Iterator[Line | Fault]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".pq": read_parquet,
    ".txt": read_txt,
}
