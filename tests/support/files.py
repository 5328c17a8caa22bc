"""Write, damage and list files."""

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Change = Callable[[Path], object]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write a CSV manifest with the first row's keys as columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def snapshot(folder: Path) -> dict[str, object]:
    """Return every path below a folder, files with their bytes, without the job's log.

    The lock's content may change: it has the last process id.
    """
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() and path.name != "lock" else None
        for path in folder.rglob("*")
        if path.name != "job.log"
    }


def set_json(file: str, **values: object) -> Change:
    """Return a function that changes entries of a JSON file of a model; None removes an entry."""

    def change(model: Path) -> None:
        content = json.loads((model / file).read_text()) | values
        (model / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def put(file: str, data: bytes) -> Change:
    """Return a function that writes a file of a model."""
    return lambda model: (model / file).write_bytes(data)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def instead(file: str, make: Change) -> Change:
    """Return a function that replaces a file of a model by what `make` creates."""

    def change(model: Path) -> None:
        remove(model / file)
        make(model / file)

    return change


def parquet_bytes(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())
