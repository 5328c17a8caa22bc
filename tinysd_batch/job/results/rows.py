"""Rows of the results table from records, and back."""

import re
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from tinysd_batch.job.results.schema import extra_column_name
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status

REQUEST_COLUMNS = ("row", "sample", "id", "prompt", "negative_prompt", "prompt_syntax", "seed")

PARAMS_COLUMNS = ("width", "height", "steps", "sampler", "eta")

RESULT_COLUMNS = tuple(field.name for field in fields(ImageResult))

LINE_PREFIX = re.compile(r"line (\d{1,18}): ", re.ASCII)  # before the reason in the message of an invalid row


def to_datetime(seconds: float | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds is not None else None


def make_image_row(request: ImageRequest, result: ImageResult, run: dict[str, Any]) -> dict[str, Any]:
    """One image as a row of the table; `run` gives model, model_digest, run_id and version."""
    row = {
        **{name: getattr(request, name) for name in REQUEST_COLUMNS},
        **{name: getattr(request.params, name) for name in PARAMS_COLUMNS},
        **{name: getattr(result, name) for name in RESULT_COLUMNS},
        **run,
        "scale": request.scale,
        "image_id": request.image_id,
        "status": str(result.status),
        "started_at": to_datetime(result.started_at),
        "finished_at": to_datetime(result.finished_at),
    }
    return row | {extra_column_name(name): value for name, value in request.extra.items()}


def make_invalid_row(row: InvalidRow, run: dict[str, Any]) -> dict[str, Any]:
    """A manifest row that gave no image, as a row of the table without an index."""
    now = datetime.now(UTC)
    ours = {
        "row": row.number, "id": row.id, "prompt": row.prompt, "status": str(Status.INVALID), "attempts": 0,
        "error_class": "invalid_row", "error_message": format_invalid_reason(row)[:2000], "started_at": now, "finished_at": now,
    }  # fmt: skip
    return {**ours, **run, **{extra_column_name(name): value for name, value in row.extra.items()}}


def format_invalid_reason(row: InvalidRow) -> str:
    """`line 8: column seed = 'x': a whole number was expected`"""
    return f"line {row.line}: {row.reason}" if row.line is not None else row.reason


def parse_invalid_row(row: dict[str, Any]) -> InvalidRow:
    """What `invalid_row` wrote, as far as it is about the fault."""
    line, reason = parse_invalid_reason(row["error_message"] or "")
    return InvalidRow(row["row"], reason, row["prompt"], row["id"], line=line)


def parse_invalid_reason(message: str) -> tuple[int | None, str]:
    """The line and the reason that `fault_message` put together."""
    match = LINE_PREFIX.match(message)
    return (int(match[1]), message[match.end() :]) if match else (None, message)
