"""Validate the cells of a manifest: one validator per known column.

A validator returns the value to use, or None for an empty cell. It raises ValueError, with the rule that is broken, for
a value that cannot be used.
"""

import math
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from tinysd_batch.config import (
    MAX_IMAGES_PER_ROW,
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    MAX_SIDE_PX,
    MAX_STEPS,
    find_sampler,
)
from tinysd_batch.errors import UsageError
from tinysd_batch.model.text.prompt_syntax import SYNTAXES, parse_prompt
from tinysd_batch.text import has_surrogates, normalize_text
from tinysd_batch.values import MISSING_WORDS, is_missing, is_missing_number, parse_integer

NO_SEED = -1  # in other programs: choose a seed at random
MAX_MISSING_WORD_CHARACTERS = 10  # with surrounding blanks
MAX_ID_CHARACTERS = 1000
# A prompt without any of these characters has no syntax that could be wrong.
SYNTAX_CHARACTERS = {"seed": frozenset(":"), "a1111": frozenset("()[]"), "none": frozenset[str]()}

CellValidator = Callable[[Any], Any]


@lru_cache
def build_validators(size_multiple_px: int) -> dict[str, CellValidator]:
    """Return the validator of each known column. Height and width must be multiples of `size_multiple_px`."""
    side = cache_validator(partial(validate_integer, minimum=8, maximum=MAX_SIDE_PX, multiple_of=size_multiple_px))
    return {
        "prompt": validate_prompt,
        "id": validate_id,
        "negative_prompt": cache_validator(validate_prompt),
        "prompt_syntax": cache_validator(validate_syntax),
        "seed": validate_seed,
        "height": side,
        "width": side,
        "steps": cache_validator(partial(validate_integer, minimum=1, maximum=MAX_STEPS)),
        "scale": cache_validator(partial(validate_number, minimum=0, maximum=100)),
        "sampler": cache_validator(validate_sampler),
        "eta": cache_validator(partial(validate_number, minimum=0, maximum=1)),
        "n_iter": cache_validator(partial(validate_integer, minimum=1, maximum=MAX_IMAGES_PER_ROW)),
        "n_samples": cache_validator(partial(validate_integer, minimum=1, maximum=1024)),
    }


def cache_validator(validator: CellValidator) -> CellValidator:
    """Return the validator with a cache for short values: most columns repeat a few values."""
    cached = lru_cache(1024, typed=True)(validator)  # typed: True equals 1 as a key, but is not a valid number

    def validate(value: Any) -> Any:
        is_short = len(value) <= MAX_PROMPT_CHARACTERS if type(value) is str else type(value) in (int, float)
        return cached(value) if is_short else validator(value)

    return validate


def validate_prompt(value: Any) -> str | None:
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
        raise ValueError("it contains a NUL character")
    if not text.isascii() and has_surrogates(text):
        raise ValueError("it is not UTF-8; save the file as UTF-8")
    return text


def validate_syntax(value: Any) -> str | None:
    text = normalize_text(str(value)).strip()
    if text in SYNTAXES:
        return text
    if is_missing_number(value):
        return None
    raise ValueError(f"one of {', '.join(SYNTAXES)} was expected")


def validate_seed(value: Any) -> int | None:
    """Validate a seed. -1, which asks other programs for a random seed, counts as empty."""
    if is_missing_number(value) or (number := parse_integer(value)) == NO_SEED:
        return None
    return validate_bounds(number, 0, MAX_SEED)


def validate_integer(value: Any, minimum: int, maximum: int, multiple_of: int = 1) -> int | None:
    if is_missing_number(value):
        return None
    number = validate_bounds(parse_integer(value), minimum, maximum)
    if number % multiple_of:
        raise ValueError(f"must be a multiple of {multiple_of} with this model")
    return number


def validate_bounds(number: int, minimum: int, maximum: int) -> int:
    if not minimum <= number <= maximum:
        raise ValueError(f"must be between {minimum} and {maximum}")
    return number


def validate_number(value: Any, minimum: float, maximum: float) -> float | None:
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
    if not minimum <= number <= maximum:
        raise ValueError(f"must be between {minimum:g} and {maximum:g}")
    return number


def validate_sampler(value: Any) -> str | None:
    return None if is_missing_number(value) else find_sampler(str(value))


def validate_id(value: Any) -> str | None:
    if is_missing(value):
        return None
    text = normalize_text(str(value))
    if has_surrogates(text) or "\0" in text or len(text) > MAX_ID_CHARACTERS:
        raise ValueError(f"at most {MAX_ID_CHARACTERS} characters of UTF-8 without NUL")
    return text


def find_syntax_error(prompt: str, syntax: str) -> str | None:
    """Return what is wrong with the prompt's weights or emphasis, None if nothing is."""
    if SYNTAX_CHARACTERS[syntax].isdisjoint(prompt):
        return None
    try:
        parse_prompt(prompt, syntax)
    except UsageError as error:
        return str(error)
    return None


find_syntax_error_cached = lru_cache(1024)(find_syntax_error)  # most negative prompts are the same


def is_missing_word(prompt: str | None) -> bool:
    """Whether the whole prompt is a word such as nan or NULL, which programs write for a missing value."""
    return prompt is not None and len(prompt) < MAX_MISSING_WORD_CHARACTERS and prompt.strip().lower() in MISSING_WORDS


def sanitize_text(text: object, max_characters: int = MAX_PROMPT_CHARACTERS) -> str:
    """Return the text of an invalid row so that it can be stored: cut, with invalid characters and NULs replaced."""
    cut = str(text)[:max_characters]
    if has_surrogates(cut):
        cut = cut.encode("utf-8", "replace").decode()
    return cut.replace("\0", "\N{REPLACEMENT CHARACTER}")


def convert_extra_value(value: Any) -> Any:
    """Convert a value of an unknown column to what the results can hold: text, numbers, lists and structs of these."""
    if isinstance(value, str):
        return sanitize_text(value, sys.maxsize)
    if isinstance(value, list):
        return [None if item is None else convert_extra_value(item) for item in value]
    if isinstance(value, dict):
        return {name: None if item is None else convert_extra_value(item) for name, item in value.items()}
    return value if isinstance(value, bool | int | float) else str(value)
