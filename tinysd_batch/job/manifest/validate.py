"""Validate a manifest row by row.

An error of the whole file (no prompt column, not UTF-8, empty) raises ManifestError. An error of one row turns that row
into an InvalidRow that lists all its errors; the other rows are not affected.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.cells import (
    build_validators,
    convert_extra_value,
    find_syntax_error,
    is_missing_word,
    sanitize_text,
)
from tinysd_batch.job.manifest.raw_rows import RawRow, SkippedRows, UnreadableRow
from tinysd_batch.job.manifest.readers import read_raw_rows
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.settings.declaration import Effect
from tinysd_batch.settings.limits import MAX_IMAGES_PER_ROW, MAX_SEED
from tinysd_batch.settings.schema import COLUMN_SETTINGS, IMAGE_SETTINGS, Settings, override
from tinysd_batch.text import excerpt
from tinysd_batch.values import is_missing

MAX_ROWS_BEFORE_FIRST_VALID = 1_000_000  # a small compressed file can hold billions of invalid rows
IMAGE_COUNTS = tuple(name for name, setting in COLUMN_SETTINGS.items() if setting.effect is Effect.IMAGES)
NO_SOURCE_NAMES: Mapping[str, str] = {}


class RowDefaults:
    """Values for empty cells: the job's settings, which include the model's defaults; and the rules for other cells."""

    def __init__(self, settings: Settings, model: ModelInfo, own_columns: frozenset[str] = frozenset()) -> None:
        """Prepare to read rows; `own_columns` stay the manifest's own, whatever column is known by their names."""
        self.image_settings = settings.image_settings()
        self.image_counts = {name: getattr(settings, name) for name in IMAGE_COUNTS}
        self.own_columns = own_columns
        validators = build_validators(model)
        self.validators = {name: validators[name] for name in validators.keys() - own_columns}


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
    items = read_raw_rows(
        path,
        strict,
        notes=notes,
        interpret_lines=interpret_lines,
        own_columns=defaults.own_columns,
        compat_0_1_0=compat_0_1_0,
    )
    for item in items:
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
    if is_missing_word(row.prompt) or (isinstance(row, Row) and is_missing_word(row.settings.negative_prompt)):
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
    validators, errors = defaults.validators, []
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
    errors += find_cross_column_errors(row.seed, row.n_images, source_names)
    if errors:
        prompt = sanitize_text(values["prompt"]) if values.get("prompt") is not None else None
        return InvalidRow(number, "; ".join(errors), prompt=prompt, id=row.id, extra=extra, line=line)
    return row


def apply_defaults(number: int, values: dict[str, Any], defaults: RowDefaults, extra: dict[str, Any]) -> Row:
    """Return a row of the manifest's values and the defaults. Its prompt is empty where the manifest has none."""
    own = tuple((name, value) for name, value in values.items() if name in IMAGE_SETTINGS)
    return Row(
        number,
        values.get("prompt", ""),
        override(defaults.image_settings, own) if own else defaults.image_settings,
        values.get("seed"),
        **{name: values.get(name, default) for name, default in defaults.image_counts.items()},
        id=values.get("id"),
        extra=extra,
    )


def find_prompt_syntax_errors(row: Row, source_names: Mapping[str, str]) -> Iterator[str]:
    prompts = {"prompt": row.prompt, "negative_prompt": row.settings.negative_prompt}
    for column, prompt in prompts.items():
        if error := find_syntax_error(prompt, row.settings.prompt_syntax):
            yield f"column {source_names.get(column, column)} = {excerpt(prompt)}: {error}"


def find_cross_column_errors(seed: int | None, images: int, source_names: Mapping[str, str]) -> Iterator[str]:
    if images > MAX_IMAGES_PER_ROW:
        yield f"n_iter x n_samples = {images}: at most {MAX_IMAGES_PER_ROW} images a row"
    if seed is not None and seed + images - 1 > MAX_SEED:
        yield f"column {source_names.get('seed', 'seed')} = {seed}: the last image's seed would exceed {MAX_SEED}"
