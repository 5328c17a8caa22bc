"""Recognize missing values and integers in the same way in manifests, job files and Python calls."""

import math
import re
from decimal import Decimal
from typing import Any

from tinysd_batch.text import normalize_text

MISSING_WORDS = {"none", "nan", "null", "n/a", "<na>"}  # in a cell for a number; in a cell for text they are text
INTEGER_PATTERN = re.compile(r"[+-]?\d+\.0*", re.ASCII)


def is_missing(value: Any) -> bool:
    """Whether a value is missing: None, NaN of any number type, or text without a visible character."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value or value.isspace() if value.isascii() else not normalize_text(value).strip()
    return is_nan(value)


def is_nan(value: Any) -> bool:
    """Whether a value is a NaN of any number type."""
    if isinstance(value, Decimal):
        return value.is_nan()
    try:
        return math.isnan(value)
    except (TypeError, ValueError, OverflowError):  # not a number, or an integer too large for a float
        return False


def is_missing_number(value: Any) -> bool:
    """Whether a value for a number is missing, which the words `None`, `nan` and `NULL` mean as well."""
    if isinstance(value, str):
        return is_missing(value) or normalize_text(value).strip().lower() in MISSING_WORDS
    return is_missing(value)


def parse_integer(value: Any) -> int:
    """Return 42 for `42`, `42.0`, `"42"` and `"42.0"`. Raises ValueError for anything that is not an integer.

    pandas writes integers as floats if a column has missing values.
    """
    try:
        if isinstance(value, str):
            text = normalize_text(value).strip()
            return int(text.partition(".")[0] if INTEGER_PATTERN.fullmatch(text) else text, 10)
        number = int(value)
        if isinstance(value, bool) or number != value:
            raise ValueError
    except (ValueError, OverflowError, TypeError, ArithmeticError):
        raise ValueError("a whole number was expected") from None
    return number
