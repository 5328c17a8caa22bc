"""Validate a manifest row by row.

An error of the whole file (no prompt column, not UTF-8, empty) raises ManifestError. An error of one row turns that row
into an InvalidRow that lists all its errors; the other rows are not affected.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinysd_batch.config import MAX_IMAGES_PER_ROW, MAX_SEED, SAMPLERS_WITH_ETA
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.cells import (
    build_validators,
    convert_extra_value,
    find_syntax_error,
    find_syntax_error_cached,
    is_missing_word,
    sanitize_text,
)
from tinysd_batch.job.manifest.raw_rows import RawRow, SkippedRows, UnreadableRow
from tinysd_batch.job.manifest.readers import read_raw_rows
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.records import InvalidRow, Row, SamplingParams
from tinysd_batch.text import excerpt
from tinysd_batch.values import is_missing

MAX_ROWS_BEFORE_FIRST_VALID = 1_000_000  # a small compressed file can hold billions of invalid rows
NO_SOURCE_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class RowDefaults:
    """Values for empty cells: the job's settings, and the model's defaults where the job sets nothing."""

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
    size_multiple_px: int  # the model requires height and width to be multiples of this


def read_rows(
    path: Path,
    defaults: RowDefaults,
    strict: bool = False,
    *,
    notes: ReadingNotes | None = None,
    interpret_lines: bool = False,
    compat_0_1_0: bool = False,
) -> Iterator[Row | InvalidRow]:
    """Yield every row of the manifest in order, validated. A blank row is skipped but keeps its row number.

    Args:
        strict: Treat unknown columns as an error of the file; in JSONL, of the row that has them.
        notes: Collects what else is noticed; complete once all rows are read.
        interpret_lines: In a .txt, skip comments and parse options after a prompt.
        compat_0_1_0: Split the file into rows as 0.1.0 did, and convert values that are not numbers to text.

    Raises:
        ManifestError: The file as a whole cannot be used.
    """
    notes = notes if notes is not None else ReadingNotes()
    number, first, has_valid_row = 0, None, False
    for item in read_raw_rows(path, strict, notes=notes, interpret_lines=interpret_lines, compat_0_1_0=compat_0_1_0):
        row = None
        if isinstance(item, SkippedRows):
            number += item.row_count
            notes.blank_rows += item.row_count if item.is_blank else 0
        else:
            number += 1
            row = validate_raw_row(number, item, defaults, notes)
        if row is not None:
            first = first or row
            has_valid_row = has_valid_row or isinstance(row, Row)
            yield row
        if number >= MAX_ROWS_BEFORE_FIRST_VALID and not has_valid_row:
            raise ManifestError(
                f"{path}: none of the first {number:,} rows can be generated: {describe_first_error(first)}"
            )
    if first is None:
        blank = f" except {notes.blank_rows:,} blank ones" if notes.blank_rows else ""
        raise ManifestError(f"{path}: no rows{blank}; add one for each prompt")


def validate_raw_row(
    number: int, raw_row: RawRow | UnreadableRow, defaults: RowDefaults, notes: ReadingNotes
) -> Row | InvalidRow | None:
    """Return the validated row, an InvalidRow with its errors, or None for a blank row."""
    if isinstance(raw_row, UnreadableRow):
        prompt = sanitize_text(raw_row.prompt) if raw_row.prompt is not None else None
        return InvalidRow(number, raw_row.reason, prompt=prompt, line=raw_row.line)
    if not raw_row.values:
        notes.blank_rows += 1
        return None
    row = build_row(number, raw_row.values, defaults, raw_row.source_names, raw_row.line)
    if is_missing_word(row.prompt) or (isinstance(row, Row) and is_missing_word(row.negative_prompt)):
        notes.count_occurrence("prompts that look like a missing value (nan, None, NULL), read as text: {}", number)
    return row


def describe_first_error(first: Row | InvalidRow | None) -> str:
    if isinstance(first, InvalidRow):
        return f"row {first.number}: {first.reason}"
    return "all are blank; check which column holds the prompts"


def build_row(
    number: int,
    values: dict[str, Any],
    defaults: RowDefaults,
    source_names: Mapping[str, str] = NO_SOURCE_NAMES,
    line: int | None = None,
) -> Row | InvalidRow:
    """Return the row with defaults filled in, or an InvalidRow with all its errors.

    Args:
        number: The row number, from 1.
        values: The non-empty cells; known columns under our names.
        source_names: Our name -> the manifest's name, which error messages show.
        line: The line of the file where the row starts.
    """
    validators, errors = build_validators(defaults.size_multiple_px), []
    valid: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for column, value in values.items():
        if column not in validators:
            extra[column] = convert_extra_value(value)
            continue
        try:
            validated = validators[column](value)
        except ValueError as error:
            name = source_names.get(column, column)
            errors.append(f"column {name} = {excerpt(sanitize_text(value))}: {error}")
        else:
            if validated is not None:
                valid[column] = validated
    row = apply_defaults(number, valid, defaults, extra)
    if not row.prompt and is_missing(values.get("prompt")):
        errors.append(f"column {source_names.get('prompt', 'prompt')} is empty; write a prompt or remove the row")
    errors += find_prompt_syntax_errors(row, source_names)
    errors += find_cross_column_errors(row.seed, row.n_iter * row.n_samples, source_names)
    if errors:
        prompt = sanitize_text(values["prompt"]) if values.get("prompt") is not None else None
        return InvalidRow(number, "; ".join(errors), prompt=prompt, id=row.id, extra=extra, line=line)
    return row


def apply_defaults(number: int, values: dict[str, Any], defaults: RowDefaults, extra: dict[str, Any]) -> Row:
    """Return a row of the manifest's values and the defaults. Its prompt is empty where the manifest has none."""
    value = values.get
    return Row(
        number,
        value("prompt", ""),
        value("negative_prompt", defaults.negative_prompt),
        value("seed"),
        value("scale", defaults.scale),
        value("n_iter", defaults.n_iter),
        value("n_samples", defaults.n_samples),
        intern_sampling_params(
            value("width", defaults.width),
            value("height", defaults.height),
            value("steps", defaults.steps),
            value("sampler", defaults.sampler),
            value("eta", defaults.eta),
        ),
        value("prompt_syntax", defaults.prompt_syntax),
        value("id"),
        extra,
    )


@lru_cache(1024, typed=True)
def intern_sampling_params(width: int, height: int, steps: int, sampler: str, eta: float) -> SamplingParams:
    """Return one shared object for equal parameters: most rows of a manifest have the same ones."""
    return SamplingParams(width, height, steps, sampler, eta if sampler in SAMPLERS_WITH_ETA else 0.0)


def find_prompt_syntax_errors(row: Row, source_names: Mapping[str, str]) -> Iterator[str]:
    syntax = row.prompt_syntax
    for column, error in (
        ("prompt", find_syntax_error(row.prompt, syntax)),
        ("negative_prompt", find_syntax_error_cached(row.negative_prompt, syntax)),
    ):
        if error:
            yield f"column {source_names.get(column, column)} = {excerpt(getattr(row, column))}: {error}"


def find_cross_column_errors(seed: int | None, images: int, source_names: Mapping[str, str]) -> Iterator[str]:
    if images > MAX_IMAGES_PER_ROW:
        yield f"n_iter x n_samples = {images}: at most {MAX_IMAGES_PER_ROW} images a row"
    if seed is not None and seed + images - 1 > MAX_SEED:
        yield f"column {source_names.get('seed', 'seed')} = {seed}: the last image's seed would exceed {MAX_SEED}"
