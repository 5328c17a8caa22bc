"""What a missing value and a whole number are, the same in every manifest format, in job files and in Python."""

import math
import re
from decimal import Decimal
from typing import Any

from tinysd_batch.text import normalize_text

MISSING_WORDS = {"none", "nan", "null", "n/a", "<na>"}  # in a cell for a number; in text they are text
INTEGER_PATTERN = re.compile(r"[+-]?\d+\.0*", re.ASCII)


def is_missing(value: Any) -> bool:
    """Whether a value says nothing: None, NaN of any number type, or text without a visible character."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value or value.isspace() if value.isascii() else not normalize_text(value).strip()
    return is_nan(value)


def is_nan(value: Any) -> bool:
    """Whether a value is NaN; infinity is not."""
    if isinstance(value, Decimal):
        return value.is_nan()
    try:
        return math.isnan(value)
    except (TypeError, ValueError, OverflowError):  # no number, or an integer beyond all floats
        return False


def is_missing_number(value: Any) -> bool:
    """The same in a place for a number, where `None`, `nan` and `NULL` say nothing, too."""
    if isinstance(value, str):
        return is_missing(value) or normalize_text(value).strip().lower() in MISSING_WORDS
    return is_missing(value)


def parse_integer(value: Any) -> int:
    """Return the whole number that `42`, `42.0`, `"42"` or `"42.0"` stands for.

    pandas writes whole numbers as floats wherever a column has gaps. Raises ValueError for everything else.
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
