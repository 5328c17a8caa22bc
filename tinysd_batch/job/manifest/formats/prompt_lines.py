"""Read a text file of prompts, one on each line, and lines with options as other programs write them.

The web UI's form (`--prompt "x" --steps 20`) cannot be meant as text and is read. What may be text stays text and is
counted in the notes: comments (`# ...`), options behind a prompt (`"a unicorn" -n4 -S1234`, `a cat --ar 16:9`). With
`interpret_lines` comments are skipped and such options read.
"""

import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from tinysd_batch.config import MAX_PROMPT_CHARACTERS
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
from tinysd_batch.text import excerpt, normalize_text
from tinysd_batch.values import is_missing

MAX_OPTION_LINE_CHARACTERS = 4 * MAX_PROMPT_CHARACTERS  # of a line with options
TEXT_OPTIONS = ("prompt", "negative_prompt")  # their words need no quotes
IGNORED_OPTIONS = (
    "do_not_save_samples",
    "do_not_save_grid",
    "prompt_for_display",
)  # of the web UI; no images depend on them
# InvokeAI's and dream.py's; its -n makes images one after the other.
SHORT_OPTIONS = {"n": "n_iter", "H": "height", "W": "width", "S": "seed", "s": "steps", "C": "scale", "A": "sampler"}
WEB_UI_LINE = re.compile(r"\s*--[A-Za-z]")
PROMPT_OPTION = re.compile(r"(?:^|\s)--prompt(?=[\s=])")
TRAILING_OPTION = re.compile(r"\s(?:-[A-Za-z] ?\d+(?:\.\d+)?(?=\s|$)|--[A-Za-z][\w-]*(?=[\s=]|$))")
SHORT_OPTION = re.compile(r"-[A-Za-z](?:\d+(?:\.\d+)?)?")
COMMENT = re.compile(r"\s*(?:#|//)")
INTERPRET_LINES_FLAG = "--interpret-lines"


def read_txt_rows(path: Path, options: ReadingOptions) -> Iterator[ReaderItem]:
    if is_tab_separated_table(path) and not options.compat_0_1_0:
        options.notes.add_advice("read as a table, since the first line is a header")
        return read_csv_rows(path, options)
    return read_prompt_lines(path, options)


def is_tab_separated_table(path: Path) -> bool:
    """Whether the first line names columns, with tabs between them: Excel's "Unicode text" has this suffix."""
    start = read_first_bytes(path).decode(detect_encoding(path), "replace")
    cells = start.partition("\n")[0].split("\t")
    return len(cells) > 1 and "prompt" in map(find_column, cells)


def read_prompt_lines(path: Path, options: ReadingOptions) -> Iterator[ReaderItem]:
    row = 0
    with open_text(path, options.notes) as file:
        lines = BoundedLineReader(file, compat_0_1_0=options.compat_0_1_0)
        for number, text in read_records(lines, lines):
            if isinstance(text, UnreadableRow):
                row += 1
                yield text
            elif text.strip():
                row += 1
                yield read_prompt_line(text.rstrip("\r\n"), number, row, options)


def read_prompt_line(text: str, number: int, row: int, options: ReadingOptions) -> ReaderItem:
    notes = options.notes
    plain = normalize_text(text)
    if is_missing(plain):
        return RawRow({}, {}, number)
    if WEB_UI_LINE.match(plain) and PROMPT_OPTION.search(plain):
        notes.count_occurrence("lines with the web UI's options, read as it reads them: {}", row)
        return parse_option_line(plain, number, ())
    if COMMENT.match(plain):
        if options.interpret_lines:
            notes.count_occurrence("comments skipped: {}", row)
            return SkippedRows(1, is_blank=False)
        notes.count_occurrence(
            f"lines that look like comments, read as prompts: {{}}; {INTERPRET_LINES_FLAG} skips them", row
        )
    elif TRAILING_OPTION.search(plain):
        if options.interpret_lines:
            return parse_option_line(plain, number, SHORT_OPTIONS)
        notes.count_occurrence(
            f"lines that look like another program's, options read as text: {{}}; {INTERPRET_LINES_FLAG} reads them",
            row,
        )
    return RawRow({"prompt": text}, {}, number)


def parse_option_line(text: str, number: int, short: Collection[str]) -> RawRow | UnreadableRow:
    """A prompt with options before or behind it; of one letter only those in `short`."""
    try:
        if len(text) > MAX_OPTION_LINE_CHARACTERS:
            raise ValueError(f"{len(text)} characters, at most {MAX_OPTION_LINE_CHARACTERS}")
        words = shlex.split(text)
        values: dict[str, str] = {}
        if loose := take_unquoted_words(words, short):
            values["prompt"] = loose
        while words:
            name, value = take_option(words, short)
            if name in values:
                raise ValueError(f"{name} is given twice")
            if name and not is_missing(value):
                values[name] = value
    except ValueError as error:
        return UnreadableRow(f"cannot be read as a prompt with options: {error}", line=number)
    return RawRow(values, {}, number)


def is_option(word: str, short: Collection[str]) -> bool:
    return word.startswith("--") or (SHORT_OPTION.fullmatch(word) is not None and word[1] in short)


def take_unquoted_words(words: list[str], short: Collection[str]) -> str:
    """Words up to the next option, without which a prompt needs no quotes."""
    count = next((i for i, word in enumerate(words) if is_option(word, short)), len(words))
    taken = " ".join(words[:count])
    del words[:count]
    return taken


def take_option(words: list[str], short: Collection[str]) -> tuple[str, str]:
    """Our name of the first option, or nothing for one that does not matter, and its value. Raises ValueError."""
    word = words.pop(0)
    if word.startswith("--"):
        spelled, equals, value = word[2:].partition("=")
        column = (
            ""
            if normalize_column_name(spelled) in IGNORED_OPTIONS
            else COLUMN_BY_NAME.get(normalize_column_name(spelled))
        )
    else:
        spelled, equals, value = word[1], word[2:], word[2:]
        column = SHORT_OPTIONS[spelled]
    if column is None:
        raise ValueError(f"{excerpt(word)} is not known; remove it, or use a table with a column for each setting")
    if not equals and column in TEXT_OPTIONS:
        value = take_unquoted_words(words, short)
    elif not equals:
        if not words:
            raise ValueError(f"{excerpt(word)} has no value")
        value = words.pop(0)
    return column, value
