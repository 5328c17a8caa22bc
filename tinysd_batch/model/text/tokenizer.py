"""Prompts as the text encoder takes them: pieces of token ids, each between a begin and an end token.

Without torch: `plan` counts tokens with it.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import CLIPTokenizer

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.text.prompt_syntax import EmphasisSpan, SubPrompt
from tinysd_batch.text import excerpt, fold_widths

MAX_BATCH_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True)
class TokenWindow:
    """As many tokens as the text encoder takes at once; emphasis 1 for all that are no words."""

    ids: tuple[int, ...]
    emphasis: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenizedSubPrompt:
    """A sub-prompt in pieces."""

    weight: float
    windows: tuple[TokenWindow, ...]
    n_tokens: int  # of the text, kept or not
    truncated: str | None  # what did not fit


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the text encoder takes it: parts that are encoded apart and averaged by weight."""

    sub_prompts: tuple[TokenizedSubPrompt, ...]

    @property
    def n_windows(self) -> int:
        """Of the longest part; the others are filled up."""
        return max(len(part.windows) for part in self.sub_prompts)

    @property
    def n_tokens(self) -> int:
        """Over all parts, without begin and end tokens, kept or not."""
        return sum(part.n_tokens for part in self.sub_prompts)

    @property
    def truncated(self) -> str | None:
        """The tails that the text encoder does not see."""
        return " … ".join(part.truncated for part in self.sub_prompts if part.truncated) or None


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Raises ModelError. Without its files the library would quietly make do with a vocabulary of three."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file() and not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder / name}: missing; the model folder is not complete")
    try:
        with without_byte_order_marks(folder) as readable:
            tokenizer = CLIPTokenizer.from_pretrained(readable, local_files_only=True)
        tokenize_sub_prompt(tokenizer, SubPrompt(1.0, (EmphasisSpan("a"),)), 3, long_prompts=True)  # does it work?
    except Exception as error:  # noqa: BLE001 - from Rust they come as no class but this
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{folder}: not a readable CLIP tokenizer: {reason}") from None
    check_added_tokens(tokenizer, folder)
    return tokenizer


def check_added_tokens(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Raise ModelError where an added token was read as another number than its file states: that of another word."""
    known = tokenizer.get_vocab()
    try:
        stated = list(read_added_tokens(folder))
    except (AttributeError, LookupError, TypeError) as error:
        raise ModelError(f"{folder}: not a readable CLIP tokenizer: its added tokens: {error}") from None
    for file, token, number in stated:
        if known.get(token) != number:
            raise ModelError(
                f"{folder / file}: token {excerpt(token)} is number {excerpt(number)}, and would be read as "
                f"{known.get(token)}; numbers of added tokens must follow the vocabulary's without a gap"
            )


def read_added_tokens(folder: Path) -> Iterator[tuple[str, str, object]]:
    """Added tokens with their numbers, as the files have them: by token, and in newer ones by number."""
    name = "added_tokens.json"
    added = read_json_object(folder / name) if (folder / name).is_file() else {}
    yield from ((name, token, number) for token, number in added.items())
    name = "tokenizer_config.json"
    config = read_json_object(folder / name) if (folder / name).is_file() else {}
    for text, entry in (config.get("added_tokens_decoder") or {}).items():
        number = int(text) if text.isdecimal() else text
        yield name, entry["content"] if isinstance(entry, dict) else str(entry), number


@contextmanager
def without_byte_order_marks(folder: Path) -> Iterator[Path]:
    """The folder, or for the time of a `with` a copy of its files where one begins with a byte-order mark."""
    files = [file for file in folder.iterdir() if file.suffix in (".json", ".txt") and file.is_file()]
    if not any(has_byte_order_mark(file) for file in files):
        yield folder
        return
    with TemporaryDirectory() as copy:
        for file in files:
            (Path(copy) / file.name).write_bytes(file.read_bytes().removeprefix(BOM_UTF8))
        yield Path(copy)


def has_byte_order_mark(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(BOM_UTF8)) == BOM_UTF8


def check_vocabulary(tokenizer: CLIPTokenizer, known: int, folder: Path) -> None:
    """Raises ModelError where there are tokens that the text encoder has no embedding for."""
    token, number = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if number >= known:
        raise ModelError(f"{folder}: token {excerpt(token)} is number {number}, the text encoder knows {known}")


def tokenize_prompt(
    tokenizer: CLIPTokenizer, prompt: Sequence[SubPrompt], max_tokens: int, *, long_prompts: bool
) -> TokenizedPrompt:
    """Each part cut to the encoder's limit, or with `long_prompts` into as many pieces as it needs."""
    return TokenizedPrompt(
        tuple(tokenize_sub_prompt(tokenizer, sub, max_tokens, long_prompts=long_prompts) for sub in prompt)
    )


def tokenize_sub_prompt(
    tokenizer: CLIPTokenizer, sub: SubPrompt, max_tokens: int, *, long_prompts: bool
) -> TokenizedSubPrompt:
    ids: list[int] = []
    emphasis: list[float] = []
    for run in sub.spans:
        found = tokenizer(
            fold_prompt_widths(tokenizer, run.text), add_special_tokens=False, truncation=False, verbose=False
        ).input_ids
        ids += found
        emphasis += [run.emphasis] * len(found)
    room = max_tokens - 2
    end = max(len(ids), 1) if long_prompts else 1
    pieces = tuple(
        build_window(tokenizer, ids[start : start + room], emphasis[start : start + room], max_tokens)
        for start in range(0, end, room)
    )
    rest = [] if long_prompts else ids[room:]
    return TokenizedSubPrompt(sub.weight, pieces, len(ids), (tokenizer.decode(rest).strip() or None) if rest else None)


def count_tokens(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has, without begin and end tokens: many at once, on all cores."""
    # Tokenizers keep each token's text and place beside its number: what is encoded together has a bound.
    counts: list[int] = []
    texts = [fold_prompt_widths(tokenizer, text) for text in texts]
    for start, end in split_by_characters([len(text) for text in texts], MAX_BATCH_CHARACTERS):
        found = tokenizer.backend_tokenizer.encode_batch_fast(texts[start:end], add_special_tokens=False)
        counts += [len(encoding) for encoding in found]
    return counts


def split_by_characters(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbours that together have up to `most` characters, as (start, end); a longer text goes alone."""
    start = total = 0
    for at, length in enumerate(lengths):
        if at > start and total + length > most:
            yield start, at
            start, total = at, 0
        total += length
    if start < len(lengths):
        yield start, len(lengths)


def fold_prompt_widths(tokenizer: CLIPTokenizer, text: str) -> str:
    """Text as tiny-stable-diffusion's tokenizer reads it: in usual width, all but the tokens that a model added."""
    if fold_widths(text) == text:
        return text
    wide = [token for token in tokenizer.get_added_vocab() if fold_widths(token) != token]
    if not wide:
        return fold_widths(text)
    parts = re.split(f"({'|'.join(map(re.escape, sorted(wide, key=len, reverse=True)))})", text)
    return "".join(part if number % 2 else fold_widths(part) for number, part in enumerate(parts))


def build_window(tokenizer: CLIPTokenizer, ids: list[int], emphasis: list[float], max_tokens: int) -> TokenWindow:
    padding = max_tokens - 2 - len(ids)
    return TokenWindow(
        (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding),
        (1.0, *emphasis, 1.0, *[1.0] * padding),
    )


def build_empty_window(tokenizer: CLIPTokenizer, max_tokens: int) -> TokenWindow:
    """What stands for no text, and fills up shorter prompts beside longer ones."""
    return build_window(tokenizer, [], [], max_tokens)
