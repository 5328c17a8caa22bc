"""Read manifests, CSV and Parquet, a row at a time, and check every value.

A fault of the whole file (no prompt column, not UTF-8, empty) is a ManifestError. A fault of one row makes that row an
InvalidRow that lists all its faults, and the rest goes on.
"""

import csv
import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinysd_batch.config import (
    MAX_IMAGES_PER_ROW,
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    MAX_SIDE_PX,
    MAX_STEPS,
    TAKE_ETA,
    excerpt,
    find_sampler,
)
from tinysd_batch.errors import ManifestError, UsageError
from tinysd_batch.model.prompts import SYNTAXES, parse_prompt
from tinysd_batch.records import InvalidRow, Row, SamplingParams

COLUMNS = (
    "prompt",
    "id",
    "negative_prompt",
    "prompt_syntax",
    "seed",
    "height",
    "width",
    "steps",
    "scale",
    "sampler",
    "eta",
    "n_iter",
    "n_samples",
)
PARQUET_BATCH_ROWS = 1024  # small: a few kilobytes of Parquet can hold gigabytes of repeated prompts
MAX_CELL_CHARACTERS = 131_072


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a row that says nothing gets: the job's settings over the model's defaults."""

    negative_prompt: str
    prompt_syntax: str
    height: int
    width: int
    steps: int
    scale: float
    sampler: str
    eta: float
    n_iter: int
    n_samples: int
    step_px: int  # height and width must be multiples of this, the model's step


def fingerprint(path: Path) -> str:
    """BLAKE2b of the manifest's bytes, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open_manifest(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_manifest(path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None


def read_rows(path: Path, defaults: Defaults) -> Iterator[Row | InvalidRow]:
    """Every line of the manifest in order, checked. Raises ManifestError for faults of the whole file."""
    if path.suffix.lower() in (".parquet", ".pq"):
        lines = read_parquet(path)
    elif path.suffix.lower() == ".csv":
        lines = read_csv(path)
    else:
        raise ManifestError(f"{path}: manifests are .csv or .parquet files")
    empty = True
    for number, line in enumerate(lines, start=1):
        empty = False
        yield line if isinstance(line, InvalidRow) else check_row(number, line, defaults)
    if empty:
        raise ManifestError(f"{path}: no rows below the header; add a line for each prompt")


# Reading


def check_header(path: Path, names: list[str]) -> list[str]:
    if "prompt" not in names:
        shown = ", ".join(excerpt(name, 20) for name in names[:8]) or "nothing"
        raise ManifestError(f"{path}: header: no column named prompt; found {shown}")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ManifestError(f"{path}: header: column {excerpt(doubled[0])} stands there twice; rename one")
    return names


def read_csv(path: Path) -> Iterator[dict[str, Any] | InvalidRow]:
    """Rows as text. Bytes that are no UTF-8 arrive as lone surrogates, so that only their row is lost."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    check_encoding(path)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        header = read_header(reader, path)
        if any(has_surrogates(name) for name in header):
            raise ManifestError(f"{path}: header: not UTF-8; save the file as UTF-8")
        check_header(path, header)
        number = 0
        for cells in read_lines(reader):
            if not cells:  # a blank line is no row
                continue
            number += 1
            if isinstance(cells, str):
                yield InvalidRow(number, cells)
            elif len(cells) != len(header):
                reason = f"line {reader.line_num}: {len(cells)} cells where the header has {len(header)} columns"
                prompt = dict(zip(header, cells, strict=False)).get("prompt")
                yield InvalidRow(number, f"{reason}; quote cells that hold commas", prompt=clean_text(prompt or ""))
            else:
                yield given(dict(zip(header, cells, strict=True)))


def read_header(reader: Any, path: Path) -> list[str]:
    try:
        return [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise ManifestError(f"{path}: header: {error}") from None


def check_encoding(path: Path) -> None:
    with open_manifest(path) as raw:
        start: bytes = raw.read(4096)
    if not start.strip():
        raise ManifestError(f"{path}: the file is empty; the first line names the columns, one of them prompt")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start.split(b"\n", 1)[0]:
        raise ManifestError(f"{path}: not UTF-8 (it looks like UTF-16); save the file as UTF-8")


def read_lines(reader: Any) -> Iterator[list[str] | str]:
    """The cells of each line, or what is wrong with it."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line {reader.line_num}: {error}; check the quotes of this line and those before it"


def read_parquet(path: Path) -> Iterator[dict[str, Any] | InvalidRow]:
    try:
        with open_manifest(path), pq.ParquetFile(path, read_dictionary=["prompt"]) as file:
            check_header(path, file.schema_arrow.names)
            for batch in file.iter_batches(PARQUET_BATCH_ROWS):
                for values in batch.to_pylist():
                    yield given(values)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ManifestError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The cells that say something; an empty one means the job's setting."""
    return {name: value for name, value in values.items() if not (value is None or value == "")}


def has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def clean_text(text: object, length: int = MAX_PROMPT_CHARACTERS) -> str:
    """Text of a faulty row, fit to be stored: cut, and what is no UTF-8 or a NUL replaced."""
    return str(text)[:length].encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


# Checking


def check_row(number: int, values: dict[str, Any], defaults: Defaults) -> Row | InvalidRow:
    """The row with defaults filled in, or all that is wrong with it."""
    faults: list[str] = []

    def take(column: str, check: Any, default: Any, *bounds: Any) -> Any:
        value = values.get(column)
        if value is None:
            return default
        try:
            return check(value, *bounds)
        except ValueError as error:
            faults.append(f"column {column} = {excerpt(clean_text(value))}: {error}")
            return default

    extra = {name: plain(value) for name, value in values.items() if name not in COLUMNS}
    prompt = take("prompt", check_prompt, None)
    if prompt is None and not faults:
        faults.append("column prompt is empty; write a prompt or remove the row")
    negative = take("negative_prompt", check_prompt, None) or defaults.negative_prompt
    syntax = take("prompt_syntax", check_syntax, defaults.prompt_syntax)
    for column, text in (("prompt", prompt), ("negative_prompt", negative)):
        faults += [f"column {column} = {excerpt(text)}: {fault}" for fault in faults_of_marks(text or "", syntax)]
    seed = take("seed", check_integer, None, 0, MAX_SEED)
    side = (8, MAX_SIDE_PX, defaults.step_px)
    sampler = take("sampler", check_sampler, defaults.sampler)
    eta = take("eta", check_number, defaults.eta, 0, 1)
    params = SamplingParams(
        width=take("width", check_integer, defaults.width, *side),
        height=take("height", check_integer, defaults.height, *side),
        steps=take("steps", check_integer, defaults.steps, 1, MAX_STEPS),
        sampler=sampler,
        eta=eta if sampler in TAKE_ETA else 0.0,
    )
    scale = take("scale", check_number, defaults.scale, 0, 100)
    n_iter = take("n_iter", check_integer, defaults.n_iter, 1, MAX_IMAGES_PER_ROW)
    n_samples = take("n_samples", check_integer, defaults.n_samples, 1, 1024)
    identity = take("id", check_id, None)
    faults += faults_between_columns(seed, n_iter * n_samples)
    if faults:
        shown = clean_text(values["prompt"]) if values.get("prompt") is not None else None
        return InvalidRow(number, "; ".join(faults), prompt=shown, id=identity, extra=extra)
    return Row(number, prompt, negative, seed, scale, n_iter, n_samples, params, syntax, identity, extra)


def faults_between_columns(seed: int | None, images: int) -> Iterator[str]:
    if images > MAX_IMAGES_PER_ROW:
        yield f"n_iter x n_samples = {images}: at most {MAX_IMAGES_PER_ROW} images a row"
    if seed is not None and seed + images - 1 > MAX_SEED:
        yield f"column seed = {seed}: the last image's seed would pass {MAX_SEED}"


def check_prompt(value: Any) -> str | None:
    if not isinstance(value, str):
        raise ValueError("text was expected")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{len(value)} characters, at most {MAX_PROMPT_CHARACTERS}")
    if "\0" in value:
        raise ValueError("it holds a NUL character")
    if has_surrogates(value):
        raise ValueError("it is not UTF-8; save the file as UTF-8")
    return value if value.strip() else None


def check_syntax(value: Any) -> str:
    if value not in SYNTAXES:
        raise ValueError(f"one of {', '.join(SYNTAXES)} was expected")
    return str(value)


def faults_of_marks(prompt: str, syntax: str) -> Iterator[str]:
    try:
        parse_prompt(prompt, syntax)
    except UsageError as error:
        yield str(error)


def check_integer(value: Any, least: int, most: int, multiple_of: int = 1) -> int:
    try:
        number = int(value, 10) if isinstance(value, str) else int(value)
        if isinstance(value, bool) or (not isinstance(value, str) and number != value):
            raise ValueError
    except (ValueError, OverflowError, TypeError):
        raise ValueError("a whole number was expected") from None
    if not least <= number <= most:
        raise ValueError(f"must be between {least} and {most}")
    if number % multiple_of:
        raise ValueError(f"must be a multiple of {multiple_of} with this model")
    return number


def check_number(value: Any, least: float, most: float) -> float:
    try:
        number = float(value)
    except (ValueError, TypeError):
        raise ValueError("a number was expected") from None
    if not math.isfinite(number):
        raise ValueError("must be finite")
    if not least <= number <= most:
        raise ValueError(f"must be between {least:g} and {most:g}")
    return number


def check_sampler(value: Any) -> str:
    return find_sampler(str(value))


def check_id(value: Any) -> str:
    text = str(value)
    if has_surrogates(text) or "\0" in text or len(text) > 1000:
        raise ValueError("at most 1000 characters of UTF-8 without NUL")
    return text


def plain(value: Any) -> Any:
    """A value of an unknown column as the results can hold it: text, number or nothing."""
    if isinstance(value, str):
        return clean_text(value, sys.maxsize)
    return value if isinstance(value, bool | int | float) else str(value)


def read_extra_fields(path: Path) -> list[pa.Field]:
    """The manifest's own columns as the results will hold them: Parquet's plain types kept, all else text."""
    if path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            names = read_header(csv.reader(file, strict=True), path)
        return [pa.field(name, pa.string()) for name in names if name not in COLUMNS]
    plain_types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return [
        pa.field(field.name, field.type if any(is_plain(field.type) for is_plain in plain_types) else pa.string())
        for field in pq.read_schema(path)
        if field.name not in COLUMNS
    ]
