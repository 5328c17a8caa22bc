"""Count the tokens of a manifest's prompts: many rows at once, and a prompt that comes again only once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from tinysd_batch.model.text.prompt_syntax import SubPrompt, parse_prompt
from tinysd_batch.model.text.tokenizer import TokenizedPrompt, count_tokens, read_tokenizer, tokenize_prompt
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.report.formatting import count, to_one_line

if TYPE_CHECKING:
    from tinysd_batch.job.state.job import Job

ROWS_PER_CHUNK = 512
MAX_CACHED_PROMPTS = 8192
MAX_CACHED_CHARACTERS = 1000  # of one prompt: ten megabytes in all, as prompts usually are
MAX_SHOWN_CHARACTERS = 100  # of a prompt, where a terminal's width does not decide
PromptKey = tuple[str, str]  # text and syntax


@dataclass(frozen=True, slots=True)
class PromptTokenCount:
    """What is counted of a prompt."""

    n_tokens: int
    is_truncated: bool  # the model does not see all of it
    has_weights: bool  # it has weights or emphasis


@dataclass(frozen=True, slots=True)
class CountedRow:
    """A row that can be made, as the model will take it."""

    row: Row
    prompt: PromptTokenCount
    negative: PromptTokenCount
    reader: "PromptTokenCounter"

    @property
    def is_truncated(self) -> bool:
        return self.prompt.is_truncated or self.negative.is_truncated

    def line(self) -> str:
        """`row 3: 4 images, 5 tokens: tabby cat (0.125) + white duck (0.375) + hybrid (0.5)`"""
        row = self.row
        images = count(row.n_iter * row.n_samples, "image")
        words = format_weights(parse_prompt(row.prompt, row.prompt_syntax))
        told = f"row {row.number}: {images}, {count(self.prompt.n_tokens, 'token')}"
        if self.is_truncated:
            told += "".join(
                f", {what}: {to_one_line(cut, 80)}"
                for what, cut in (
                    ("cut off", self.reader.tokenize(row.prompt, row.prompt_syntax).truncated),
                    (
                        "cut off the negative prompt",
                        self.reader.tokenize(row.negative_prompt, row.prompt_syntax).truncated,
                    ),
                )
                if cut
            )
        return f"{told}: {words}"


class PromptTokenCounter:
    """Parses and counts the prompts of rows with the job's model and settings."""

    def __init__(self, job: "Job") -> None:
        self.tokenizer = read_tokenizer(job.model.path / "tokenizer")
        self.max_tokens = job.model.max_tokens
        self.long_prompts = job.settings.long_prompts
        self.cache: dict[PromptKey, PromptTokenCount] = {}

    def read(self, rows: Iterable[Row | InvalidRow]) -> Iterator[CountedRow | InvalidRow]:
        """The rows in their order, some at a time."""
        rows = iter(rows)
        while some := list(islice(rows, ROWS_PER_CHUNK)):
            found = self.count(prompt for row in some if isinstance(row, Row) for prompt in get_prompts(row))
            for row in some:
                if isinstance(row, InvalidRow):
                    yield row
                else:
                    prompt, negative = get_prompts(row)
                    yield CountedRow(row, found[prompt], found[negative], self)

    def count(self, prompts: Iterable[PromptKey]) -> dict[PromptKey, PromptTokenCount]:
        """The counts of all these prompts; those counted before are taken from the cache."""
        found = {prompt: self.cache.get(prompt) for prompt in prompts}
        new = [prompt for prompt, known in found.items() if known is None]
        counted = dict(zip(new, self.count_new(new), strict=True))
        for prompt, value in counted.items():
            if len(prompt[0]) <= MAX_CACHED_CHARACTERS:
                self.cache[prompt] = value
        while len(self.cache) > MAX_CACHED_PROMPTS:
            del self.cache[next(iter(self.cache))]
        return {prompt: known or counted[prompt] for prompt, known in found.items()}

    def count_new(self, prompts: Iterable[PromptKey]) -> Iterator[PromptTokenCount]:
        parsed = [parse_prompt(text, syntax) for text, syntax in prompts]
        texts = [run.text for prompt in parsed for sub in prompt for run in sub.spans]
        counts = iter(count_tokens(self.tokenizer, texts))
        for prompt in parsed:
            lengths = [sum(islice(counts, len(sub.spans))) for sub in prompt]
            is_cut = not self.long_prompts and max(lengths) > self.max_tokens - 2
            yield PromptTokenCount(sum(lengths), is_cut, has_weights(prompt))

    def tokenize(self, prompt: str, syntax: str) -> TokenizedPrompt:
        return tokenize_prompt(
            self.tokenizer, parse_prompt(prompt, syntax), self.max_tokens, long_prompts=self.long_prompts
        )


def get_prompts(row: Row) -> tuple[PromptKey, PromptKey]:
    return (row.prompt, row.prompt_syntax), (row.negative_prompt, row.prompt_syntax)


def has_weights(prompt: list[SubPrompt]) -> bool:
    return len(prompt) > 1 or any(run.emphasis != 1 for run in prompt[0].spans)


def format_weights(prompt: list[SubPrompt]) -> str:
    """What a prompt's marks came to: `tabby cat (0.25) + white duck (0.75)`, or `a | red x1.1 | apple`."""
    parts = []
    for sub in prompt:
        runs = (
            to_one_line(run.text.strip(), MAX_SHOWN_CHARACTERS) + (f" x{run.emphasis:.3g}" if run.emphasis != 1 else "")
            for run in sub.spans
        )
        parts.append(" | ".join(runs) + (f" ({sub.weight:.3g})" if len(prompt) > 1 else ""))
    return " + ".join(parts)
