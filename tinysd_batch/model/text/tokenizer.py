"""Tokenize prompts into windows for the text encoder, each between a begin and an end token.

Does not import torch: `plan` counts tokens with it.
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
    """As many tokens as the text encoder takes at once; begin, end and padding tokens have emphasis 1."""

    ids: tuple[int, ...]
    emphasis: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenizedSubPrompt:
    """A sub-prompt, split into windows."""

    weight: float
    windows: tuple[TokenWindow, ...]
    n_tokens: int  # of the text, truncated tokens included
    truncated: str | None  # the text that did not fit


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A tokenized prompt: sub-prompts that are encoded separately and averaged by weight."""

    sub_prompts: tuple[TokenizedSubPrompt, ...]

    @property
    def n_windows(self) -> int:
        """Windows of the longest sub-prompt; the others are padded."""
        return max(len(sub.windows) for sub in self.sub_prompts)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sub-prompts, truncated tokens included, begin and end tokens not."""
        return sum(sub.n_tokens for sub in self.sub_prompts)

    @property
    def truncated(self) -> str | None:
        """The ends of sub-prompts that the text encoder does not see."""
        return " … ".join(sub.truncated for sub in self.sub_prompts if sub.truncated) or None


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read the tokenizer of a model folder.

    The files are checked first: without them the library silently builds a vocabulary of three tokens.

    Raises:
        ModelError: a file is missing or not readable, or added tokens would get other ids.
    """
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file() and not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder / name}: missing; the model folder is not complete")
    try:
        with without_byte_order_marks(folder) as readable:
            tokenizer = CLIPTokenizer.from_pretrained(readable, local_files_only=True)
        # Check that it works.
        tokenize_sub_prompt(tokenizer, SubPrompt(1.0, (EmphasisSpan("a"),)), 3, long_prompts=True)
    except Exception as error:  # noqa: BLE001 - the Rust library raises plain Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{folder}: not a readable CLIP tokenizer: {reason}") from None
    check_added_tokens(tokenizer, folder)
    return tokenizer


def check_added_tokens(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Raise ModelError if the library gave an added token another id than its file states: that of another word."""
    vocabulary = tokenizer.get_vocab()
    try:
        added_tokens = list(read_added_tokens(folder))
    except (AttributeError, LookupError, TypeError) as error:
        raise ModelError(f"{folder}: not a readable CLIP tokenizer: its added tokens: {error}") from None
    for file_name, token, token_id in added_tokens:
        if vocabulary.get(token) != token_id:
            raise ModelError(
                f"{folder / file_name}: token {excerpt(token)} is number {excerpt(token_id)}, and would be read as "
                f"{vocabulary.get(token)}; numbers of added tokens must follow the vocabulary's without a gap"
            )


def read_added_tokens(folder: Path) -> Iterator[tuple[str, str, object]]:
    """Yield file name, token and id of each added token: old files map tokens to ids, newer ones ids to tokens."""
    name = "added_tokens.json"
    ids_by_token = read_json_object(folder / name) if (folder / name).is_file() else {}
    yield from ((name, token, token_id) for token, token_id in ids_by_token.items())
    name = "tokenizer_config.json"
    config = read_json_object(folder / name) if (folder / name).is_file() else {}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        token_id = int(key) if key.isdecimal() else key
        yield name, entry["content"] if isinstance(entry, dict) else str(entry), token_id


@contextmanager
def without_byte_order_marks(folder: Path) -> Iterator[Path]:
    """Yield the folder, or a temporary copy without byte-order marks if a file has one."""
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


def check_vocabulary(tokenizer: CLIPTokenizer, vocabulary_size: int, folder: Path) -> None:
    """Raise ModelError if the text encoder has no embedding for some of the tokens."""
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if token_id >= vocabulary_size:
        raise ModelError(
            f"{folder}: token {excerpt(token)} is number {token_id}, the text encoder has only {vocabulary_size} tokens"
        )


def tokenize_prompt(
    tokenizer: CLIPTokenizer, prompt: Sequence[SubPrompt], max_tokens: int, *, long_prompts: bool
) -> TokenizedPrompt:
    """Tokenize each sub-prompt: truncated to one window, or with `long_prompts` split into as many as it needs."""
    return TokenizedPrompt(
        tuple(tokenize_sub_prompt(tokenizer, sub, max_tokens, long_prompts=long_prompts) for sub in prompt)
    )


def tokenize_sub_prompt(
    tokenizer: CLIPTokenizer, sub_prompt: SubPrompt, max_tokens: int, *, long_prompts: bool
) -> TokenizedSubPrompt:
    """Tokenize one sub-prompt and split it into windows; without `long_prompts` it is truncated to the first."""
    ids: list[int] = []
    emphasis: list[float] = []
    for span in sub_prompt.spans:
        span_ids = tokenizer(
            fold_prompt_widths(tokenizer, span.text), add_special_tokens=False, truncation=False, verbose=False
        ).input_ids
        ids += span_ids
        emphasis += [span.emphasis] * len(span_ids)
    size = max_tokens - 2  # without begin and end token
    end = max(len(ids), 1) if long_prompts else 1
    windows = tuple(
        build_window(tokenizer, ids[start : start + size], emphasis[start : start + size], max_tokens)
        for start in range(0, end, size)
    )
    cut_off = [] if long_prompts else ids[size:]
    truncated = (tokenizer.decode(cut_off).strip() or None) if cut_off else None
    return TokenizedSubPrompt(sub_prompt.weight, windows, len(ids), truncated)


def count_tokens(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text, without begin and end tokens, on all cores."""
    # The library keeps text and position of every token, so batches are bounded to limit memory.
    counts: list[int] = []
    texts = [fold_prompt_widths(tokenizer, text) for text in texts]
    for start, end in split_by_characters([len(text) for text in texts], MAX_BATCH_CHARACTERS):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts[start:end], add_special_tokens=False)
        counts += [len(encoding) for encoding in encodings]
    return counts


def split_by_characters(lengths: Sequence[int], max_characters: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of consecutive texts with up to `max_characters` in total; a longer text is alone."""
    start = total = 0
    for position, length in enumerate(lengths):
        if position > start and total + length > max_characters:
            yield start, position
            start, total = position, 0
        total += length
    if start < len(lengths):
        yield start, len(lengths)


def fold_prompt_widths(tokenizer: CLIPTokenizer, text: str) -> str:
    """Fold full-width and half-width characters as tiny-stable-diffusion's tokenizer does, except in added tokens."""
    if fold_widths(text) == text:
        return text
    wide = [token for token in tokenizer.get_added_vocab() if fold_widths(token) != token]
    if not wide:
        return fold_widths(text)
    parts = re.split(f"({'|'.join(map(re.escape, sorted(wide, key=len, reverse=True)))})", text)
    return "".join(part if number % 2 else fold_widths(part) for number, part in enumerate(parts))


def build_window(tokenizer: CLIPTokenizer, ids: list[int], emphasis: list[float], max_tokens: int) -> TokenWindow:
    """Return a window of these tokens, with begin, end and padding tokens."""
    padding = max_tokens - 2 - len(ids)
    return TokenWindow(
        (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding),
        (1.0, *emphasis, 1.0, *[1.0] * padding),
    )


def build_empty_window(tokenizer: CLIPTokenizer, max_tokens: int) -> TokenWindow:
    """Return the window of an empty prompt; it also pads shorter prompts."""
    return build_window(tokenizer, [], [], max_tokens)
