"""What a prompt's marks mean: the origin's `tabby cat:0.25 white duck:0.75 hybrid`, or the web UI's `(red:1.2) apple`.

Both become sub-prompts, which are encoded each alone and averaged by weight, of runs of text, whose tokens are
multiplied by their emphasis. Imports nothing heavy: manifests are checked with it.
"""

import math
import re
from dataclasses import dataclass

from tinysd_batch.errors import UsageError

SYNTAXES = ("seed", "a1111", "none")
MIN_WEIGHT_SUM = 1e-9
BRACKET_EMPHASIS = 1.1  # of a bracket without a number
CLOSING_BRACKETS = {")": ("(", BRACKET_EMPHASIS), "]": ("[", 1 / BRACKET_EMPHASIS)}

# A colon, a number, then a space, perhaps after a comma, or the end.
NUMBER_PATTERN = r"[-+]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
WEIGHT_PATTERN = re.compile(rf"(?<!\\):({NUMBER_PATTERN})(?=[,;]?(?:\s|$))[,;]?\s?", re.IGNORECASE)
BRACKET_PATTERN = re.compile(
    r"\\[\\()\[\]]|:\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class EmphasisSpan:
    """Text whose tokens are emphasized alike."""

    text: str
    emphasis: float = 1.0


@dataclass(frozen=True, slots=True)
class SubPrompt:
    """What is encoded in one go, and how much it counts; a prompt's weights sum to 1."""

    weight: float
    spans: tuple[EmphasisSpan, ...]

    @property
    def text(self) -> str:
        return "".join(run.text for run in self.spans)


def parse_prompt(prompt: str, syntax: str = "seed") -> list[SubPrompt]:
    """The prompt's sub-prompts: several with syntax `seed` and weights in it, else one.

    Raises UsageError for weights that are not finite or do not sum to more than zero, and for an unknown syntax.
    """
    if syntax == "seed":
        return parse_weights(prompt)
    if syntax == "a1111":
        return [SubPrompt(1.0, tuple(parse_brackets(prompt)))]
    if syntax == "none":
        return [SubPrompt(1.0, (EmphasisSpan(prompt),))]
    raise UsageError(f"prompt_syntax = {syntax!r}: one of {', '.join(SYNTAXES)} was expected")


def parse_weights(prompt: str) -> list[SubPrompt]:
    r"""Sub-prompts in the origin's syntax: `text:weight`, text after the last weight counting 1.

    A colon is text where no number follows, after a backslash, in a URL, and in times and ratios (`12:30`, `16:9`).
    """
    pieces, end = [], 0
    for match in WEIGHT_PATTERN.finditer(prompt):
        if not is_time_or_url(prompt[end : match.start()], match[1]):
            pieces.append((prompt[end : match.start()], float(match[1])))
            end = match.end()
    if not pieces:
        return [SubPrompt(1.0, (EmphasisSpan(unescape_colons(prompt)),))]
    if rest := prompt[end:]:
        pieces.append((rest, 1.0))
    total = sum(weight for _, weight in pieces)
    if not math.isfinite(total) or total < MIN_WEIGHT_SUM:
        raise UsageError(
            f"the prompt's weights sum to {total:g}; give weights with a sum above zero, "
            f"or write \\: for a colon that is text"
        )
    return [SubPrompt(weight / total, (EmphasisSpan(unescape_colons(text)),)) for text, weight in pieces]


def is_time_or_url(before: str, number: str) -> bool:
    """Whether a colon and its number belong to the word before them: 12:30, 16:9, http://host:80."""
    word = before.split()[-1] if before and not before[-1].isspace() else ""
    return "://" in word or (number.isdigit() and re.fullmatch(r"[\d.:]+", word.lstrip("([{'\"")) is not None)


def unescape_colons(text: str) -> str:
    return text.replace("\\:", ":")


def parse_brackets(prompt: str) -> list[EmphasisSpan]:
    r"""Runs in the web UI's syntax: (word) counts 1.1, [word] 1/1.1, (word:1.3) 1.3, nested ones multiply.

    `\(` is a bracket that is text. Brackets left open close at the end; closing ones without a partner are text.
    """
    reader = BracketParser()
    for match in BRACKET_PATTERN.finditer(prompt):
        reader.read(match[0], match[1])
    for bracket, factor in CLOSING_BRACKETS.values():
        while reader.open_brackets[bracket]:
            reader.close(bracket, factor)
    if not all(math.isfinite(factor) for factor in reader.factors):
        raise UsageError("an emphasis in the prompt is not finite; give a smaller number")
    return merge_spans(reader.texts, reader.factors) or [EmphasisSpan("")]


class BracketParser:
    """Collects bits of text and their emphasis."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.factors: list[float] = []
        self.open_brackets: dict[str, list[int]] = {"(": [], "[": []}  # where brackets that are still open began

    def read(self, mark: str, weight: str | None) -> None:
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
    """Neighbours of equal emphasis as one: a word must not be cut in two."""
    runs: list[EmphasisSpan] = []
    for text, factor in zip(texts, factors, strict=True):
        if runs and runs[-1].emphasis == factor:
            runs[-1] = EmphasisSpan(runs[-1].text + text, factor)
        else:
            runs.append(EmphasisSpan(text, factor))
    return runs
