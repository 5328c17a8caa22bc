"""Read CSV and TSV as spreadsheets write them: other separators, UTF-16, padding, blanks before quotes."""

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
BLANK_LINE_CHARACTERS = ' ,;\t|"\r\n'  # a line of these is blank
DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+\s*", re.ASCII)
THOUSANDS_SEPARATED = re.compile(r"\s*[+-]?\d{1,3}([.,]\d{3})+\s*", re.ASCII)
# A cell: blanks, a quoted part (that may be open at the end of the line), and whatever follows up to the separator.
REST_OF_OPEN_CELL = re.compile(r'[^"]*(?:""[^"]*)*"?')
QUOTED = r'"[^"]*(?:""[^"]*)*(?:"|\Z)'


class CsvLineReader(BoundedLineReader):
    """Lines for `csv.reader`: remembers where a quote opened, and drops blanks around quoted cells."""

    def __init__(self, file: io.TextIOWrapper, *, compat_0_1_0: bool = False) -> None:
        super().__init__(file, compat_0_1_0=compat_0_1_0)
        self.open_quote_line = 0  # the line of the last quote that was not closed on its line
        self.previous_line = ""
        self.separator = ""  # not known yet
        self.cell = re.compile("")

    def set_separator(self, separator: str) -> None:
        self.separator = separator
        mark = re.escape(separator)
        self.cell = re.compile(rf"( *)({QUOTED})?([^{mark}]*)({mark}|\Z)", re.DOTALL)

    def start_record(self) -> None:
        super().start_record()
        self.open_quote_line = 0

    def __next__(self) -> str:
        goes_on = not self.starts_record  # `csv.reader` asks for more of a row only within quotes
        if goes_on and (not self.open_quote_line or self.previous_line.replace('""', "").count('"') > 1):
            self.open_quote_line = self.number
        line = super().__next__()
        if (' "' in line or '" ' in line) and self.separator:
            line = self.strip_blanks_around_quotes(line, goes_on)
        self.previous_line = line
        return line

    def strip_blanks_around_quotes(self, line: str, goes_on: bool) -> str:
        """The line without blanks between separators and quotes, where they are no part of a cell."""
        if self.compat_0_1_0:  # to which such a quote opened nothing
            return line
        start = 0
        if goes_on:
            start = len(REST_OF_OPEN_CELL.match(line)[0])  # type: ignore[index] # it matches anything
            after = line[start:].lstrip(" ")
            if after[:1] in (self.separator, "\r", "\n", ""):
                line = line[:start] + after
        return line[:start] + self.cell.sub(drop_blanks, line[start:])

    def describe_error(self, error: csv.Error) -> str:
        if not self.open_quote_line:
            hint = "; write a quote within a quoted cell twice" if "expected after" in str(error) else ""
            return f"{error}{hint}"
        swallowed = self.number - self.open_quote_line
        lines = f"the {swallowed:,} lines" if swallowed > 1 else "the line"
        took_in = f" and takes in {lines} after it" if swallowed else ""
        reason = "" if "unexpected end" in str(error) else f"{error}: "
        return f"{reason}the quote that opens in line {self.open_quote_line} is not closed{took_in}; check the quotes there"


def drop_blanks(match: re.Match[str]) -> str:
    quoted, rest, mark = match.group(2) or "", match[3], match[4]
    if not quoted or rest.strip(" \r\n"):
        return match[0]
    return quoted + rest.lstrip(" ") + mark


def read_csv_rows(path: Path, options: ReadingOptions) -> Iterator[RawRow | UnreadableRow]:
    with open_text(path, options.notes) as file:
        lines = CsvLineReader(file, compat_0_1_0=options.compat_0_1_0)
        separator, header = read_header(path, lines)
        if separator != get_default_separator(path):
            options.notes.separator = SEPARATORS.get(separator, f"{separator!r}")
        columns = match_table_columns(path, header, options.strict)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        table = CsvRowConverter(path, columns, separator, options, lines)
        for first, cells in read_records(reader, lines):
            if isinstance(cells, UnreadableRow):
                yield cells
            elif cells:  # a line without anything is no row
                yield table.read_row(cells, first)


class CsvRowConverter:
    """Turns the cells of a row into values."""

    def __init__(
        self, path: Path, columns: ColumnMapping, separator: str, options: ReadingOptions, lines: BoundedLineReader
    ) -> None:
        self.path, self.columns, self.options, self.lines = path, columns, options, lines
        self.width = len(columns.names)
        self.unnamed = columns.names.count("")
        # Where a comma stands within numbers, something else stands between cells.
        numbers = (*FLOAT_COLUMNS, *INTEGER_COLUMNS) if separator != "," else ()
        self.numbers = tuple(name for name in numbers if name in columns.source_names)

    def read_row(self, cells: list[str], line: int) -> RawRow | UnreadableRow:
        """Cells that a short row lacks are empty. Raises ManifestError for unnamed cells where that is strict."""
        names = self.columns.names
        if len(cells) > self.width and not all(map(is_missing, cells[self.width :])):
            return self.report_cell_count(cells, line)
        if self.options.compat_0_1_0 and len(cells) < self.width and any('"' in cell for cell in cells):
            return self.report_cell_count(cells, line)  # part of a row that 0.1.0 cut into several
        values = {
            name: cell
            for name, cell in zip(names, cells, strict=False)
            if cell and ("!" <= cell[0] <= "~" or not is_missing(cell))  # most cells need no closer look
        }
        if self.lines.length > MAX_CELL_CHARACTERS:
            drop_long_values(values, self.columns.source_names, self.options.notes)
        if self.unnamed and "" in values:
            self.read_unnamed(values, line)
        try:
            for name in self.numbers:
                if name in values:
                    values[name] = replace_decimal_comma(values[name], name in INTEGER_COLUMNS)
        except ValueError as error:
            return UnreadableRow(f"column {self.columns.source_names[name]} = {error}", values.get("prompt"), line)
        return RawRow(values, self.columns.source_names, line)

    def read_unnamed(self, values: dict[str, str], line: int) -> None:
        if self.options.strict:
            raise ManifestError(
                f"{self.path}: line {line}: {excerpt(values[''])} stands in a column without a name; name or remove it"
            )
        if self.unnamed > 1:
            del values[""]
            self.options.notes.record_dropped_column("", "not copied to the results, several columns have no name")

    def report_cell_count(self, cells: list[str], line: int) -> UnreadableRow:
        reason = f"{len(cells)} cells where the header has {self.width} columns"
        prompt = dict(zip(self.columns.names, cells, strict=False)).get("prompt")
        return UnreadableRow(f"{reason}; quote cells that hold commas, tabs or line ends", prompt, line)


def replace_decimal_comma(cell: str, is_whole: bool) -> str:
    """`7,5` as `7.5`. Raises ValueError where a whole number's `1.000` may be one or a thousand."""
    if is_whole and THOUSANDS_SEPARATED.fullmatch(cell):
        raise ValueError(f"{excerpt(cell)}: a separator of thousands? write the number with digits only")
    return cell.replace(",", ".") if DECIMAL_COMMA.fullmatch(cell) else cell


# The header


def get_default_separator(path: Path) -> str:
    """What the file's suffix says."""
    return "\t" if Path(remove_gz_suffix(path)).suffix.lower() == ".tsv" else ","


def read_header(path: Path, lines: CsvLineReader) -> tuple[str, tuple[str, ...]]:
    """What separates the cells, and the names of the columns. Raises ManifestError."""
    # An open quote takes in lines up to the limit.
    csv.field_size_limit(MAX_CELL_CHARACTERS if lines.compat_0_1_0 else MAX_LINE_CHARACTERS)
    try:
        record = read_first_record(lines)
        if match := SEPARATOR_LINE.fullmatch("".join(record)):
            separators = [match[1]]
            record = read_first_record(lines)
        else:
            own = get_default_separator(path)
            separators = [own, *(each for each in SEPARATORS if each != own)]
        separator, header = detect_separator(record, separators, lines)
    except csv.Error as error:
        raise ManifestError(f"{path}: header: {lines.describe_error(error)}") from None
    lines.set_separator(separator)
    return separator, header


def read_first_record(lines: CsvLineReader) -> list[str]:
    """The lines of the first row that is not blank: several where a quoted name holds line ends."""
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
    """The separator that gives a prompt and most names that are known; the first where several do.

    Raises csv.Error where none gives a prompt and the first gives nothing at all.
    """
    best: tuple[tuple[bool, int], str, tuple[str, ...]] | None = None
    failure: csv.Error | None = None
    for separator in separators:
        try:
            names = parse_header(record, separator, lines)
        except csv.Error as error:
            failure = error if separator == separators[0] else failure
            continue
        known = [column for name in names if (column := find_column(name))]
        score = ("prompt" in known, len(known))
        if best is None or score > best[0]:
            best = score, separator, names
    if best is None or (failure is not None and not best[0][0]):
        raise failure or csv.Error("cannot be read")
    return best[1:]


def parse_header(record: list[str], separator: str, lines: CsvLineReader) -> tuple[str, ...]:
    lines.set_separator(separator)
    tidied = [lines.strip_blanks_around_quotes(line, number > 0) for number, line in enumerate(record)]
    names = next(csv.reader(tidied, delimiter=separator, strict=True), [])
    return tuple(normalize_text(name).strip() for name in names)


def read_csv_extra_names(path: Path, seen: set[str], *, compat_0_1_0: bool = False) -> tuple[str, ...]:
    """The header's names that are not ours; one without any only where `seen` says that its column is not empty."""
    with open_text(path, ReadingNotes()) as file:
        _, header = read_header(path, CsvLineReader(file, compat_0_1_0=compat_0_1_0))
    unknown = match_table_columns(path, header, strict=False).unknown
    return (*unknown, *([""] if "" in seen else []))
