"""Check every value of a manifest, a row at a time.

A fault of the whole file (no prompt column, not UTF-8, empty) is a ManifestError. A fault of one row makes that row an
InvalidRow that lists all its faults, and the rest goes on.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

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
from tinysd_batch.job.manifest.files import Fault, Line, SkippedRows, manifest_files, open_manifest
from tinysd_batch.job.manifest.notes import ReadingNotes
from tinysd_batch.job.manifest.readers import read_lines
from tinysd_batch.model.text.prompt_syntax import SYNTAXES, parse_prompt
from tinysd_batch.records import InvalidRow, Row, SamplingParams
from tinysd_batch.text import has_surrogates, normalize_text
from tinysd_batch.values import MISSING_WORDS, is_missing, is_missing_number, read_whole_number

MAX_ROWS_WITHOUT_ONE = 1_000_000  # that can be generated; a small file can hold billions of faults
NO_NAMES: Mapping[str, str] = {}
NO_SEED = -1
LONGEST_MISSING_WORD = 10  # with blanks around it
MARKS = {"seed": frozenset(":"), "a1111": frozenset("()[]"), "none": frozenset[str]()}  # faults need one of them


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
    """BLAKE2b of the manifest's bytes, 32 hex digits; for a folder of its parts' names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in manifest_files(path):
        if part != path:
            digest.update(f"{part.name}/{part.stat().st_size}/".encode("utf-8", "surrogateescape"))
        with open_manifest(part) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_rows(
    path: Path,
    defaults: Defaults,
    strict: bool = False,
    *,
    notes: ReadingNotes | None = None,
    interpret_lines: bool = False,
    as_0_1_0: bool = False,
) -> Iterator[Row | InvalidRow]:
    """Every row of the manifest in order, checked. Raises ManifestError for faults of the whole file.

    A blank row is none, and keeps its number.

    Args:
        strict: Columns that we do not know are a fault of the file, or in JSONL one of their row.
        notes: Is filled with what was noticed besides the rows; complete when all rows are read.
        interpret_lines: In a .txt, skip comments and read options behind a prompt.
        as_0_1_0: Decide as 0.1.0 where rows begin and end, and carry what is no number as text.
    """
    notes = notes if notes is not None else ReadingNotes()
    number, first, any_good = 0, None, False
    for line in read_lines(path, strict, notes=notes, interpret_lines=interpret_lines, as_0_1_0=as_0_1_0):
        row = None
        if isinstance(line, SkippedRows):
            number += line.number
            notes.blank_rows += line.number if line.is_blank else 0
        else:
            number += 1
            row = read_row(number, line, defaults, notes)
        if row is not None:
            first = first or row
            any_good = any_good or isinstance(row, Row)
            yield row
        if number >= MAX_ROWS_WITHOUT_ONE and not any_good:
            raise ManifestError(f"{path}: none of the first {number:,} rows can be generated: {fault_of(first)}")
    if first is None:
        blank = f" besides {notes.blank_rows:,} blank ones" if notes.blank_rows else ""
        raise ManifestError(f"{path}: no rows{blank}; add one for each prompt")


def read_row(number: int, line: Line | Fault, defaults: Defaults, notes: ReadingNotes) -> Row | InvalidRow | None:
    """The row, or what is wrong with it; None for a blank one."""
    if isinstance(line, Fault):
        prompt = clean_text(line.prompt) if line.prompt is not None else None
        return InvalidRow(number, line.reason, prompt=prompt, line=line.line)
    if not line.values:
        notes.blank_rows += 1
        return None
    row = check_row(number, line.values, defaults, line.shown, line.line)
    if is_missing_word(row.prompt) or (isinstance(row, Row) and is_missing_word(row.negative_prompt)):
        notes.see("prompts that are a word for a missing value (nan, None, NULL), taken as text: {}", number)
    return row


def fault_of(first: Row | InvalidRow | None) -> str:
    if isinstance(first, InvalidRow):
        return f"row {first.number}: {first.reason}"
    return "all are blank; check which column holds the prompts"


def is_missing_word(prompt: str | None) -> bool:
    return prompt is not None and len(prompt) < LONGEST_MISSING_WORD and prompt.strip().lower() in MISSING_WORDS


# Checking


def clean_text(text: object, length: int = MAX_PROMPT_CHARACTERS) -> str:
    """Text of a faulty row, fit to be stored: cut, and what is no UTF-8 or a NUL replaced."""
    cut = str(text)[:length]
    if has_surrogates(cut):
        cut = cut.encode("utf-8", "replace").decode()
    return cut.replace("\0", "\N{REPLACEMENT CHARACTER}")


def check_row(
    number: int,
    values: dict[str, Any],
    defaults: Defaults,
    shown: Mapping[str, str] = NO_NAMES,
    line: int | None = None,
) -> Row | InvalidRow:
    """The row with defaults filled in, or all that is wrong with it, with columns named as in `shown`."""
    rules, faults = rules_for(defaults.step_px), []
    given: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for column, value in values.items():
        if column not in rules:
            extra[column] = plain(value)
            continue
        try:
            checked = rules[column](value)
        except ValueError as error:
            faults.append(f"column {shown.get(column, column)} = {excerpt(clean_text(value))}: {error}")
        else:
            if checked is not None:
                given[column] = checked
    row = fill_in(number, given, defaults, extra)
    if not row.prompt and is_missing(values.get("prompt")):
        faults.append(f"column {shown.get('prompt', 'prompt')} is empty; write a prompt or remove the row")
    faults += faults_of_prompts(row, shown)
    faults += faults_between_columns(row.seed, row.n_iter * row.n_samples, shown)
    if faults:
        prompt = clean_text(values["prompt"]) if values.get("prompt") is not None else None
        return InvalidRow(number, "; ".join(faults), prompt=prompt, id=row.id, extra=extra, line=line)
    return row


Rule = Callable[[Any], Any]


@lru_cache
def rules_for(step_px: int) -> dict[str, Rule]:
    """What reads a cell of each known column: None for one that is empty, ValueError for what must not stand there."""
    side = remember(partial(check_integer, least=8, most=MAX_SIDE_PX, multiple_of=step_px))
    number = partial(check_number, least=0)
    return {
        "prompt": check_prompt,
        "id": check_id,
        "negative_prompt": remember(check_prompt),
        "prompt_syntax": remember(check_syntax),
        "seed": check_seed,
        "height": side,
        "width": side,
        "steps": remember(partial(check_integer, least=1, most=MAX_STEPS)),
        "scale": remember(partial(number, most=100)),
        "sampler": remember(check_sampler),
        "eta": remember(partial(number, most=1)),
        "n_iter": remember(partial(check_integer, least=1, most=MAX_IMAGES_PER_ROW)),
        "n_samples": remember(partial(check_integer, least=1, most=1024)),
    }


def remember(rule: Rule) -> Rule:
    """The same rule, quicker for values that come again, as those of most columns do."""
    known = lru_cache(1024, typed=True)(rule)  # typed: True is 1 for a dictionary, and no number here

    def check(value: Any) -> Any:
        is_short = len(value) <= MAX_PROMPT_CHARACTERS if type(value) is str else type(value) in (int, float)
        return known(value) if is_short else rule(value)

    return check


def fill_in(number: int, given: dict[str, Any], defaults: Defaults, extra: dict[str, Any]) -> Row:
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
        sampling_params(
            value("width", defaults.width), value("height", defaults.height), value("steps", defaults.steps),
            value("sampler", defaults.sampler), value("eta", defaults.eta),
        ),
        value("prompt_syntax", defaults.prompt_syntax),
        value("id"),
        extra,
    )  # fmt: skip


@lru_cache(1024, typed=True)  # most rows say nothing of them: they share one
def sampling_params(width: int, height: int, steps: int, sampler: str, eta: float) -> SamplingParams:
    return SamplingParams(width, height, steps, sampler, eta if sampler in TAKE_ETA else 0.0)


def faults_of_prompts(row: Row, shown: Mapping[str, str]) -> Iterator[str]:
    syntax = row.prompt_syntax
    for column, fault in (
        ("prompt", fault_of_marks(row.prompt, syntax)),
        ("negative_prompt", fault_of_marks_again(row.negative_prompt, syntax)),
    ):
        if fault:
            yield f"column {shown.get(column, column)} = {excerpt(getattr(row, column))}: {fault}"


def faults_between_columns(seed: int | None, images: int, shown: Mapping[str, str]) -> Iterator[str]:
    if images > MAX_IMAGES_PER_ROW:
        yield f"n_iter x n_samples = {images}: at most {MAX_IMAGES_PER_ROW} images a row"
    if seed is not None and seed + images - 1 > MAX_SEED:
        yield f"column {shown.get('seed', 'seed')} = {seed}: the last image's seed would pass {MAX_SEED}"


def check_prompt(value: Any) -> str | None:
    if not isinstance(value, str):
        if is_missing(value):
            return None
        raise ValueError("text was expected")
    text = normalize_text(value)
    if not text or text.isspace():
        return None
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{len(text)} characters, at most {MAX_PROMPT_CHARACTERS}")
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    if not text.isascii() and has_surrogates(text):
        raise ValueError("it is not UTF-8; save the file as UTF-8")
    return text


def check_syntax(value: Any) -> str | None:
    text = normalize_text(str(value)).strip()
    if text in SYNTAXES:
        return text
    if is_missing_number(value):
        return None
    raise ValueError(f"one of {', '.join(SYNTAXES)} was expected")


def fault_of_marks(prompt: str, syntax: str) -> str | None:
    if MARKS[syntax].isdisjoint(prompt):
        return None
    try:
        parse_prompt(prompt, syntax)
    except UsageError as error:
        return str(error)
    return None


fault_of_marks_again = lru_cache(1024)(fault_of_marks)  # negative prompts are mostly the same


def check_seed(value: Any) -> int | None:
    """-1, which means a random seed to other programs, is no seed."""
    if is_missing_number(value) or (number := read_whole_number(value)) == NO_SEED:
        return None
    return check_bounds(number, 0, MAX_SEED)


def check_integer(value: Any, least: int, most: int, multiple_of: int = 1) -> int | None:
    if is_missing_number(value):
        return None
    number = check_bounds(read_whole_number(value), least, most)
    if number % multiple_of:
        raise ValueError(f"must be a multiple of {multiple_of} with this model")
    return number


def check_bounds(number: int, least: int, most: int) -> int:
    if not least <= number <= most:
        raise ValueError(f"must be between {least} and {most}")
    return number


def check_number(value: Any, least: float, most: float) -> float | None:
    if is_missing_number(value):
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(normalize_text(value) if isinstance(value, str) else value)
    except (ValueError, OverflowError, TypeError):
        raise ValueError("a number was expected") from None
    if not math.isfinite(number):
        raise ValueError("must be finite")
    if not least <= number <= most:
        raise ValueError(f"must be between {least:g} and {most:g}")
    return number


def check_sampler(value: Any) -> str | None:
    return None if is_missing_number(value) else find_sampler(str(value))


def check_id(value: Any) -> str | None:
    if is_missing(value):
        return None
    text = normalize_text(str(value))
    if has_surrogates(text) or "\0" in text or len(text) > 1000:
        raise ValueError("at most 1000 characters of UTF-8 without NUL")
    return text


def plain(value: Any) -> Any:
    """A value of an unknown column as the results can hold it: text, number, a list or structure of these."""
    if isinstance(value, str):
        return clean_text(value, sys.maxsize)
    if isinstance(value, list):
        return [None if each is None else plain(each) for each in value]
    if isinstance(value, dict):
        return {name: None if each is None else plain(each) for name, each in value.items()}
    return value if isinstance(value, bool | int | float) else str(value)
