"""Read a text file with one prompt per line, and lines with options as other programs write them.

A line such as `--prompt "x" --steps 20`, from the AUTOMATIC1111 web UI, cannot be meant as text: its options are
parsed. Lines that may be text are read as text and counted in the notes: comments (`# ...`) and options after a prompt
(`"a unicorn" -n4 -S1234`, `a cat --ar 16:9`). With `interpret_lines`, comments are skipped and such options parsed.
"""

import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from tinysd_batch.job.manifest.columns import COLUMN_BY_NAME, find_column, normalize_column_name
from tinysd_batch.job.manifest.formats.csv_table import read_csv_rows
from tinysd_batch.job.manifest.formats.text_lines import (
    BoundedLineReader,
    detect_encoding,
    open_text,
    read_first_bytes,
    read_records,
)
from tinysd_batch.job.manifest.raw_rows import RawRow, ReaderItem, ReadingOptions, SkippedRows, UnreadableRow
from tinysd_batch.settings.limits import MAX_PROMPT_CHARACTERS
from tinysd_batch.settings.schema import COLUMN_SETTINGS, SETTINGS
from tinysd_batch.text import excerpt, normalize_text
from tinysd_batch.values import is_missing

MAX_OPTION_LINE_CHARACTERS = 4 * MAX_PROMPT_CHARACTERS
TEXT_OPTIONS = (
    "prompt",
    *(name for name, each in COLUMN_SETTINGS.items() if each.value_type.is_text),
)  # their values need no quotes
# Options of the web UI that do not affect the images.
IGNORED_OPTIONS = ("do_not_save_samples", "do_not_save_grid", "prompt_for_display")
# Options of InvokeAI and its predecessor dream.py, whose -n generates images one after the other.
SHORT_OPTIONS = {each.line_option: name for name, each in SETTINGS.items() if each.line_option}
WEB_UI_LINE = re.compile(r"\s*--[A-Za-z]")
PROMPT_OPTION = re.compile(r"(?:^|\s)--prompt(?=[\s=])")
TRAILING_OPTION = re.compile(r"\s(?:-[A-Za-z] ?\d+(?:\.\d+)?(?=\s|$)|--[A-Za-z][\w-]*(?=[\s=]|$))")
SHORT_OPTION = re.compile(r"-[A-Za-z](?:\d+(?:\.\d+)?)?")
COMMENT = re.compile(r"\s*(?:#|//)")
INTERPRET_LINES_FLAG = "--interpret-lines"


def read_txt_rows(path: Path, options: ReadingOptions) -> Iterator[ReaderItem]:
    """Yield the rows of a .txt file. Raises ManifestError."""
    if is_tab_separated_table(path) and not options.compat_0_1_0:
        options.notes.add_advice("read as a table, since the first line is a header")
        return read_csv_rows(path, options)
    return read_prompt_lines(path, options)


def is_tab_separated_table(path: Path) -> bool:
    """Whether the first line is a header with tabs, as in Excel's "Unicode text" format, which has this suffix."""
    start = read_first_bytes(path).decode(detect_encoding(path), "replace")
    cells = start.partition("\n")[0].split("\t")
    return len(cells) > 1 and "prompt" in map(find_column, cells)


def read_prompt_lines(path: Path, options: ReadingOptions) -> Iterator[ReaderItem]:
    row = 0
    with open_text(path, options.notes) as file:
        lines = BoundedLineReader(file, compat_0_1_0=options.compat_0_1_0)
        for line, text in read_records(lines, lines):
            if isinstance(text, UnreadableRow):
                row += 1
                yield text
            elif text.strip():
                row += 1
                yield read_prompt_line(text.rstrip("\r\n"), line, row, options)


def read_prompt_line(text: str, line: int, row: int, options: ReadingOptions) -> ReaderItem:
    notes = options.notes
    normalized = normalize_text(text)
    if is_missing(normalized):
        return RawRow({}, {}, line)
    if WEB_UI_LINE.match(normalized) and PROMPT_OPTION.search(normalized):
        notes.count_occurrence("lines with options of the web UI, parsed as it does: {}", row)
        return parse_option_line(normalized, line, ())
    if COMMENT.match(normalized):
        if options.interpret_lines:
            notes.count_occurrence("comments skipped: {}", row)
            return SkippedRows(1, is_blank=False)
        notes.count_occurrence(
            f"lines that look like comments, read as prompts: {{}}; {INTERPRET_LINES_FLAG} skips them", row
        )
    elif TRAILING_OPTION.search(normalized):
        if options.interpret_lines:
            return parse_option_line(normalized, line, SHORT_OPTIONS)
        notes.count_occurrence(
            f"lines with options of another program, read as text: {{}}; {INTERPRET_LINES_FLAG} parses them", row
        )
    return RawRow({"prompt": text}, {}, line)


def parse_option_line(text: str, line: int, short_options: Collection[str]) -> RawRow | UnreadableRow:
    """Parse a prompt with options before or after it. Of one-letter options only `short_options` are recognized."""
    try:
        if len(text) > MAX_OPTION_LINE_CHARACTERS:
            raise ValueError(f"{len(text)} characters, at most {MAX_OPTION_LINE_CHARACTERS}")
        words = shlex.split(text)
        values: dict[str, str] = {}
        if prompt := take_unquoted_words(words, short_options):
            values["prompt"] = prompt
        while words:
            name, value = take_option(words, short_options)
            if name in values:
                raise ValueError(f"{name} is given twice")
            if name and not is_missing(value):
                values[name] = value
    except ValueError as error:
        return UnreadableRow(f"cannot be read as a prompt with options: {error}", line=line)
    return RawRow(values, {}, line)


def is_option(word: str, short_options: Collection[str]) -> bool:
    return word.startswith("--") or (SHORT_OPTION.fullmatch(word) is not None and word[1] in short_options)


def take_unquoted_words(words: list[str], short_options: Collection[str]) -> str:
    """Remove the words up to the next option and return them as one text, so that a prompt needs no quotes."""
    count = next((i for i, word in enumerate(words) if is_option(word, short_options)), len(words))
    text = " ".join(words[:count])
    del words[:count]
    return text


def take_option(words: list[str], short_options: Collection[str]) -> tuple[str, str]:
    """Remove the first option and its value; return its column ("" for an ignored option) and the value.

    Raises ValueError for an unknown option or a missing value.
    """
    word = words.pop(0)
    if not is_option(word, short_options):
        raise ValueError(f"{word} follows the value of an option; quote texts of several words")
    if word.startswith("--"):
        option, equals, value = word[2:].partition("=")
        name = normalize_column_name(option)
        column = "" if name in IGNORED_OPTIONS else COLUMN_BY_NAME.get(name)
    else:
        equals = value = word[2:]
        column = SHORT_OPTIONS[word[1]]
    if column is None:
        raise ValueError(f"unknown option {excerpt(word)}; remove it, or use a table with a column for each setting")
    if not equals and column in TEXT_OPTIONS:
        value = take_unquoted_words(words, short_options)
    elif not equals:
        if not words:
            raise ValueError(f"{excerpt(word)} has no value")
        value = words.pop(0)
    return column, value
