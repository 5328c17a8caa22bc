import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.errors import UsageError
from tinysd_batch.model.prompts import parse_weighted


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("red apple", [("red apple", 1.0)]),
        ("", [("", 1.0)]),
        ("tabby cat:0.25 white duck:0.75 hybrid", [("tabby cat", 0.125), ("white duck", 0.375), ("hybrid", 0.5)]),
        ("cat:1 dog:3", [("cat", 0.25), ("dog", 0.75)]),
        ("cat:.5 dog:1e-1", [("cat", 5 / 6), ("dog", 1 / 6)]),
        ("cat:2 dog:-1", [("cat", 2.0), ("dog", -1.0)]),
        # A colon without a number behind it is text.
        ("style: flat", [("style: flat", 1.0)]),
        ("a:b", [("a:b", 1.0)]),
        ("http://x.y z", [("http://x.y z", 1.0)]),
    ],
)
def test_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = parse_weighted(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("prompt", ["a:0 b:0", "a:1 b:-1", "a:1e308 b:1e308 c"])
def test_weights_that_sum_to_zero_are_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match=r"weights sum to (0|inf)"):
        parse_weighted(prompt)


@given(st.text(max_size=200))
def test_any_text_parses_or_is_refused(prompt: str) -> None:
    try:
        parts = parse_weighted(prompt)
    except UsageError:
        return
    assert sum(weight for _, weight in parts) == pytest.approx(1)
