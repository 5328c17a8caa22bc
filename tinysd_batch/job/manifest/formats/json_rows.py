"""Read JSON objects: one per line (.jsonl), or in an array (.json, and a .jsonl that starts with a bracket)."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.columns import (
    MAX_COLUMNS,
    ColumnMapping,
    format_names,
    match_columns,
    reject_unknown_columns,
)
from tinysd_batch.job.manifest.formats.text_lines import (
    MAX_LINE_CHARACTERS,
    BoundedLineReader,
    detect_encoding,
    open_text,
    read_first_bytes,
    read_records,
)
from tinysd_batch.job.manifest.raw_rows import (
    MAX_CELL_CHARACTERS,
    RawRow,
    ReadingOptions,
    UnreadableRow,
    drop_long_values,
)
from tinysd_batch.text import excerpt, has_surrogates
from tinysd_batch.values import is_missing

BLOCK_CHARACTERS = 65_536
BLANK_RUN = re.compile(r"[ \t\r\n\ufeff]*")


def read_jsonl_rows(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    """Yield the rows of a .jsonl file. Raises ManifestError."""
    if is_json_array(path) and not options.compat_0_1_0:
        return require_prompt_key(path, read_array_rows(path, options))
    return require_prompt_key(path, read_object_lines(path, options))


def read_json_rows(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    """Yield the rows of a .json file. Raises ManifestError."""
    return require_prompt_key(path, read_array_rows(path, options))


def is_json_array(path: Path) -> bool:
    """Whether a .jsonl file is one array, rather than lines of which the first is an array."""
    start = read_leading_text(path)
    line, _, rest = start.partition("\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return start.startswith("[")
    return start.startswith("[") and not rest.strip()


def starts_with_bracket(path: Path) -> bool:
    """Whether the file is an array, or was one before lines were appended to it."""
    return read_leading_text(path).startswith("[")


def read_leading_text(path: Path) -> str:
    """Return the start of the file's text, without leading blanks."""
    return read_first_bytes(path).decode(detect_encoding(path), "replace").lstrip("\ufeff \t\r\n")


def require_prompt_key(path: Path, rows: Iterator[RawRow | UnreadableRow]) -> Iterator[RawRow | UnreadableRow]:
    """Yield the same rows. At the end, raise ManifestError if all were readable and none has a key for the prompt."""
    names: dict[str, None] = {}  # the first keys, for the message
    all_readable, all_blank, has_prompt_key = True, True, False
    for row in rows:
        if isinstance(row, UnreadableRow):
            all_readable = False
        elif not has_prompt_key:
            has_prompt_key = "prompt" in row.source_names
            all_blank = all_blank and not row.values
            names |= dict.fromkeys(list(row.values)[:8]) if len(names) < 8 else {}
        yield row
    if all_readable and not (all_blank or has_prompt_key):
        raise ManifestError(f"{path}: no object with a key named prompt; found {format_names(names)}")


def read_object_lines(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    decoder = ObjectDecoder()
    with open_text(path, options.notes) as file:
        lines = BoundedLineReader(file, compat_0_1_0=options.compat_0_1_0)
        for line, text in read_records(lines, lines):
            if isinstance(text, UnreadableRow):
                yield text
            elif text.strip():
                yield parse_object_line(text, line, decoder, options)


def parse_object_line(
    text: str, line: int, decoder: "ObjectDecoder", options: ReadingOptions
) -> RawRow | UnreadableRow:
    """Return the row of one line, or an UnreadableRow that says what is wrong with it."""
    text = text.rstrip("\ufeff \t\r\n")
    try:
        if has_surrogates(text):
            raise ValueError("not UTF-8; save the file as UTF-8")
        start = BLANK_RUN.match(text).end()  # type: ignore[union-attr] # matches any text
        value, end = decoder.decode_at(text, start)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        return UnreadableRow(describe_json_error(error), line=line)
    return convert_object(value, decoder.error, text, line, options)


def convert_object(
    value: Any, decoding_error: str | None, text: str, line: int, options: ReadingOptions
) -> RawRow | UnreadableRow:
    """Return a decoded object as a row, or an UnreadableRow that says what is wrong with it.

    Args:
        decoding_error: What is wrong with the object although it could be decoded.
        text: The object's text.
    """
    prompt = None
    try:
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if len(value) > MAX_COLUMNS:
            raise ValueError(f"{len(value):,} keys, at most {MAX_COLUMNS:,}; remove those that are not needed")
        if "\\u" in text and "\\ud" in text.lower() and has_surrogates(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half a character: a \\u escape of a surrogate without the other one of its pair")
        columns = match_columns(tuple(value), options.own_columns)
        named = dict(zip(columns.names, value.values(), strict=True))
        prompt = named.get("prompt")
        if decoding_error:
            raise ValueError(decoding_error)
        if options.strict:
            reject_unknown_columns(columns)
        values = {name: convert_cell(name, cell, columns) for name, cell in named.items() if not is_missing(cell)}
    except (ValueError, RecursionError) as error:
        return UnreadableRow(describe_json_error(error), prompt if isinstance(prompt, str) else None, line)
    if len(text) > MAX_CELL_CHARACTERS:
        drop_long_values(values, columns.source_names, options.notes)
    return RawRow(values, columns.source_names, line)


def describe_json_error(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"not a JSON object: {error.msg} at character {error.pos + 1}"
        case RecursionError():
            return "nested too deep"
    return str(error)


def convert_cell(name: str, value: Any, columns: ColumnMapping) -> Any:
    """Return a known column's value, which must be a single one, or an extra column's as text: JSON unless a string."""
    if name not in columns.source_names:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | dict):
        raise ValueError(f"column {columns.source_names[name]}: a single value was expected")
    return value


class ObjectDecoder:
    """Decode JSON values. Record errors that Python's decoder accepts, so that reading can continue after the value."""

    def __init__(self) -> None:
        self.error: str | None = None  # the first one in the last value
        self.decoder = json.JSONDecoder(object_pairs_hook=self.build_dict, parse_constant=self.read_constant)

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """Return the value and the position after it. Raises ValueError or RecursionError."""
        self.error = None
        return self.decoder.raw_decode(text, start)

    def build_dict(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            duplicate = min(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            self.error = self.error or f"key {excerpt(duplicate)} appears twice"
        return values

    def read_constant(self, name: str) -> float:
        """Accept NaN as a missing value, which pandas and others write. Infinity is an error."""
        if name != "NaN":
            self.error = self.error or f"{name} is not a JSON number"
        return float("nan")


def read_array_rows(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    """Yield the objects of an array, or of a file that contains several values one after the other.

    Raises ManifestError for text that is not JSON: the start of the next object is unknown then.
    """
    with open_text(path, options.notes) as file:
        stream = JsonValueStream(path, file)
        stream.skip_blanks()
        decoder = ObjectDecoder()
        is_array, is_closed = stream.skip_if_next("["), False
        while not (stream.is_at_end or is_closed):
            if is_array and stream.skip_if_next("]"):
                is_closed = True
                continue
            value, text, line = stream.read_value(decoder)
            error = "not UTF-8; save the file as UTF-8" if has_surrogates(text) else decoder.error
            yield convert_object(value, error, text, line, options)
            stream.skip_blanks()
            if is_array and not (stream.skip_if_next(",") or stream.is_next("]") or stream.is_at_end):
                raise stream.make_error("',' or ']' was expected after an object")
        if is_array and not is_closed:
            raise stream.make_error("the array is not closed; the file is truncated")
        if not stream.is_at_end:
            raise stream.make_error("text after the end of the array")


class JsonValueStream:
    """Read JSON values one by one from a file, keeping a bounded part of its text in memory."""

    def __init__(self, path: Path, file: io.TextIOWrapper) -> None:
        self.path, self.file = path, file
        self.text, self.start = "", 0  # the text in memory, and the position of what is read next
        self.line = 1  # of `start`
        self.is_exhausted = False

    @property
    def is_at_end(self) -> bool:
        """Whether no text is left. Valid after `skip_blanks`."""
        return self.start >= len(self.text)

    def is_next(self, mark: str) -> bool:
        """Whether the next character is `mark`. Valid after `skip_blanks`."""
        return self.text[self.start : self.start + 1] == mark

    def read_more(self) -> bool:
        """Read another block, twice as long each time a value does not fit. Return False at the end of the file."""
        if self.is_exhausted:
            return False
        block = self.file.read(max(BLOCK_CHARACTERS, len(self.text) - self.start))
        self.is_exhausted = not block
        self.text = self.text[self.start :] + block
        self.start = 0
        return bool(block)

    def move_to(self, position: int) -> None:
        self.line += self.text.count("\n", self.start, position)
        self.start = position

    def skip_blanks(self) -> None:
        """Move to the next visible character, or to the end of the file."""
        while True:
            match = BLANK_RUN.match(self.text, self.start)
            assert match is not None
            self.move_to(match.end())
            if self.start < len(self.text) or not self.read_more():
                return

    def skip_if_next(self, mark: str) -> bool:
        """Skip `mark` and the blanks after it if it is the next character. Return whether it was."""
        if not self.is_next(mark):
            return False
        self.move_to(self.start + 1)
        self.skip_blanks()
        return True

    def read_value(self, decoder: ObjectDecoder) -> tuple[Any, str, int]:
        """Return the value that starts here, its text, and its line. Raises ManifestError."""
        line = self.line
        while True:
            try:
                value, end = decoder.decode_at(self.text, self.start)
                is_complete = isinstance(value, dict | list | str) or end < len(self.text)
                error: Exception | None = None
            except (ValueError, RecursionError) as decoding_error:
                is_complete, error, end = False, decoding_error, self.start
            size = max(end, len(self.text)) - self.start if error else end - self.start
            if size > MAX_LINE_CHARACTERS:
                raise self.make_error(f"over {MAX_LINE_CHARACTERS:,} characters in one object; it may not be closed")
            if not is_complete and self.read_more():
                continue
            if error is not None:
                if isinstance(error, json.JSONDecodeError):
                    self.move_to(error.pos)
                raise self.make_error(describe_json_error(error))
            text = self.text[self.start : end]
            self.move_to(end)
            return value, text, line

    def make_error(self, reason: str) -> ManifestError:
        reason = re.sub(r" at character \d+$", "", reason)
        return ManifestError(
            f"{self.path}: line {self.line}: {reason}; correct it, or write one object per line (.jsonl), where an "
            f"error affects only its own row"
        )
