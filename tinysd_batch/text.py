"""Normalize text, and make text storable and printable.

Every prompt, cell, column name and setting passes through `normalize_text` before it is looked up or stored. Text
from elsewhere (paths, host names, messages of libraries) passes through `make_text_storable` before a table, JSON or an
image holds it.
"""

import codecs
import re
import unicodedata
from typing import Any

# Invisible characters that do not change the text: byte-order mark, zero-width space, word joiner and the invisible
# operators after it, soft hyphen, direction marks. The joiners U+200C and U+200D stay: emoji and several scripts need
# them.
INVISIBLE_RANGES = "\ufeff\u200b\u2060\u2061\u2062\u2063\u2064\u00ad\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u180e"
# Blanks other than the space: no-break spaces, fixed-width spaces, the ideographic space, line separators.
BLANK_RANGES = "\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\u0085"
NON_NORMAL_CHARACTERS = re.compile(f"[{INVISIBLE_RANGES}]+|[{BLANK_RANGES}]")

# Full-width Latin letters, digits and punctuation, half-width katakana and hangul -> the same in their usual width: the
# map of ftfy's `fix_character_width`, which tiny-stable-diffusion's tokenizer applies. U+3000 is a blank.
WIDTH_FOLDING = {
    code: folded for code in range(0xFF01, 0xFFF0) if (folded := unicodedata.normalize("NFKC", chr(code))) != chr(code)
}


def normalize_text(text: str) -> str:
    """Return `text` without invisible characters, with every Unicode blank as a space.

    Tabs and line ends stay, as do runs of spaces and blanks at both ends.
    """
    if text.isascii():
        return text
    return NON_NORMAL_CHARACTERS.sub(lambda match: " " if match[0][0] not in INVISIBLE_CHARACTERS else "", text)


def normalize_if_text(value: Any) -> Any:
    """Return `normalize_text(value)` for a string, and any other value unchanged."""
    return normalize_text(value) if isinstance(value, str) else value


def decode_text(data: bytes) -> str:
    """Decode a text file: UTF-16 if it starts with its byte-order mark, else UTF-8. Marks at line starts are removed.

    Raises UnicodeDecodeError for other encodings.
    """
    is_utf_16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = data.decode("utf-16" if is_utf_16 else "utf-8")
    return re.sub("^\ufeff+", "", text, flags=re.MULTILINE) if "\ufeff" in text else text


def fold_widths(text: str) -> str:
    """Return `text` with full-width and half-width characters in their usual width."""
    return text if text.isascii() else text.translate(WIDTH_FOLDING)


def has_surrogates(text: str) -> bool:
    """Whether the text contains lone surrogates: from bytes that are not UTF-8, or from `\\ud800` in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def make_text_storable(text: str) -> str:
    """Return `text` so that UTF-8 tables, JSON and images can hold it.

    Bytes that are not UTF-8, which Python represents as lone surrogates in paths and messages, become `\\xe9`, other
    lone surrogates `\\ud800`, and NUL the replacement character.
    """
    if has_surrogates(text):
        try:
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # a surrogate that does not represent a byte
            text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def make_value_storable(value: Any) -> Any:
    """Return the value with all strings and keys in it valid UTF-8. NULs stay, as JSON and Arrow can hold them."""
    if isinstance(value, str):
        return make_text_storable(value) if has_surrogates(value) else value
    if isinstance(value, list):
        return [make_value_storable(item) for item in value]
    if isinstance(value, dict):
        return {make_value_storable(name): make_value_storable(item) for name, item in value.items()}
    return value


def expand_ranges(characters: str) -> frozenset[str]:
    """Return the characters of a regular expression's character class, such as `a-c` or `xyz`."""
    members: set[str] = set()
    for match in re.finditer(r"(.)-(.)|(.)", characters, re.DOTALL):
        first, last = (match[1], match[2]) if match[1] else (match[3], match[3])
        members.update(map(chr, range(ord(first), ord(last) + 1)))
    return frozenset(members)


INVISIBLE_CHARACTERS = expand_ranges(INVISIBLE_RANGES)


def make_printable(text: str) -> str:
    """Return untrusted text that is safe to print on a terminal: no control characters, no direction marks."""
    return "".join(character if character.isprintable() else " " for character in text)


def excerpt(value: object, length: int = 60) -> str:
    """Return the value in quotes for an error message: on one line, without control characters, cut to `length`."""
    text = value if isinstance(value, str) else str(value)
    return repr(text[:length] + ("…" if len(text) > length else ""))


def show_value(value: object) -> str:
    """Return a setting's value for an error message: numbers as they are, anything else as an excerpt."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else excerpt(value)
