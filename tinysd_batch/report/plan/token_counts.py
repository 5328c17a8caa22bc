"""Count the tokens of a manifest's prompts: many rows at a time, and each distinct prompt once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from tinysd_batch.model.text.prompt_syntax import SubPrompt, parse_prompt
from tinysd_batch.model.text.tokenizer import TokenizedPrompt, count_tokens, read_tokenizer, tokenize_prompt
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.report.formatting import format_count, to_one_line

if TYPE_CHECKING:
    from tinysd_batch.job.state.job import Job

ROWS_PER_CHUNK = 512
MAX_CACHED_PROMPTS = 8192
MAX_CACHED_CHARACTERS = 1000  # per prompt; with usual prompts the cache takes about ten megabytes
MAX_SHOWN_CHARACTERS = 100  # of a prompt span
PromptKey = tuple[str, str]  # text and syntax


@dataclass(frozen=True, slots=True)
class PromptTokenCount:
    """The token count of a prompt, and what it implies."""

    n_tokens: int
    is_truncated: bool  # the prompt exceeds the model's limit
    has_weights: bool  # it contains weights or emphasis


@dataclass(frozen=True, slots=True)
class CountedRow:
    """A valid row with its token counts."""

    row: Row
    prompt: PromptTokenCount
    negative: PromptTokenCount
    counter: "PromptTokenCounter"

    @property
    def is_truncated(self) -> bool:
        return self.prompt.is_truncated or self.negative.is_truncated

    def format_line(self) -> str:
        """Return `row 3: 4 images, 5 tokens: tabby cat (0.125) + white duck (0.375) + hybrid (0.5)`."""
        row = self.row
        images = format_count(row.n_images, "image")
        line = f"row {row.number}: {images}, {format_count(self.prompt.n_tokens, 'token')}"
        if self.is_truncated:
            truncated, negative_truncated = (self.counter.tokenize(*prompt).truncated for prompt in get_prompts(row))
            line += f", truncated: {to_one_line(truncated, 80)}" if truncated else ""
            line += f", truncated negative prompt: {to_one_line(negative_truncated, 80)}" if negative_truncated else ""
        return f"{line}: {format_weights(parse_prompt(row.prompt, row.settings.prompt_syntax))}"


class PromptTokenCounter:
    """Parses prompts and counts their tokens with the job's tokenizer and settings."""

    def __init__(self, job: "Job") -> None:
        self.tokenizer = read_tokenizer(job.model.path / "tokenizer")
        self.max_tokens = job.model.max_tokens
        self.long_prompts = job.settings.long_prompts
        self.cache: dict[PromptKey, PromptTokenCount] = {}

    def count_rows(self, rows: Iterable[Row | InvalidRow]) -> Iterator[CountedRow | InvalidRow]:
        """Yield the rows in order, reading a chunk at a time."""
        rows = iter(rows)
        while chunk := list(islice(rows, ROWS_PER_CHUNK)):
            counts = self.count_prompts(prompt for row in chunk if isinstance(row, Row) for prompt in get_prompts(row))
            for row in chunk:
                if isinstance(row, InvalidRow):
                    yield row
                else:
                    prompt, negative = get_prompts(row)
                    yield CountedRow(row, counts[prompt], counts[negative], self)

    def count_prompts(self, prompts: Iterable[PromptKey]) -> dict[PromptKey, PromptTokenCount]:
        """Return the counts of all these prompts, from the cache if possible."""
        cached = {prompt: self.cache.get(prompt) for prompt in prompts}
        new = [prompt for prompt, count in cached.items() if count is None]
        counted = dict(zip(new, self.count_new_prompts(new), strict=True))
        for prompt, count in counted.items():
            if len(prompt[0]) <= MAX_CACHED_CHARACTERS:
                self.cache[prompt] = count
        while len(self.cache) > MAX_CACHED_PROMPTS:
            del self.cache[next(iter(self.cache))]
        return {prompt: count or counted[prompt] for prompt, count in cached.items()}

    def count_new_prompts(self, prompts: Iterable[PromptKey]) -> Iterator[PromptTokenCount]:
        parsed_prompts = [parse_prompt(text, syntax) for text, syntax in prompts]
        texts = [span.text for sub_prompts in parsed_prompts for sub_prompt in sub_prompts for span in sub_prompt.spans]
        counts = iter(count_tokens(self.tokenizer, texts))
        for sub_prompts in parsed_prompts:
            lengths = [sum(islice(counts, len(sub_prompt.spans))) for sub_prompt in sub_prompts]
            is_truncated = not self.long_prompts and max(lengths) > self.max_tokens - 2
            yield PromptTokenCount(sum(lengths), is_truncated, has_weights(sub_prompts))

    def tokenize(self, prompt: str, syntax: str) -> TokenizedPrompt:
        return tokenize_prompt(
            self.tokenizer, parse_prompt(prompt, syntax), self.max_tokens, long_prompts=self.long_prompts
        )


def get_prompts(row: Row) -> tuple[PromptKey, PromptKey]:
    """Return the prompt and the negative prompt."""
    syntax = row.settings.prompt_syntax
    return (row.prompt, syntax), (row.settings.negative_prompt, syntax)


def has_weights(sub_prompts: Sequence[SubPrompt]) -> bool:
    return len(sub_prompts) > 1 or any(span.emphasis != 1 for span in sub_prompts[0].spans)


def format_weights(sub_prompts: Sequence[SubPrompt]) -> str:
    """Return a prompt with its parsed weights: `tabby cat (0.25) + white duck (0.75)`, `a | red x1.1 | apple`."""
    formatted = []
    for sub_prompt in sub_prompts:
        spans = (
            to_one_line(span.text.strip(), MAX_SHOWN_CHARACTERS)
            + (f" x{span.emphasis:.3g}" if span.emphasis != 1 else "")
            for span in sub_prompt.spans
        )
        formatted.append(" | ".join(spans) + (f" ({sub_prompt.weight:.3g})" if len(sub_prompts) > 1 else ""))
    return " + ".join(formatted)
