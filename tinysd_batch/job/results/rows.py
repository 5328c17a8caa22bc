"""Convert records to rows of the results table, and back."""

import re
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

from tinysd_batch.job.results.columns import COLUMNS_BY_SOURCE, ColumnSource
from tinysd_batch.job.results.schema import extra_column_name
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status

LINE_PREFIX = re.compile(r"line (\d{1,18}): ", re.ASCII)  # starts the error message of an invalid row
MAX_MESSAGE_CHARACTERS = 2000


REQUEST_COLUMNS = COLUMNS_BY_SOURCE[ColumnSource.REQUEST]
SETTING_COLUMNS = COLUMNS_BY_SOURCE[ColumnSource.SETTINGS]
RESULT_COLUMNS = COLUMNS_BY_SOURCE[ColumnSource.RESULT]
# There are several rows for every image of a large job, so their values are read in two calls.
get_request_values = attrgetter(*REQUEST_COLUMNS, *(f"settings.{name}" for name in SETTING_COLUMNS))
get_result_values = attrgetter(*RESULT_COLUMNS)


def to_datetime(seconds: float | None) -> datetime | None:
    """Convert seconds since the epoch to a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC) if seconds is not None else None


def make_image_row(request: ImageRequest, result: ImageResult, run_columns: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an image. `run_columns` are those of `Job.run_columns`."""
    row = dict(zip((*REQUEST_COLUMNS, *SETTING_COLUMNS), get_request_values(request), strict=True))
    row.update(zip(RESULT_COLUMNS, get_result_values(result), strict=True))
    row.update(run_columns)
    row["status"] = str(result.status)
    row["started_at"] = to_datetime(result.started_at)
    row["finished_at"] = to_datetime(result.finished_at)
    row.update((extra_column_name(name), value) for name, value in request.extra.items())
    return row


def make_invalid_row(row: InvalidRow, run_columns: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an invalid manifest row, which has no image index."""
    now = datetime.now(UTC)
    own_columns = {
        "row": row.number,
        "id": row.id,
        "prompt": row.prompt,
        "status": str(Status.INVALID),
        "attempts": 0,
        "error_class": "invalid_row",
        "error_message": format_invalid_reason(row)[:MAX_MESSAGE_CHARACTERS],
        "started_at": now,
        "finished_at": now,
    }
    return {**own_columns, **run_columns, **{extra_column_name(name): value for name, value in row.extra.items()}}


def format_invalid_reason(row: InvalidRow) -> str:
    """Return the reason with its line, such as `line 8: column seed = 'x': a whole number was expected`."""
    return f"line {row.line}: {row.reason}" if row.line is not None else row.reason


def parse_invalid_row(row: dict[str, Any]) -> InvalidRow:
    """Return the parts of an InvalidRow that `make_invalid_row` stored in a row."""
    line, reason = parse_invalid_reason(row["error_message"] or "")
    return InvalidRow(row["row"], reason, row["prompt"], row["id"], line=line)


def parse_invalid_reason(message: str) -> tuple[int | None, str]:
    """Split a message of `format_invalid_reason` into line number and reason."""
    match = LINE_PREFIX.match(message)
    return (int(match[1]), message[match.end() :]) if match else (None, message)
