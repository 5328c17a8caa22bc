"""Parse prompts: tiny-stable-diffusion's `tabby cat:0.25 white duck:0.75 hybrid`, or the web UI's `(red:1.2) apple`.

Both syntaxes give sub-prompts, which are encoded separately and averaged by weight. A sub-prompt consists of spans of
text, whose token embeddings are multiplied by an emphasis. Imports no heavy library: manifests are checked with it.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from tinysd_batch.errors import UsageError

# A prompt without any of these characters has no syntax.
SYNTAX_CHARACTERS = {"seed": frozenset(":"), "a1111": frozenset("()[]\\"), "none": frozenset[str]()}
MIN_WEIGHT_SUM = 1e-9
BRACKET_EMPHASIS = 1.1  # of brackets without a number
CLOSING_BRACKETS = {")": ("(", BRACKET_EMPHASIS), "]": ("[", 1 / BRACKET_EMPHASIS)}

# A colon, a number, an optional comma or semicolon, then white space or the end.
NUMBER_PATTERN = r"[-+]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
WEIGHT_PATTERN = re.compile(rf"(?<!\\):({NUMBER_PATTERN})(?=[,;]?(?:\s|$))[,;]?\s?", re.IGNORECASE)
BRACKET_PATTERN = re.compile(
    r"\\[\\()\[\]]|:\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class EmphasisSpan:
    """Text whose tokens have the same emphasis."""

    text: str
    emphasis: float = 1.0


@dataclass(frozen=True, slots=True)
class SubPrompt:
    """A part of a prompt that is encoded by itself, and its weight; the weights of a prompt sum to 1."""

    weight: float
    spans: tuple[EmphasisSpan, ...]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


def has_syntax(prompt: str, syntax: str) -> bool:
    """Whether the prompt has a character that may have a meaning in this syntax."""
    return not SYNTAX_CHARACTERS[syntax].isdisjoint(prompt)


def parse_prompt(prompt: str, syntax: str = "seed") -> tuple[SubPrompt, ...]:
    """Split a prompt into sub-prompts: several if the syntax is `seed` and the prompt has weights, else one.

    Raises:
        UsageError: weights are not finite or their sum is not above zero, or the syntax is unknown.
    """
    if syntax not in SYNTAX_CHARACTERS:
        raise UsageError(f"prompt_syntax = {syntax!r}: one of {', '.join(SYNTAX_CHARACTERS)} was expected")
    if not has_syntax(prompt, syntax):
        return (SubPrompt(1.0, (EmphasisSpan(prompt),)),)
    return parse_syntax(prompt, syntax)


@lru_cache(1024)  # a prompt is parsed when its row is checked, and used when it is generated
def parse_syntax(prompt: str, syntax: str) -> tuple[SubPrompt, ...]:
    if syntax == "seed":
        return tuple(parse_weights(prompt))
    return (SubPrompt(1.0, tuple(parse_brackets(prompt))),)


def parse_weights(prompt: str) -> list[SubPrompt]:
    r"""Parse tiny-stable-diffusion's syntax: `text:weight`; text after the last weight has weight 1.

    A colon is text if no number follows, after a backslash, in a URL, and in times and ratios (`12:30`, `16:9`).
    """
    weighted_texts, end = [], 0
    for match in WEIGHT_PATTERN.finditer(prompt):
        if not is_time_or_url(prompt[end : match.start()], match[1]):
            weighted_texts.append((prompt[end : match.start()], float(match[1])))
            end = match.end()
    if not weighted_texts:
        return [SubPrompt(1.0, (EmphasisSpan(unescape_colons(prompt)),))]
    if rest := prompt[end:]:
        weighted_texts.append((rest, 1.0))
    total = sum(weight for _, weight in weighted_texts)
    if not math.isfinite(total) or total < MIN_WEIGHT_SUM:
        raise UsageError(
            f"the prompt's weights sum to {total:g}; give weights with a sum above zero, "
            f"or write \\: for a colon that is text"
        )
    return [SubPrompt(weight / total, (EmphasisSpan(unescape_colons(text)),)) for text, weight in weighted_texts]


def is_time_or_url(before: str, number: str) -> bool:
    """Whether a colon and its number belong to the word before them: 12:30, 16:9, http://host:80."""
    word = before.split()[-1] if before and not before[-1].isspace() else ""
    return "://" in word or (number.isdigit() and re.fullmatch(r"[\d.:]+", word.lstrip("([{'\"")) is not None)


def unescape_colons(text: str) -> str:
    return text.replace("\\:", ":")


def parse_brackets(prompt: str) -> list[EmphasisSpan]:
    r"""Parse the web UI's syntax: (word) has emphasis 1.1, [word] 1/1.1, (word:1.3) 1.3; nested brackets multiply.

    `\(` is a bracket that is text. Open brackets are closed at the end; closing brackets without a partner are text.
    """
    parser = BracketParser()
    for match in BRACKET_PATTERN.finditer(prompt):
        parser.feed(match[0], match[1])
    for bracket, factor in CLOSING_BRACKETS.values():
        while parser.open_brackets[bracket]:
            parser.close(bracket, factor)
    if not all(math.isfinite(factor) for factor in parser.factors):
        raise UsageError("an emphasis in the prompt is not finite; give a smaller number")
    return merge_spans(parser.texts, parser.factors) or [EmphasisSpan("")]


class BracketParser:
    """Collects pieces of text and their emphasis."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.factors: list[float] = []
        # Of each bracket that is still open: the index of the first text in it.
        self.open_brackets: dict[str, list[int]] = {"(": [], "[": []}

    def feed(self, mark: str, weight: str | None) -> None:
        """Process the next match of `BRACKET_PATTERN`: a bracket, an escape or text, and the weight if it has one."""
        if mark in self.open_brackets:
            self.open_brackets[mark].append(len(self.texts))
        elif weight is not None and self.open_brackets["("]:
            self.close("(", float(weight))
        elif mark in CLOSING_BRACKETS and self.open_brackets[CLOSING_BRACKETS[mark][0]]:
            self.close(*CLOSING_BRACKETS[mark])
        else:
            self.texts.append(mark[1:] if mark[0] == "\\" and len(mark) == 2 else mark)
            self.factors.append(1.0)

    def close(self, bracket: str, factor: float) -> None:
        for i in range(self.open_brackets[bracket].pop(), len(self.factors)):
            self.factors[i] *= factor


def merge_spans(texts: list[str], factors: list[float]) -> list[EmphasisSpan]:
    """Merge neighbours of equal emphasis, so that no word is tokenized in two halves."""
    spans: list[EmphasisSpan] = []
    for text, factor in zip(texts, factors, strict=True):
        if spans and spans[-1].emphasis == factor:
            spans[-1] = EmphasisSpan(spans[-1].text + text, factor)
        else:
            spans.append(EmphasisSpan(text, factor))
    return spans
