"""Check one cell of a manifest: a rule for each column."""

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

NO_SEED = -1

MAX_MISSING_WORD_CHARACTERS = 10  # with blanks around it

SYNTAX_CHARACTERS = {
    "seed": frozenset(":"),
    "a1111": frozenset("()[]"),
    "none": frozenset[str](),
}  # faults need one of them


def is_missing_word(prompt: str | None) -> bool:
    return prompt is not None and len(prompt) < MAX_MISSING_WORD_CHARACTERS and prompt.strip().lower() in MISSING_WORDS


def sanitize_text(text: object, length: int = MAX_PROMPT_CHARACTERS) -> str:
    """Text of a faulty row, fit to be stored: cut, and what is no UTF-8 or a NUL replaced."""
    cut = str(text)[:length]
    if has_surrogates(cut):
        cut = cut.encode("utf-8", "replace").decode()
    return cut.replace("\0", "\N{REPLACEMENT CHARACTER}")


CellValidator = Callable[[Any], Any]


@lru_cache
def build_validators(step_px: int) -> dict[str, CellValidator]:
    """What reads a cell of each known column: None for one that is empty, ValueError for what must not stand there."""
    side = cache_validator(partial(validate_integer, least=8, most=MAX_SIDE_PX, multiple_of=step_px))
    number = partial(validate_number, least=0)
    return {
        "prompt": validate_prompt,
        "id": validate_id,
        "negative_prompt": cache_validator(validate_prompt),
        "prompt_syntax": cache_validator(validate_syntax),
        "seed": validate_seed,
        "height": side,
        "width": side,
        "steps": cache_validator(partial(validate_integer, least=1, most=MAX_STEPS)),
        "scale": cache_validator(partial(number, most=100)),
        "sampler": cache_validator(validate_sampler),
        "eta": cache_validator(partial(number, most=1)),
        "n_iter": cache_validator(partial(validate_integer, least=1, most=MAX_IMAGES_PER_ROW)),
        "n_samples": cache_validator(partial(validate_integer, least=1, most=1024)),
    }


def cache_validator(rule: CellValidator) -> CellValidator:
    """The same rule, quicker for values that come again, as those of most columns do."""
    known = lru_cache(1024, typed=True)(rule)  # typed: True is 1 for a dictionary, and no number here

    def check(value: Any) -> Any:
        is_short = len(value) <= MAX_PROMPT_CHARACTERS if type(value) is str else type(value) in (int, float)
        return known(value) if is_short else rule(value)

    return check


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
        raise ValueError("it holds a NUL character")
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


def find_syntax_error(prompt: str, syntax: str) -> str | None:
    if SYNTAX_CHARACTERS[syntax].isdisjoint(prompt):
        return None
    try:
        parse_prompt(prompt, syntax)
    except UsageError as error:
        return str(error)
    return None


find_syntax_error_cached = lru_cache(1024)(find_syntax_error)  # negative prompts are mostly the same


def validate_seed(value: Any) -> int | None:
    """-1, which means a random seed to other programs, is no seed."""
    if is_missing_number(value) or (number := parse_integer(value)) == NO_SEED:
        return None
    return validate_bounds(number, 0, MAX_SEED)


def validate_integer(value: Any, least: int, most: int, multiple_of: int = 1) -> int | None:
    if is_missing_number(value):
        return None
    number = validate_bounds(parse_integer(value), least, most)
    if number % multiple_of:
        raise ValueError(f"must be a multiple of {multiple_of} with this model")
    return number


def validate_bounds(number: int, least: int, most: int) -> int:
    if not least <= number <= most:
        raise ValueError(f"must be between {least} and {most}")
    return number


def validate_number(value: Any, least: float, most: float) -> float | None:
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


def validate_sampler(value: Any) -> str | None:
    return None if is_missing_number(value) else find_sampler(str(value))


def validate_id(value: Any) -> str | None:
    if is_missing(value):
        return None
    text = normalize_text(str(value))
    if has_surrogates(text) or "\0" in text or len(text) > 1000:
        raise ValueError("at most 1000 characters of UTF-8 without NUL")
    return text


def convert_extra_value(value: Any) -> Any:
    """A value of an unknown column as the results can hold it: text, number, a list or structure of these."""
    if isinstance(value, str):
        return sanitize_text(value, sys.maxsize)
    if isinstance(value, list):
        return [None if each is None else convert_extra_value(each) for each in value]
    if isinstance(value, dict):
        return {name: None if each is None else convert_extra_value(each) for name, each in value.items()}
    return value if isinstance(value, bool | int | float) else str(value)
