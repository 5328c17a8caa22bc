import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.errors import UsageError
from tinysd_batch.model.checkpoint.info import embedded_model_path
from tinysd_batch.model.text.prompt_syntax import SYNTAXES, EmphasisSpan, SubPrompt, parse_prompt
from tinysd_batch.model.text.tokenizer import read_tokenizer, tokenize_prompt


def same(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [number for _, number in found] == pytest.approx([number for _, number in expected])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("red apple", [("red apple", 1.0)]),
        ("", [("", 1.0)]),
        ("tabby cat:0.25 white duck:0.75 hybrid", [("tabby cat", 0.125), ("white duck", 0.375), ("hybrid", 0.5)]),
        ("cat:1 dog:3", [("cat", 0.25), ("dog", 0.75)]),
        ("cat:.5 dog:1e-1", [("cat", 5 / 6), ("dog", 1 / 6)]),
        ("cat:2 dog:-1", [("cat", 2.0), ("dog", -1.0)]),
        ("cat:1, dog:3; owl:4", [("cat", 0.125), ("dog", 0.375), ("owl", 0.5)]),
        ("cat:1\tdog:3\nowl:4", [("cat", 0.125), ("dog", 0.375), ("owl", 0.5)]),
        (":3 tail", [("", 0.75), ("tail", 0.25)]),
        # One weight alone changes nothing, and is no text.
        ("cat:0.5", [("cat", 1.0)]),
        # A colon without a number behind it is text.
        ("style: flat", [("style: flat", 1.0)]),
        ("cat: 2 dog", [("cat: 2 dog", 1.0)]),
        ("a:b", [("a:b", 1.0)]),
        # Nor is it a weight in times, ratios and addresses.
        ("a photo, 12:30 clock", [("a photo, 12:30 clock", 1.0)]),
        ("at 12:30:45 sharp", [("at 12:30:45 sharp", 1.0)]),
        ("16:9 cat:1 dog:1", [("16:9 cat", 0.5), ("dog", 0.5)]),
        ("(16:9 film) cat", [("(16:9 film) cat", 1.0)]),
        ("2.39:1 film", [("2.39:1 film", 1.0)]),
        ("http://x.y z", [("http://x.y z", 1.0)]),
        ("see http://host:80 now", [("see http://host:80 now", 1.0)]),
        # But it is after names that end in a digit, and with a fraction.
        ("r2d2:1 c3po:3", [("r2d2", 0.25), ("c3po", 0.75)]),
        ("top 10:0.5 cat:0.5", [("top 10", 0.5), ("cat", 0.5)]),
        (r"cat\:2 dog", [("cat:2 dog", 1.0)]),
        (r"scale 1\:0.5 cat:1 dog:1", [("scale 1:0.5 cat", 0.5), ("dog", 0.5)]),
    ],
)
def test_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    same([(sub.text, sub.weight) for sub in parse_prompt(prompt, "seed")], parts)


@pytest.mark.parametrize(
    "prompt", ["a:0 b:0", "a:1 b:-1", "a:1 b:-2", "a:1e308 b:1e308 c", "a:1e999 b", "a:nan b:1", "a:inf", "cat:0"]
)
def test_weights_without_a_sensible_sum_are_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match=r"weights sum to (0|-1|inf|nan); give weights with a sum above zero"):
        parse_prompt(prompt)


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("a red apple", [("a red apple", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red) apple", [("a ", 1.0), ("red", 1.1), (" apple", 1.0)]),
        ("a [red] apple", [("a ", 1.0), ("red", 1 / 1.1), (" apple", 1.0)]),
        ("a (red:1.3) apple", [("a ", 1.0), ("red", 1.3), (" apple", 1.0)]),
        ("((cat))", [("cat", 1.21)]),
        ("((big) cat:2)", [("big", 2.2), (" cat", 2.0)]),
        ("([cat])", [("cat", 1.0)]),
        (r"a \(red\) \\ apple", [("a (red) \\ apple", 1.0)]),
        ("(open", [("open", 1.1)]),
        ("closed) here]", [("closed) here]", 1.0)]),
        ("at 12:30: cat", [("at 12:30: cat", 1.0)]),
        ("12:30)", [("12:30)", 1.0)]),
        ("(:1.5)", [("", 1.0)]),
    ],
)
def test_brackets(prompt: str, runs: list[tuple[str, float]]) -> None:
    (sub,) = parse_prompt(prompt, "a1111")
    same([(run.text, run.emphasis) for run in sub.spans], runs)


def test_without_syntax_nothing_is_read_into_a_prompt() -> None:
    prompt = r"cat:1 (dog:2) \: [owl]"
    assert parse_prompt(prompt, "none") == [SubPrompt(1.0, (EmphasisSpan(prompt),))]


def test_a_syntax_that_is_none() -> None:
    with pytest.raises(UsageError, match="prompt_syntax = 'compel': one of seed, a1111, none"):
        parse_prompt("cat", "compel")


MARKS = st.text(st.sampled_from("ab :;,.()[]\\0123456789-+e\n\N{SNOWMAN}"), max_size=60) | st.text(max_size=60)


@given(MARKS, st.sampled_from(SYNTAXES))
def test_any_text_parses_or_is_refused(prompt: str, syntax: str) -> None:
    try:
        parts = parse_prompt(prompt, syntax)
    except UsageError:
        return
    assert sum(part.weight for part in parts) == pytest.approx(1)
    assert all(part.spans for part in parts)


@given(MARKS)
def test_brackets_lose_no_word(prompt: str) -> None:
    (sub,) = parse_prompt(prompt, "a1111")
    kept = [mark for mark in prompt if mark.isalpha()]
    assert [mark for mark in sub.text if mark.isalpha()] == kept


TOKENIZER = read_tokenizer(embedded_model_path() / "tokenizer")


def pieces(prompt: str, syntax: str = "seed", *, long_prompts: bool = True) -> list[list[int]]:
    tokenized = tokenize_prompt(TOKENIZER, parse_prompt(prompt, syntax), 8, long_prompts=long_prompts)
    return [list(piece.ids) for part in tokenized.sub_prompts for piece in part.windows]


def test_long_prompts_come_in_pieces_that_together_are_the_prompt() -> None:
    prompt = "red apple panda frog skull ghost cactus doughnut"
    ids = TOKENIZER(prompt, add_special_tokens=False).input_ids
    begin, end = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    found = pieces(prompt)
    assert [piece[0] for piece in found] == [begin] * len(found)
    assert [len(piece) for piece in found] == [8] * len(found)
    assert [one for piece in found for one in piece if one not in (begin, end)] == ids
    assert pieces("") == [[begin, *[end] * 7]]
    assert pieces(prompt, long_prompts=False) == found[:1]


def test_what_does_not_fit_is_counted_and_told() -> None:
    tokenized = tokenize_prompt(
        TOKENIZER, parse_prompt("apple apple apple:1 apple apple apple apple frog:1"), 5, long_prompts=False
    )
    assert tokenized.n_tokens == 8
    assert tokenized.truncated == "apple frog"
    assert tokenized.n_windows == 1


def test_emphasis_stays_on_its_words() -> None:
    tokenized = tokenize_prompt(TOKENIZER, parse_prompt("red (apple:2) [frog]", "a1111"), 8, long_prompts=False)
    (piece,) = tokenized.sub_prompts[0].windows
    assert list(piece.emphasis) == pytest.approx([1, 1, 2, 1 / 1.1, 1, 1, 1, 1])
    assert list(piece.ids) == pieces("red apple frog", "none")[0]
