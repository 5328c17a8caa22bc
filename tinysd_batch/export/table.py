"""Export the results table to formats that most programs can read."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from tinysd_batch.errors import UsageError
from tinysd_batch.job.results.columns import COLUMNS
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.job_json import read_job_json
from tinysd_batch.storage.atomic import write_atomically
from tinysd_batch.storage.filesystem import storage_errors

CELL_SEPARATORS = {".csv": ",", ".tsv": "\t"}
LIST_COLUMNS = [column.name for column in COLUMNS if pa.types.is_list(column.type)]
FORMULA_PREFIXES = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 - some programs accept full-width ones


def export_table(job_folder: Path, path: Path) -> int:
    """Write a job's results, the newest row of each image, in order.

    Returns:
        The number of rows.

    Raises:
        UsageError: The folder is not a job, or the suffix is unknown.
    """
    read_job_json(job_folder)
    suffix = path.suffix.lower()
    if suffix not in (*CELL_SEPARATORS, ".jsonl"):
        raise UsageError(f"{path}: unknown suffix; use .csv, .tsv or .jsonl")
    rows = list(read_newest_rows(job_folder))
    text = to_json_lines(rows) if suffix == ".jsonl" else to_csv(rows, CELL_SEPARATORS[suffix])
    with storage_errors(path):
        write_atomically(text.encode("utf-8"), path)
    return len(rows)


def read_newest_rows(job_folder: Path) -> Iterator[dict[str, Any]]:
    newest = {(row["row"], row["index"] or 0): row for row in ResultsTable(job_folder).read_rows(None)}
    for key in sorted(newest):
        yield newest[key]


def to_json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def to_csv(rows: list[dict[str, Any]], separator: str) -> str:
    sheet = io.StringIO()
    # Quote all text: by default `csv` does not quote carriage returns, which would start a new row.
    writer = csv.writer(sheet, delimiter=separator, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    names = list(rows[0]) if rows else []
    writer.writerow([to_spreadsheet_cell(name) for name in names])
    for row in rows:
        for name in LIST_COLUMNS:
            row[name] = " ".join(row.get(name) or [])
        writer.writerow([to_spreadsheet_cell(row.get(name)) for name in names])
    return sheet.getvalue()


def to_spreadsheet_cell(value: Any) -> Any:
    """Make a value safe for a spreadsheet: prefix text that would run as a formula with an apostrophe.

    Manifests are untrusted, and spreadsheet programs run cells that begin with these characters (OWASP, CSV injection).
    """
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_PREFIXES) else value
