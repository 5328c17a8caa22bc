"""Validate the cells of a manifest: one validator per known column.

A validator returns the value to use, or None for an empty cell. It raises ValueError, with the rule that is broken, for
a value that cannot be used.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tinysd_batch.errors import UsageError
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.model.text.prompt_syntax import has_syntax, parse_prompt
from tinysd_batch.settings.limits import MAX_PROMPT_CHARACTERS
from tinysd_batch.settings.schema import COLUMN_SETTINGS
from tinysd_batch.settings.value_types import PromptText, Seed
from tinysd_batch.text import has_surrogates, normalize_text
from tinysd_batch.values import MISSING_WORDS, is_missing

MAX_MISSING_WORD_CHARACTERS = 10  # with surrounding blanks
MAX_ID_CHARACTERS = 1000

CellValidator = Callable[[Any], Any]


@lru_cache
def build_validators(model: ModelInfo) -> dict[str, CellValidator]:
    """Return the validator of each known column; some settings have bounds that the model sets."""
    validators: dict[str, CellValidator] = {"prompt": PromptText().read_cell, "id": validate_id}
    for name, setting in COLUMN_SETTINGS.items():
        validator = setting.value_type.for_model(model).read_cell
        # Most rows have a seed of their own.
        validators[name] = validator if isinstance(setting.value_type, Seed) else cache_validator(validator)
    return validators


def cache_validator(validator: CellValidator) -> CellValidator:
    """Return the validator with a cache for short values: most columns repeat a few values."""
    cached = lru_cache(1024, typed=True)(validator)  # typed: True equals 1 as a key, but is not a valid number

    def validate(value: Any) -> Any:
        is_short = len(value) <= MAX_PROMPT_CHARACTERS if type(value) is str else type(value) in (int, float)
        return cached(value) if is_short else validator(value)

    return validate


def validate_id(value: Any) -> str | None:
    if is_missing(value):
        return None
    text = normalize_text(str(value))
    if has_surrogates(text) or "\0" in text or len(text) > MAX_ID_CHARACTERS:
        raise ValueError(f"at most {MAX_ID_CHARACTERS} characters of UTF-8 without NUL")
    return text


def find_syntax_error(prompt: str, syntax: str) -> str | None:
    """Return what is wrong with the prompt's weights or emphasis, None if nothing is."""
    if has_syntax(prompt, syntax):
        try:
            parse_prompt(prompt, syntax)
        except UsageError as error:
            return str(error)
    return None


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
