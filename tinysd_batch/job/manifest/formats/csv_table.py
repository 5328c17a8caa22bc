"""Read CSV and TSV as spreadsheets write them: other separators, UTF-16, padding, blanks before quotes."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.columns import NUMBERS, WHOLE_NUMBERS, Columns, is_column, table_columns
from tinysd_batch.job.manifest.files import unpacked_name
from tinysd_batch.job.manifest.formats.text_lines import MAX_LINE_CHARACTERS, BoundedLines, open_text, read_records
from tinysd_batch.job.manifest.raw_rows import MAX_CELL_CHARACTERS, Fault, Line, ReadingOptions, leave_out_long
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.text import excerpt, normalize_text
from tinysd_batch.values import is_missing

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SEPARATOR_LINE = re.compile(r'"?sep=([,;|:\t])"?\s*', re.IGNORECASE)  # Excel's, before the header
NOTHING = ' ,;\t|"\r\n'  # a line of these is blank
DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+\s*", re.ASCII)
THOUSANDS = re.compile(r"\s*[+-]?\d{1,3}([.,]\d{3})+\s*", re.ASCII)
# A cell: blanks, a quoted part (that may be open at the end of the line), and whatever follows up to the separator.
OPEN_CELL = re.compile(r'[^"]*(?:""[^"]*)*"?')
QUOTED = r'"[^"]*(?:""[^"]*)*(?:"|\Z)'


class CsvLines(BoundedLines):
    """Lines for `csv.reader`: remembers where a quote opened, and drops blanks around quoted cells."""

    def __init__(self, file: io.TextIOWrapper, *, as_0_1_0: bool = False) -> None:
        super().__init__(file, as_0_1_0=as_0_1_0)
        self.opened = 0  # the line of the last quote that was not closed on its line
        self.last = ""
        self.separator = ""  # not known yet
        self.cell = re.compile("")

    def split_by(self, separator: str) -> None:
        self.separator = separator
        mark = re.escape(separator)
        self.cell = re.compile(rf"( *)({QUOTED})?([^{mark}]*)({mark}|\Z)", re.DOTALL)

    def start_record(self) -> None:
        super().start_record()
        self.opened = 0

    def __next__(self) -> str:
        goes_on = not self.starts_record  # `csv.reader` asks for more of a row only within quotes
        if goes_on and (not self.opened or self.last.replace('""', "").count('"') > 1):
            self.opened = self.number
        line = super().__next__()
        if (' "' in line or '" ' in line) and self.separator:
            line = self.tidy(line, goes_on)
        self.last = line
        return line

    def tidy(self, line: str, goes_on: bool) -> str:
        """The line without blanks between separators and quotes, where they are no part of a cell."""
        if self.as_0_1_0:  # to which such a quote opened nothing
            return line
        start = 0
        if goes_on:
            start = len(OPEN_CELL.match(line)[0])  # type: ignore[index] # it matches anything
            after = line[start:].lstrip(" ")
            if after[:1] in (self.separator, "\r", "\n", ""):
                line = line[:start] + after
        return line[:start] + self.cell.sub(drop_blanks, line[start:])

    def describe_fault(self, error: csv.Error) -> str:
        if not self.opened:
            hint = "; write a quote within a quoted cell twice" if "expected after" in str(error) else ""
            return f"{error}{hint}"
        swallowed = self.number - self.opened
        lines = f"the {swallowed:,} lines" if swallowed > 1 else "the line"
        took_in = f" and takes in {lines} after it" if swallowed else ""
        reason = "" if "unexpected end" in str(error) else f"{error}: "
        return f"{reason}the quote that opens in line {self.opened} is not closed{took_in}; check the quotes there"


def drop_blanks(match: re.Match[str]) -> str:
    quoted, rest, mark = match.group(2) or "", match[3], match[4]
    if not quoted or rest.strip(" \r\n"):
        return match[0]
    return quoted + rest.lstrip(" ") + mark


def read_csv(path: Path, options: ReadingOptions) -> Iterator[Line | Fault]:
    with open_text(path, options.notes) as file:
        lines = CsvLines(file, as_0_1_0=options.as_0_1_0)
        separator, header = read_header(path, lines)
        if separator != own_separator(path):
            options.notes.separator = SEPARATORS.get(separator, f"{separator!r}")
        columns = table_columns(path, header, options.strict)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        table = CsvTable(path, columns, separator, options, lines)
        for first, cells in read_records(reader, lines):
            if isinstance(cells, Fault):
                yield cells
            elif cells:  # a line without anything is no row
                yield table.read_row(cells, first)


class CsvTable:
    """Turns the cells of a row into values."""

    def __init__(
        self, path: Path, columns: Columns, separator: str, options: ReadingOptions, lines: BoundedLines
    ) -> None:
        self.path, self.columns, self.options, self.lines = path, columns, options, lines
        self.width = len(columns.names)
        self.unnamed = columns.names.count("")
        # Where a comma stands within numbers, something else stands between cells.
        numbers = (*NUMBERS, *WHOLE_NUMBERS) if separator != "," else ()
        self.numbers = tuple(name for name in numbers if name in columns.shown)

    def read_row(self, cells: list[str], line: int) -> Line | Fault:
        """Cells that a short row lacks are empty. Raises ManifestError for unnamed cells where that is strict."""
        names = self.columns.names
        if len(cells) > self.width and not all(map(is_missing, cells[self.width :])):
            return self.ragged(cells, line)
        if self.options.as_0_1_0 and len(cells) < self.width and any('"' in cell for cell in cells):
            return self.ragged(cells, line)  # part of a row that 0.1.0 cut into several
        values = {
            name: cell
            for name, cell in zip(names, cells, strict=False)
            if cell and ("!" <= cell[0] <= "~" or not is_missing(cell))  # most cells need no closer look
        }
        if self.lines.length > MAX_CELL_CHARACTERS:
            leave_out_long(values, self.columns.shown, self.options.notes)
        if self.unnamed and "" in values:
            self.read_unnamed(values, line)
        try:
            for name in self.numbers:
                if name in values:
                    values[name] = with_decimal_point(values[name], name in WHOLE_NUMBERS)
        except ValueError as error:
            return Fault(f"column {self.columns.shown[name]} = {error}", values.get("prompt"), line)
        return Line(values, self.columns.shown, line)

    def read_unnamed(self, values: dict[str, str], line: int) -> None:
        if self.options.strict:
            raise ManifestError(
                f"{self.path}: line {line}: {excerpt(values[''])} stands in a column without a name; name or remove it"
            )
        if self.unnamed > 1:
            del values[""]
            self.options.notes.leave_out("", "not carried into the results, several columns have no name")

    def ragged(self, cells: list[str], line: int) -> Fault:
        reason = f"{len(cells)} cells where the header has {self.width} columns"
        prompt = dict(zip(self.columns.names, cells, strict=False)).get("prompt")
        return Fault(f"{reason}; quote cells that hold commas, tabs or line ends", prompt, line)


def with_decimal_point(cell: str, is_whole: bool) -> str:
    """`7,5` as `7.5`. Raises ValueError where a whole number's `1.000` may be one or a thousand."""
    if is_whole and THOUSANDS.fullmatch(cell):
        raise ValueError(f"{excerpt(cell)}: a separator of thousands? write the number with digits only")
    return cell.replace(",", ".") if DECIMAL_COMMA.fullmatch(cell) else cell


# The header


def own_separator(path: Path) -> str:
    """What the file's suffix says."""
    return "\t" if Path(unpacked_name(path)).suffix.lower() == ".tsv" else ","


def read_header(path: Path, lines: CsvLines) -> tuple[str, tuple[str, ...]]:
    """What separates the cells, and the names of the columns. Raises ManifestError."""
    # An open quote takes in lines up to the limit.
    csv.field_size_limit(MAX_CELL_CHARACTERS if lines.as_0_1_0 else MAX_LINE_CHARACTERS)
    try:
        record = first_record(lines)
        if match := SEPARATOR_LINE.fullmatch("".join(record)):
            separators = [match[1]]
            record = first_record(lines)
        else:
            own = own_separator(path)
            separators = [own, *(each for each in SEPARATORS if each != own)]
        separator, header = split_header(record, separators, lines)
    except csv.Error as error:
        raise ManifestError(f"{path}: header: {lines.describe_fault(error)}") from None
    lines.split_by(separator)
    return separator, header


def first_record(lines: CsvLines) -> list[str]:
    """The lines of the first row that is not blank: several where a quoted name holds line ends."""
    record: list[str] = []
    quotes = 0
    lines.start_record()
    for line in lines:
        if not record and not line.strip(NOTHING):
            lines.start_record()
            continue
        record.append(line)
        quotes += line.count('"')
        if quotes % 2 == 0:
            break
    return record


def split_header(record: list[str], separators: list[str], lines: CsvLines) -> tuple[str, tuple[str, ...]]:
    """The separator that gives a prompt and most names that are known; the first where several do.

    Raises csv.Error where none gives a prompt and the first gives nothing at all.
    """
    best: tuple[tuple[bool, int], str, tuple[str, ...]] | None = None
    failure: csv.Error | None = None
    for separator in separators:
        try:
            names = read_names(record, separator, lines)
        except csv.Error as error:
            failure = error if separator == separators[0] else failure
            continue
        known = [column for name in names if (column := is_column(name))]
        score = ("prompt" in known, len(known))
        if best is None or score > best[0]:
            best = score, separator, names
    if best is None or (failure is not None and not best[0][0]):
        raise failure or csv.Error("cannot be read")
    return best[1:]


def read_names(record: list[str], separator: str, lines: CsvLines) -> tuple[str, ...]:
    lines.split_by(separator)
    tidied = [lines.tidy(line, number > 0) for number, line in enumerate(record)]
    names = next(csv.reader(tidied, delimiter=separator, strict=True), [])
    return tuple(normalize_text(name).strip() for name in names)


def read_unknown_names(path: Path, seen: set[str], *, as_0_1_0: bool = False) -> tuple[str, ...]:
    """The header's names that are not ours; one without any only where `seen` says that its column is not empty."""
    with open_text(path, ReadingNotes()) as file:
        _, header = read_header(path, CsvLines(file, as_0_1_0=as_0_1_0))
    unknown = table_columns(path, header, strict=False).unknown
    return (*unknown, *([""] if "" in seen else []))
