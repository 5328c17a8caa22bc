"""Read objects: one on each line (.jsonl), or in a JSON array (.json, and .jsonl that begins with a bracket)."""

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
    if is_json_array(path) and not options.compat_0_1_0:
        return require_prompt_key(path, read_array(path, options))
    return require_prompt_key(path, read_object_lines(path, options))


def read_json_rows(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    return require_prompt_key(path, read_array(path, options))


def is_json_array(path: Path) -> bool:
    """Whether the file begins as an array does that is more than a line among others."""
    start = read_leading_text(path)
    line, _, rest = start.partition("\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return start.startswith("[")
    return start.startswith("[") and not rest.strip()


def starts_with_bracket(path: Path) -> bool:
    """Whether the file is an array, or was one before lines were put behind it."""
    return read_leading_text(path).startswith("[")


def read_leading_text(path: Path) -> str:
    return read_first_bytes(path).decode(detect_encoding(path), "replace").lstrip("\ufeff \t\r\n")


def require_prompt_key(path: Path, rows: Iterator[RawRow | UnreadableRow]) -> Iterator[RawRow | UnreadableRow]:
    """The same rows. Raises ManifestError at their end where every row could be read, and none has a prompt's key."""
    names: dict[str, None] = {}  # met so far
    all_read, empty, prompts = True, True, False
    for row in rows:
        if isinstance(row, UnreadableRow):
            all_read = False
        elif not prompts:
            prompts = "prompt" in row.source_names
            empty = empty and not row.values
            names |= dict.fromkeys(list(row.values)[:8]) if len(names) < 8 else {}
        yield row
    if all_read and not (empty or prompts):
        raise ManifestError(f"{path}: no object with a key named prompt; found {format_names(names)}")


def read_object_lines(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    decoder = ObjectDecoder()
    with open_text(path, options.notes) as file:
        lines = BoundedLineReader(file, compat_0_1_0=options.compat_0_1_0)
        for number, text in read_records(lines, lines):
            if isinstance(text, UnreadableRow):
                yield text
            elif text.strip():
                yield parse_object_line(text, number, decoder, options)


def parse_object_line(
    text: str, number: int, decoder: "ObjectDecoder", options: ReadingOptions
) -> RawRow | UnreadableRow:
    """The object of one line, or what is wrong with it."""
    text = text.rstrip("\ufeff \t\r\n")
    try:
        if has_surrogates(text):
            raise ValueError("not UTF-8; save the file as UTF-8")
        value, end = decoder.decode_at(text, BLANK_RUN.match(text).end())  # type: ignore[union-attr] # it matches anything
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        return UnreadableRow(describe_json_error(error), line=number)
    return convert_object(value, decoder.fault, text, number, options)


def convert_object(
    value: Any, fault: str | None, text: str, number: int, options: ReadingOptions
) -> RawRow | UnreadableRow:
    """A decoded object as a row, or what is wrong with it."""
    prompt = None
    try:
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if len(value) > MAX_COLUMNS:
            raise ValueError(f"{len(value):,} keys, at most {MAX_COLUMNS:,}; leave out what is not needed")
        if "\\u" in text and "\\ud" in text.lower() and has_surrogates(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half a character: a \\u escape of a surrogate pair without its other half")
        columns = match_columns(tuple(value))
        named = dict(zip(columns.names, value.values(), strict=True))
        prompt = named.get("prompt")
        if fault:
            raise ValueError(fault)
        if options.strict:
            reject_unknown_columns(columns)
        values = {name: convert_cell(name, cell, columns) for name, cell in named.items() if not is_missing(cell)}
    except (ValueError, RecursionError) as error:
        return UnreadableRow(describe_json_error(error), prompt if isinstance(prompt, str) else None, number)
    if len(text) > MAX_CELL_CHARACTERS:
        drop_long_values(values, columns.source_names, options.notes)
    return RawRow(values, columns.source_names, number)


def describe_json_error(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"not a JSON object: {error.msg} at character {error.pos + 1}"
        case RecursionError():
            return "nested too deep"
    return str(error)


def convert_cell(name: str, value: Any, columns: ColumnMapping) -> Any:
    """Known keys hold single values; what unknown ones hold is kept as text, as JSON where it is none."""
    if name not in columns.source_names:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | dict):
        raise ValueError(f"column {columns.source_names[name]}: a single value was expected")
    return value


class ObjectDecoder:
    """Decodes values, and remembers what Python's decoder would let pass, so that one can go on behind the value."""

    def __init__(self) -> None:
        self.fault: str | None = None  # the first one in the last value
        self.decoder = json.JSONDecoder(object_pairs_hook=self.as_dict, parse_constant=self.read_constant)

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value, and where it ends. Raises ValueError or RecursionError."""
        self.fault = None
        return self.decoder.raw_decode(text, start)

    def as_dict(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            doubled = min(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            self.fault = self.fault or f"key {excerpt(doubled)} appears twice"
        return values

    def read_constant(self, name: str) -> float:
        """NaN, which pandas and others write for a missing value, is one; Infinity is a fault."""
        if name != "NaN":
            self.fault = self.fault or f"{name} is no JSON number"
        return float("nan")


# Arrays


def read_array(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    """The objects of an array, or of a file that holds several one after the other.

    Raises ManifestError where the text is not JSON: nobody can say where the next object would begin.
    """
    with open_text(path, options.notes) as file:
        stream = JsonValueStream(path, file)
        in_array = stream.skip_mark("[")
        decoder = ObjectDecoder()
        while not stream.at_end() and not (in_array and stream.skip_mark("]")):
            value, text, number = stream.next_value(decoder)
            fault = "not UTF-8; save the file as UTF-8" if has_surrogates(text) else decoder.fault
            yield convert_object(value, fault, text, number, options)
            if in_array and not (stream.skip_mark(",") or stream.peek("]") or stream.at_end()):
                raise stream.fault("',' or ']' was expected behind an object")
        if in_array and not stream.ended_array:
            raise stream.fault("the array is not closed; the file is cut off")
        if not stream.at_end():
            raise stream.fault("text behind the end of the array")


class JsonValueStream:
    """Takes values off a file's text, of which only a bounded piece is in memory."""

    def __init__(self, path: Path, file: io.TextIOWrapper) -> None:
        self.path, self.file = path, file
        self.text, self.start = "", 0
        self.line = 1  # of `start`
        self.ended = self.ended_array = False

    def read_more(self) -> bool:
        if self.ended:
            return False
        block = self.file.read(max(BLOCK_CHARACTERS, len(self.text) - self.start))  # twice as much each time
        self.ended = not block
        self.text = self.text[self.start :] + block
        self.start = 0
        return bool(block)

    def move_to(self, position: int) -> None:
        self.line += self.text.count("\n", self.start, position)
        self.start = position

    def at_end(self) -> bool:
        """Whether nothing but blanks is left; skips these."""
        while True:
            match = BLANK_RUN.match(self.text, self.start)
            assert match is not None
            self.move_to(match.end())
            if self.start < len(self.text):
                return False
            if not self.read_more():
                return True

    def peek(self, mark: str) -> bool:
        return not self.at_end() and self.text[self.start] == mark

    def skip_mark(self, mark: str) -> bool:
        if not self.peek(mark):
            return False
        self.move_to(self.start + 1)
        self.ended_array = self.ended_array or mark == "]"
        return True

    def next_value(self, decoder: ObjectDecoder) -> tuple[Any, str, int]:
        """The value that begins here, its text, and its line. Raises ManifestError."""
        number = self.line
        while True:
            try:
                value, end = decoder.decode_at(self.text, self.start)
                is_whole = isinstance(value, dict | list | str) or end < len(self.text)
                error: Exception | None = None
            except (ValueError, RecursionError) as problem:
                is_whole, error, end = False, problem, self.start
            size = max(end, len(self.text)) - self.start if error else end - self.start
            if size > MAX_LINE_CHARACTERS:
                raise self.fault(f"over {MAX_LINE_CHARACTERS:,} characters in one object; it may not be closed")
            if not is_whole and self.read_more():
                continue
            if error is not None:
                if isinstance(error, json.JSONDecodeError):
                    self.move_to(error.pos)
                raise self.fault(describe_json_error(error))
            text = self.text[self.start : end]
            self.move_to(end)
            return value, text, number

    def fault(self, reason: str) -> ManifestError:
        reason = re.sub(r" at character \d+$", "", reason)
        return ManifestError(
            f"{self.path}: line {self.line}: {reason}; correct it, or write one object on each line (.jsonl), where a "
            f"fault costs its own row only"
        )
