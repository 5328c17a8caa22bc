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
from tinysd_batch.job.columns import has_surrogates
from tinysd_batch.job.formats import read_lines
from tinysd_batch.job.manifest_file import Fault, open_manifest
from tinysd_batch.model.prompts import SYNTAXES, parse_prompt
from tinysd_batch.records import InvalidRow, Row, SamplingParams

NO_NAMES: Mapping[str, str] = {}


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


def read_rows(path: Path, defaults: Defaults, strict: bool = False) -> Iterator[Row | InvalidRow]:
    """Every line of the manifest in order, checked. Raises ManifestError for faults of the whole file.

    `strict`: columns that we do not know are such a fault, or in JSONL one of their row.
    """
    empty = True
    for number, line in enumerate(read_lines(path, strict), start=1):
        empty = False
        if isinstance(line, Fault):
            yield InvalidRow(number, line.reason, prompt=clean_text(line.prompt) if line.prompt is not None else None)
        else:
            yield check_row(number, line.values, defaults, line.shown)
    if empty:
        raise ManifestError(f"{path}: no rows; add one for each prompt")


# Checking


def clean_text(text: object, length: int = MAX_PROMPT_CHARACTERS) -> str:
    """Text of a faulty row, fit to be stored: cut, and what is no UTF-8 or a NUL replaced."""
    cut = str(text)[:length]
    if has_surrogates(cut):
        cut = cut.encode("utf-8", "replace").decode()
    return cut.replace("\0", "\N{REPLACEMENT CHARACTER}")


def check_row(
    number: int, values: dict[str, Any], defaults: Defaults, shown: Mapping[str, str] = NO_NAMES
) -> Row | InvalidRow:
    """The row with defaults filled in, or all that is wrong with it, with columns named as in `shown`."""
    rules, faults = rules_for(defaults.step_px), []
    given: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for column, value in values.items():
        if column not in rules:
            extra[column] = plain(value)
        elif value is not None:
            try:
                given[column] = rules[column](value)
            except ValueError as error:
                faults.append(f"column {shown.get(column, column)} = {excerpt(clean_text(value))}: {error}")
    row = fill_in(number, given, defaults, extra)
    faults += faults_of_prompts(row, values, shown)
    faults += faults_between_columns(row.seed, row.n_iter * row.n_samples, shown)
    if faults:
        told = clean_text(values["prompt"]) if values.get("prompt") is not None else None
        return InvalidRow(number, "; ".join(faults), prompt=told, id=row.id, extra=extra)
    return row


@lru_cache
def rules_for(step_px: int) -> dict[str, Callable[[Any], Any]]:
    """What reads a cell of each known column; it raises ValueError for what must not stand there."""
    side = partial(check_integer, least=8, most=MAX_SIDE_PX, multiple_of=step_px)
    return {
        "prompt": check_prompt,
        "id": check_id,
        "negative_prompt": check_prompt,
        "prompt_syntax": check_syntax,
        "seed": partial(check_integer, least=0, most=MAX_SEED),
        "height": side,
        "width": side,
        "steps": partial(check_integer, least=1, most=MAX_STEPS),
        "scale": partial(check_number, least=0, most=100),
        "sampler": check_sampler,
        "eta": partial(check_number, least=0, most=1),
        "n_iter": partial(check_integer, least=1, most=MAX_IMAGES_PER_ROW),
        "n_samples": partial(check_integer, least=1, most=1024),
    }


def fill_in(number: int, given: dict[str, Any], defaults: Defaults, extra: dict[str, Any]) -> Row:
    """A row of what the manifest gives, and of the job's settings; without a prompt it is no row yet."""
    value = given.get
    return Row(
        number,
        value("prompt") or "",
        value("negative_prompt") or defaults.negative_prompt,
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


def faults_of_prompts(row: Row, values: dict[str, Any], shown: Mapping[str, str]) -> Iterator[str]:
    told = values.get("prompt") or ""
    if isinstance(told, str) and not told.strip():
        yield f"column {shown.get('prompt', 'prompt')} is empty; write a prompt or remove the row"
    for column, text in (("prompt", row.prompt), ("negative_prompt", row.negative_prompt)):
        for fault in faults_of_marks(text, row.prompt_syntax):
            yield f"column {shown.get(column, column)} = {excerpt(text)}: {fault}"


def faults_between_columns(seed: int | None, images: int, shown: Mapping[str, str]) -> Iterator[str]:
    if images > MAX_IMAGES_PER_ROW:
        yield f"n_iter x n_samples = {images}: at most {MAX_IMAGES_PER_ROW} images a row"
    if seed is not None and seed + images - 1 > MAX_SEED:
        yield f"column {shown.get('seed', 'seed')} = {seed}: the last image's seed would pass {MAX_SEED}"


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
    except (ValueError, OverflowError, TypeError):
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
