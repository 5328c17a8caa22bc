"""Read CSV and TSV as spreadsheets write them: other separators, UTF-16, empty columns, blanks before quotes."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.columns import (
    FLOAT_COLUMNS,
    INTEGER_COLUMNS,
    ColumnMapping,
    find_column,
    match_table_columns,
)
from tinysd_batch.job.manifest.files import remove_gz_suffix
from tinysd_batch.job.manifest.formats.text_lines import MAX_LINE_CHARACTERS, BoundedLineReader, open_text, read_records
from tinysd_batch.job.manifest.raw_rows import (
    MAX_CELL_CHARACTERS,
    RawRow,
    ReadingOptions,
    UnreadableRow,
    drop_long_values,
)
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.text import excerpt, normalize_text
from tinysd_batch.values import is_missing

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SEPARATOR_LINE = re.compile(r'"?sep=([,;|:\t])"?\s*', re.IGNORECASE)  # Excel's, before the header
BLANK_LINE_CHARACTERS = ' ,;\t|"\r\n'  # a line of only these is blank
DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+\s*", re.ASCII)
THOUSANDS_SEPARATED = re.compile(r"\s*[+-]?\d{1,3}([.,]\d{3})+\s*", re.ASCII)
# The rest of a quoted cell that was opened on an earlier line.
REST_OF_OPEN_CELL = re.compile(r'[^"]*(?:""[^"]*)*"?')
# A quoted cell, which may still be open at the end of the line.
QUOTED = r'"[^"]*(?:""[^"]*)*(?:"|\Z)'


class CsvLineReader(BoundedLineReader):
    """Lines for `csv.reader`. Records where a quote was opened, and removes blanks around quoted cells."""

    def __init__(self, file: io.TextIOWrapper, *, compat_0_1_0: bool = False) -> None:
        super().__init__(file, compat_0_1_0=compat_0_1_0)
        self.open_quote_line = 0  # where the last quote opened that was not closed on its line; 0: none
        self.previous_line = ""
        self.separator = ""  # until the header is read
        self.cell = re.compile("")

    def set_separator(self, separator: str) -> None:
        self.separator = separator
        mark = re.escape(separator)
        # blanks, a quoted part, and the rest up to the separator
        self.cell = re.compile(rf"( *)({QUOTED})?([^{mark}]*)({mark}|\Z)", re.DOTALL)

    def start_record(self) -> None:
        super().start_record()
        self.open_quote_line = 0

    def __next__(self) -> str:
        is_continuation = not self.starts_record  # `csv.reader` reads on within a row only inside quotes
        if is_continuation and (not self.open_quote_line or self.previous_line.replace('""', "").count('"') > 1):
            self.open_quote_line = self.number
        line = super().__next__()
        if (' "' in line or '" ' in line) and self.separator:
            line = self.strip_blanks_around_quotes(line, is_continuation)
        self.previous_line = line
        return line

    def strip_blanks_around_quotes(self, line: str, is_continuation: bool) -> str:
        """Remove blanks between separators and quotes, which are not part of a cell."""
        if self.compat_0_1_0:  # a quote after blanks was an ordinary character there
            return line
        start = 0
        if is_continuation:
            start = len(REST_OF_OPEN_CELL.match(line)[0])  # type: ignore[index] # matches any text
            after = line[start:].lstrip(" ")
            if after[:1] in (self.separator, "\r", "\n", ""):
                line = line[:start] + after
        return line[:start] + self.cell.sub(drop_blanks, line[start:])

    def describe_error(self, error: csv.Error) -> str:
        if not self.open_quote_line:
            hint = "; write a quote within a quoted cell twice" if "expected after" in str(error) else ""
            return f"{error}{hint}"
        more_lines = self.number - self.open_quote_line
        lines = f"the {more_lines:,} lines" if more_lines > 1 else "the line"
        extent = f" and includes {lines} after it" if more_lines else ""
        reason = "" if "unexpected end" in str(error) else f"{error}: "
        quote = f"the quote that opens in line {self.open_quote_line} is not closed{extent}"
        return f"{reason}{quote}; check the quotes there"


def drop_blanks(match: re.Match[str]) -> str:
    """Return a matched cell without blanks around its quotes, unless there is text outside them."""
    quoted, rest, mark = match.group(2) or "", match[3], match[4]
    if not quoted or rest.strip(" \r\n"):
        return match[0]
    return quoted + rest.lstrip(" ") + mark


def read_csv_rows(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    """Yield the rows of a CSV or TSV file, whose first row is the header. Raises ManifestError."""
    with open_text(path, options.notes) as file:
        lines = CsvLineReader(file, compat_0_1_0=options.compat_0_1_0)
        separator, header = read_header(path, lines)
        if separator != get_default_separator(path):
            options.notes.separator = SEPARATORS.get(separator, f"{separator!r}")
        columns = match_table_columns(path, header, options.strict, options.own_columns)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        converter = CsvRowConverter(path, columns, separator, options, lines)
        for line, cells in read_records(reader, lines):
            if isinstance(cells, UnreadableRow):
                yield cells
            elif cells:  # an empty line is not a row
                yield converter.convert(cells, line)


class CsvRowConverter:
    """Convert the cells of a row to values."""

    def __init__(
        self, path: Path, columns: ColumnMapping, separator: str, options: ReadingOptions, lines: BoundedLineReader
    ) -> None:
        self.path, self.columns, self.options, self.lines = path, columns, options, lines
        self.width = len(columns.names)
        self.unnamed_count = columns.names.count("")
        # Numbers can have a decimal comma only where another character separates the cells.
        numbers = (*FLOAT_COLUMNS, *INTEGER_COLUMNS) if separator != "," else ()
        self.decimal_comma_columns = tuple(name for name in numbers if name in columns.source_names)

    def convert(self, cells: list[str], line: int) -> RawRow | UnreadableRow:
        """Return the row's values. Missing cells of a short row are empty.

        Raises ManifestError for a value in a column without a name if unknown columns are an error.
        """
        names = self.columns.names
        if len(cells) > self.width and not all(map(is_missing, cells[self.width :])):
            return self.report_cell_count(cells, line)
        if self.options.compat_0_1_0 and len(cells) < self.width and any('"' in cell for cell in cells):
            return self.report_cell_count(cells, line)  # part of a row that 0.1.0 split into several
        values = {
            name: cell
            for name, cell in zip(names, cells, strict=False)
            if cell
            and ("!" <= cell[0] <= "~" or not is_missing(cell))  # the first test is fast and enough for most cells
        }
        if self.lines.length > MAX_CELL_CHARACTERS:
            drop_long_values(values, self.columns.source_names, self.options.notes)
        if self.unnamed_count and "" in values:
            self.handle_unnamed_columns(values, line)
        try:
            for name in self.decimal_comma_columns:
                if name in values:
                    values[name] = replace_decimal_comma(values[name], name in INTEGER_COLUMNS)
        except ValueError as error:
            return UnreadableRow(f"column {self.columns.source_names[name]} = {error}", values.get("prompt"), line)
        return RawRow(values, self.columns.source_names, line)

    def handle_unnamed_columns(self, values: dict[str, str], line: int) -> None:
        """Drop values of unnamed columns if there are several. Raises ManifestError if unknown columns are an error."""
        if self.options.strict:
            raise ManifestError(
                f"{self.path}: line {line}: {excerpt(values[''])} is in a column without a name; name or remove it"
            )
        if self.unnamed_count > 1:
            del values[""]
            self.options.notes.record_dropped_column("", "not copied to the results, several columns have no name")

    def report_cell_count(self, cells: list[str], line: int) -> UnreadableRow:
        reason = f"{len(cells)} cells where the header has {self.width} columns"
        prompt = dict(zip(self.columns.names, cells, strict=False)).get("prompt")
        return UnreadableRow(f"{reason}; quote cells that hold commas, tabs or line ends", prompt, line)


def replace_decimal_comma(cell: str, is_integer: bool) -> str:
    """Return `7,5` as `7.5`. Raises ValueError for an integer such as `1.000`, which may mean 1 or 1000."""
    if is_integer and THOUSANDS_SEPARATED.fullmatch(cell):
        raise ValueError(f"{excerpt(cell)}: ambiguous thousands separator; write the number with digits only")
    return cell.replace(",", ".") if DECIMAL_COMMA.fullmatch(cell) else cell


def get_default_separator(path: Path) -> str:
    """Return the separator that the file's suffix implies."""
    return "\t" if Path(remove_gz_suffix(path)).suffix.lower() == ".tsv" else ","


def read_header(path: Path, lines: CsvLineReader) -> tuple[str, tuple[str, ...]]:
    """Return the separator and the column names. Raises ManifestError."""
    # A cell with an unclosed quote grows up to this limit.
    csv.field_size_limit(MAX_CELL_CHARACTERS if lines.compat_0_1_0 else MAX_LINE_CHARACTERS)
    try:
        record = read_first_record(lines)
        if match := SEPARATOR_LINE.fullmatch("".join(record)):
            separators = [match[1]]
            record = read_first_record(lines)
        else:
            default = get_default_separator(path)
            separators = [default, *(separator for separator in SEPARATORS if separator != default)]
        separator, header = detect_separator(record, separators, lines)
    except csv.Error as error:
        raise ManifestError(f"{path}: header: {lines.describe_error(error)}") from None
    lines.set_separator(separator)
    return separator, header


def read_first_record(lines: CsvLineReader) -> list[str]:
    """Return the lines of the first row that is not blank: several if a quoted name contains line ends."""
    record: list[str] = []
    quotes = 0
    lines.start_record()
    for line in lines:
        if not record and not line.strip(BLANK_LINE_CHARACTERS):
            lines.start_record()
            continue
        record.append(line)
        quotes += line.count('"')
        if quotes % 2 == 0:
            break
    return record


def detect_separator(record: list[str], separators: list[str], lines: CsvLineReader) -> tuple[str, tuple[str, ...]]:
    """Return the separator that yields a prompt column and the most known columns, and the header's names.

    Of several such separators the first one wins. Raises csv.Error if none yields a prompt column and the first one
    fails.
    """
    best: tuple[tuple[bool, int], str, tuple[str, ...]] | None = None
    first_error: csv.Error | None = None
    for separator in separators:
        try:
            names = parse_header(record, separator, lines)
        except csv.Error as error:
            first_error = error if separator == separators[0] else first_error
            continue
        known = [column for name in names if (column := find_column(name))]
        score = ("prompt" in known, len(known))
        if best is None or score > best[0]:
            best = score, separator, names
    if best is None or (first_error is not None and not best[0][0]):
        raise first_error or csv.Error("cannot be read")
    return best[1:]


def parse_header(record: list[str], separator: str, lines: CsvLineReader) -> tuple[str, ...]:
    lines.set_separator(separator)
    stripped = [lines.strip_blanks_around_quotes(line, number > 0) for number, line in enumerate(record)]
    names = next(csv.reader(stripped, delimiter=separator, strict=True), [])
    return tuple(normalize_text(name).strip() for name in names)


def read_csv_extra_names(path: Path, names_with_values: set[str], *, compat_0_1_0: bool = False) -> tuple[str, ...]:
    """Return the header's unknown names, and "" if `names_with_values` says that an unnamed column has values."""
    with open_text(path, ReadingNotes()) as file:
        _, header = read_header(path, CsvLineReader(file, compat_0_1_0=compat_0_1_0))
    unknown = match_table_columns(path, header, strict=False).unknown
    return (*unknown, *([""] if "" in names_with_values else []))
