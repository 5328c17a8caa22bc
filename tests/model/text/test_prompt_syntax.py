import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.errors import UsageError
from tinysd_batch.model.checkpoint.info import embedded_model_path
from tinysd_batch.model.text.prompt_syntax import SYNTAX_CHARACTERS, EmphasisSpan, SubPrompt, parse_prompt
from tinysd_batch.model.text.tokenizer import read_tokenizer, tokenize_prompt


def check_equal(parsed: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert [text for text, _ in parsed] == [text for text, _ in expected]
    assert [number for _, number in parsed] == pytest.approx([number for _, number in expected])


@pytest.mark.parametrize(
    ("prompt", "sub_prompts"),
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
        # A single weight has no effect and is removed.
        ("cat:0.5", [("cat", 1.0)]),
        # A colon is text if no number follows it.
        ("style: flat", [("style: flat", 1.0)]),
        ("cat: 2 dog", [("cat: 2 dog", 1.0)]),
        ("a:b", [("a:b", 1.0)]),
        # It is not a weight in times, ratios and URLs.
        ("a photo, 12:30 clock", [("a photo, 12:30 clock", 1.0)]),
        ("at 12:30:45 sharp", [("at 12:30:45 sharp", 1.0)]),
        ("16:9 cat:1 dog:1", [("16:9 cat", 0.5), ("dog", 0.5)]),
        ("(16:9 film) cat", [("(16:9 film) cat", 1.0)]),
        ("2.39:1 film", [("2.39:1 film", 1.0)]),
        ("http://x.y z", [("http://x.y z", 1.0)]),
        ("see http://host:80 now", [("see http://host:80 now", 1.0)]),
        # It is a weight after names that end in a digit, and if the number is a fraction.
        ("r2d2:1 c3po:3", [("r2d2", 0.25), ("c3po", 0.75)]),
        ("top 10:0.5 cat:0.5", [("top 10", 0.5), ("cat", 0.5)]),
        (r"cat\:2 dog", [("cat:2 dog", 1.0)]),
        (r"scale 1\:0.5 cat:1 dog:1", [("scale 1:0.5 cat", 0.5), ("dog", 0.5)]),
    ],
)
def test_weights(prompt: str, sub_prompts: list[tuple[str, float]]) -> None:
    check_equal([(sub.text, sub.weight) for sub in parse_prompt(prompt, "seed")], sub_prompts)


@pytest.mark.parametrize(
    "prompt", ["a:0 b:0", "a:1 b:-1", "a:1 b:-2", "a:1e308 b:1e308 c", "a:1e999 b", "a:nan b:1", "a:inf", "cat:0"]
)
def test_weights_without_a_positive_sum_are_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match=r"weights sum to (0|-1|inf|nan); give weights with a sum above zero"):
        parse_prompt(prompt)


@pytest.mark.parametrize(
    ("prompt", "spans"),
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
def test_brackets(prompt: str, spans: list[tuple[str, float]]) -> None:
    (sub,) = parse_prompt(prompt, "a1111")
    check_equal([(span.text, span.emphasis) for span in sub.spans], spans)


def test_syntax_none_keeps_the_prompt_as_it_is() -> None:
    prompt = r"cat:1 (dog:2) \: [owl]"
    assert parse_prompt(prompt, "none") == (SubPrompt(1.0, (EmphasisSpan(prompt),)),)


def test_an_unknown_syntax_is_refused() -> None:
    with pytest.raises(UsageError, match="prompt_syntax = 'compel': one of seed, a1111, none"):
        parse_prompt("cat", "compel")


MARKS = st.text(st.sampled_from("ab :;,.()[]\\0123456789-+e\n\N{SNOWMAN}"), max_size=60) | st.text(max_size=60)


@given(MARKS, st.sampled_from(sorted(SYNTAX_CHARACTERS)))
def test_any_text_is_parsed_or_refused(prompt: str, syntax: str) -> None:
    try:
        sub_prompts = parse_prompt(prompt, syntax)
    except UsageError:
        return
    assert sum(sub.weight for sub in sub_prompts) == pytest.approx(1)
    assert all(sub.spans for sub in sub_prompts)


@given(MARKS)
def test_brackets_keep_every_word(prompt: str) -> None:
    (sub,) = parse_prompt(prompt, "a1111")
    letters = [character for character in prompt if character.isalpha()]
    assert [character for character in sub.text if character.isalpha()] == letters


TOKENIZER = read_tokenizer(embedded_model_path() / "tokenizer")


def window_ids(prompt: str, syntax: str = "seed", *, long_prompts: bool = True) -> list[list[int]]:
    tokenized = tokenize_prompt(TOKENIZER, parse_prompt(prompt, syntax), 8, long_prompts=long_prompts)
    return [list(window.ids) for sub in tokenized.sub_prompts for window in sub.windows]


def test_long_prompts_are_split_into_windows() -> None:
    prompt = "red apple panda frog skull ghost cactus doughnut"
    ids = TOKENIZER(prompt, add_special_tokens=False).input_ids
    begin, end = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    windows = window_ids(prompt)
    assert [window[0] for window in windows] == [begin] * len(windows)
    assert [len(window) for window in windows] == [8] * len(windows)
    assert [token_id for window in windows for token_id in window if token_id not in (begin, end)] == ids
    assert window_ids("") == [[begin, *[end] * 7]]
    assert window_ids(prompt, long_prompts=False) == windows[:1]


def test_truncated_text_is_counted_and_reported() -> None:
    tokenized = tokenize_prompt(
        TOKENIZER, parse_prompt("apple apple apple:1 apple apple apple apple frog:1"), 5, long_prompts=False
    )
    assert tokenized.n_tokens == 8
    assert tokenized.truncated == "apple frog"
    assert tokenized.n_windows == 1


def test_emphasis_applies_to_its_words_only() -> None:
    tokenized = tokenize_prompt(TOKENIZER, parse_prompt("red (apple:2) [frog]", "a1111"), 8, long_prompts=False)
    (window,) = tokenized.sub_prompts[0].windows
    assert list(window.emphasis) == pytest.approx([1, 1, 2, 1 / 1.1, 1, 1, 1, 1])
    assert list(window.ids) == window_ids("red apple frog", "none")[0]
