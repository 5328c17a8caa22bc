"""The normal form of text, missing values and integers, on which all readers rely."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.text import INVISIBLE_CHARACTERS, fold_widths, has_surrogates, make_text_storable, normalize_text
from tinysd_batch.values import is_missing, is_missing_number, parse_integer

ANY_TEXT = st.text(st.characters())  # lone surrogates included


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("\ufeffred apple", "red apple"),
        ("red\u200b apple", "red apple"),
        ("a\u2060b", "ab"),
        ("\u202ered\u202c \u200eapple\u2066", "red apple"),
        ("Negative\u00a0prompt", "Negative prompt"),
        ("red\u3000apple\u2009!", "red apple !"),
        ("a\u2028b", "a b"),
        ("\N{MAN}\u200d\N{WOMAN}", "\N{MAN}\u200d\N{WOMAN}"),  # one emoji of two
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),  # Persian spells with it
        ("  two  blanks\tand a tab\n", "  two  blanks\tand a tab\n"),
        ("é café 苹果", "é café 苹果"),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalize_text(text) == normal


@given(ANY_TEXT)
def test_normalizing_is_idempotent_and_removes_invisible_characters(text: str) -> None:
    normal = normalize_text(text)
    assert normalize_text(normal) == normal
    assert not INVISIBLE_CHARACTERS & set(normal)
    assert len(normal) <= len(text)


@given(ANY_TEXT)
def test_storable_text_is_utf_8_without_nul(text: str) -> None:
    stored = make_text_storable(text)
    assert not has_surrogates(stored)
    assert "\0" not in stored
    if not has_surrogates(text) and "\0" not in text:
        assert stored == text


def test_bytes_of_another_encoding_stay_readable() -> None:
    assert make_text_storable(b"/jobs/alt\xe9".decode("utf-8", "surrogateescape")) == "/jobs/alt\\xe9"


@pytest.mark.parametrize("value", [None, "", " ", "\t\n", "\u200b", "\u00a0", math.nan, Decimal("nan")])
def test_missing_values(value: object) -> None:
    assert is_missing(value)
    assert is_missing_number(value)


@pytest.mark.parametrize("value", [0, 0.0, False, "0", math.inf, Decimal("inf"), "x", 10**400])
def test_values_that_are_not_missing(value: object) -> None:
    assert not is_missing(value)
    assert not is_missing_number(value)


@pytest.mark.parametrize("word", ["None", "nan", "NULL", "NaN", " null ", "<NA>", "N/A"])
def test_missing_value_words_are_missing_numbers_but_text_elsewhere(word: str) -> None:
    assert is_missing_number(word)
    assert not is_missing(word)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (42, 42), (42.0, 42), ("42", 42), ("42.0", 42), ("42.", 42), (" 42 ", 42), ("\u00a042", 42),
        (Decimal("42.00"), 42), ("-1", -1), (-1.0, -1), ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_integers(value: object, number: int) -> None:
    assert parse_integer(value) == number


@pytest.mark.parametrize(
    "value", [42.5, "42.5", "1e30", "forty", math.inf, math.nan, True, False, [1], None, "4.0.0", "4 2", Decimal("1.5")]
)
def test_values_that_are_not_integers(value: object) -> None:
    with pytest.raises(ValueError, match="a whole number was expected"):
        parse_integer(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:1", "a:1"),
        ("\uff41\uff1a\uff11\uff0c\uff5e", "a:1,~"),
        ("\uff76\uff9e", "\u30ab\u3099"),  # to be composed by NFC
        ("\ufb01 \u201cx\u201d \u00e9 \u3000", "\ufb01 \u201cx\u201d \u00e9 \u3000"),
    ],
)
def test_full_and_half_width_characters_are_folded(text: str, expected: str) -> None:
    assert fold_widths(text) == expected
