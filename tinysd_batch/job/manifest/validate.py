"""Check every value of a manifest, a row at a time.

A fault of the whole file (no prompt column, not UTF-8, empty) is a ManifestError. A fault of one row makes that row an
InvalidRow that lists all its faults, and the rest goes on.
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

MAX_ROWS_BEFORE_FIRST_VALID = 1_000_000  # that can be generated; a small file can hold billions of faults
NO_SOURCE_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class RowDefaults:
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
    size_multiple_px: int  # height and width must be multiples of this, the model's step


def read_rows(
    path: Path,
    defaults: RowDefaults,
    strict: bool = False,
    *,
    notes: ReadingNotes | None = None,
    interpret_lines: bool = False,
    compat_0_1_0: bool = False,
) -> Iterator[Row | InvalidRow]:
    """Every row of the manifest in order, checked. Raises ManifestError for faults of the whole file.

    A blank row is none, and keeps its number.

    Args:
        strict: Columns that we do not know are a fault of the file, or in JSONL one of their row.
        notes: Is filled with what was noticed besides the rows; complete when all rows are read.
        interpret_lines: In a .txt, skip comments and read options behind a prompt.
        compat_0_1_0: Decide as 0.1.0 where rows begin and end, and carry what is no number as text.
    """
    notes = notes if notes is not None else ReadingNotes()
    number, first, any_good = 0, None, False
    for line in read_raw_rows(path, strict, notes=notes, interpret_lines=interpret_lines, compat_0_1_0=compat_0_1_0):
        row = None
        if isinstance(line, SkippedRows):
            number += line.row_count
            notes.blank_rows += line.row_count if line.is_blank else 0
        else:
            number += 1
            row = validate_raw_row(number, line, defaults, notes)
        if row is not None:
            first = first or row
            any_good = any_good or isinstance(row, Row)
            yield row
        if number >= MAX_ROWS_BEFORE_FIRST_VALID and not any_good:
            raise ManifestError(
                f"{path}: none of the first {number:,} rows can be generated: {describe_first_error(first)}"
            )
    if first is None:
        blank = f" besides {notes.blank_rows:,} blank ones" if notes.blank_rows else ""
        raise ManifestError(f"{path}: no rows{blank}; add one for each prompt")


def validate_raw_row(
    number: int, line: RawRow | UnreadableRow, defaults: RowDefaults, notes: ReadingNotes
) -> Row | InvalidRow | None:
    """The row, or what is wrong with it; None for a blank one."""
    if isinstance(line, UnreadableRow):
        prompt = sanitize_text(line.prompt) if line.prompt is not None else None
        return InvalidRow(number, line.reason, prompt=prompt, line=line.line)
    if not line.values:
        notes.blank_rows += 1
        return None
    row = build_row(number, line.values, defaults, line.source_names, line.line)
    if is_missing_word(row.prompt) or (isinstance(row, Row) and is_missing_word(row.negative_prompt)):
        notes.count_occurrence(
            "prompts that are a word for a missing value (nan, None, NULL), taken as text: {}", number
        )
    return row


def describe_first_error(first: Row | InvalidRow | None) -> str:
    if isinstance(first, InvalidRow):
        return f"row {first.number}: {first.reason}"
    return "all are blank; check which column holds the prompts"


# Checking


def build_row(
    number: int,
    values: dict[str, Any],
    defaults: RowDefaults,
    shown: Mapping[str, str] = NO_SOURCE_NAMES,
    line: int | None = None,
) -> Row | InvalidRow:
    """The row with defaults filled in, or all that is wrong with it, with columns named as in `shown`."""
    rules, faults = build_validators(defaults.size_multiple_px), []
    given: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for column, value in values.items():
        if column not in rules:
            extra[column] = convert_extra_value(value)
            continue
        try:
            checked = rules[column](value)
        except ValueError as error:
            faults.append(f"column {shown.get(column, column)} = {excerpt(sanitize_text(value))}: {error}")
        else:
            if checked is not None:
                given[column] = checked
    row = apply_defaults(number, given, defaults, extra)
    if not row.prompt and is_missing(values.get("prompt")):
        faults.append(f"column {shown.get('prompt', 'prompt')} is empty; write a prompt or remove the row")
    faults += find_prompt_syntax_errors(row, shown)
    faults += find_cross_column_errors(row.seed, row.n_iter * row.n_samples, shown)
    if faults:
        prompt = sanitize_text(values["prompt"]) if values.get("prompt") is not None else None
        return InvalidRow(number, "; ".join(faults), prompt=prompt, id=row.id, extra=extra, line=line)
    return row


def apply_defaults(number: int, given: dict[str, Any], defaults: RowDefaults, extra: dict[str, Any]) -> Row:
    """A row of what the manifest gives, and of the job's settings; without a prompt it is no row yet."""
    value = given.get
    return Row(
        number,
        value("prompt", ""),
        value("negative_prompt", defaults.negative_prompt),
        value("seed"),
        value("scale", defaults.scale),
        value("n_iter", defaults.n_iter),
        value("n_samples", defaults.n_samples),
        intern_sampling_params(
            value("width", defaults.width), value("height", defaults.height), value("steps", defaults.steps),
            value("sampler", defaults.sampler), value("eta", defaults.eta),
        ),
        value("prompt_syntax", defaults.prompt_syntax),
        value("id"),
        extra,
    )  # fmt: skip


@lru_cache(1024, typed=True)  # most rows say nothing of them: they share one
def intern_sampling_params(width: int, height: int, steps: int, sampler: str, eta: float) -> SamplingParams:
    return SamplingParams(width, height, steps, sampler, eta if sampler in SAMPLERS_WITH_ETA else 0.0)


def find_prompt_syntax_errors(row: Row, shown: Mapping[str, str]) -> Iterator[str]:
    syntax = row.prompt_syntax
    for column, fault in (
        ("prompt", find_syntax_error(row.prompt, syntax)),
        ("negative_prompt", find_syntax_error_cached(row.negative_prompt, syntax)),
    ):
        if fault:
            yield f"column {shown.get(column, column)} = {excerpt(getattr(row, column))}: {fault}"


def find_cross_column_errors(seed: int | None, images: int, shown: Mapping[str, str]) -> Iterator[str]:
    if images > MAX_IMAGES_PER_ROW:
        yield f"n_iter x n_samples = {images}: at most {MAX_IMAGES_PER_ROW} images a row"
    if seed is not None and seed + images - 1 > MAX_SEED:
        yield f"column {shown.get('seed', 'seed')} = {seed}: the last image's seed would pass {MAX_SEED}"
