"""Give rows the seeds that they had in another job.

A row without a seed of its own gets one from the job's seed and its position. Inheriting seeds lets a new job, in which
positions differ, generate the same images for the same rows.
"""

import gzip
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysd_batch.errors import StorageError
from tinysd_batch.job.manifest.snapshot import parse_snapshot_line, row_to_dict
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.job import ManifestRecord
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.settings.limits import MAX_SEED
from tinysd_batch.settings.schema import IMAGE_SETTINGS, SETTINGS
from tinysd_batch.storage.atomic import read_file, write_atomically
from tinysd_batch.text import normalize_if_text

SEEDS_FILE = "seeds.json.gz"
NON_CONTENT_FIELDS = ("id", "seed", "extra")
CONTENT_COLUMNS = ("prompt", *(name for name, setting in IMAGE_SETTINGS.items() if setting.is_column))
MAX_SEEDS_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SeededRow:
    """What is needed to match a row with one of another job."""

    number: int
    id: str | None
    content: bytes  # digest of prompt and settings
    seed: int | None  # of its first image


def find_inherited_seeds(old_state: Path, saved: dict[str, Any], rows: Iterable[Row | InvalidRow]) -> dict[int, int]:
    """Match rows with those of another job.

    Args:
        old_state: Folder `_tinysd` of the other job.
        saved: Content of its `job.json`.
        rows: Rows of the new job.

    Returns:
        Row number -> seed of the first image of the matching row, for new rows without a seed.

    Raises:
        StorageError: The rows or seeds of the other job cannot be read.
    """
    new = [make_seeded_row(row.number, row_to_dict(row)) for row in rows if isinstance(row, Row)]
    return match_seeds(list(read_seeded_rows(old_state, saved)), [row for row in new if row.seed is None])


def find_inherited_seeds_in_results(old: Path, rows: Iterable[Row | InvalidRow]) -> dict[int, int]:
    """Do what `find_inherited_seeds` does from the results alone, for a job that has lost its `job.json` or rows.

    The table records neither which seeds the manifest gave nor rows without images. Raises StorageError.
    """
    new = [
        make_seeded_row_from_table(row.number, select_table_fields(row))
        for row in rows
        if isinstance(row, Row) and row.seed is None
    ]
    names = ["row", "index", "sample", "id", "seed", *CONTENT_COLUMNS]
    old_rows: dict[int, SeededRow] = {}
    for values in ResultsTable(old).read_newest(names).to_pylist() if new else ():
        number, seed, sample = values["row"], values["seed"], values["sample"]
        if values["index"] is not None and seed is not None and sample is not None:
            values["seed"] = (seed - sample + 1) % (MAX_SEED + 1)
            old_rows.setdefault(number, make_seeded_row_from_table(number, values))
    return match_seeds(old_rows.values(), new)


def select_table_fields(row: Row) -> dict[str, Any]:
    """Return the values of a row that the results table also has."""
    settings = {name: getattr(row.settings, name) for name in CONTENT_COLUMNS if name in IMAGE_SETTINGS}
    return {"prompt": row.prompt, "id": row.id, "seed": row.seed, **settings}


def make_seeded_row_from_table(number: int, values: dict[str, Any]) -> SeededRow:
    """Create a row from values of the results table; numbers are compared as floats.

    A table written before a setting existed has null for it, which stands for its default.
    """
    content = [
        SETTINGS[name].default if values[name] is None and name in SETTINGS else values[name]
        for name in CONTENT_COLUMNS
    ]
    texts = [str(float(value) if isinstance(value, int | float) else value) for value in content]
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()
    return SeededRow(number, values["id"], digest, values["seed"])


def read_seeded_rows(state_folder: Path, saved: dict[str, Any]) -> Iterator[SeededRow]:
    """Read the valid rows of a job with the seeds of their first images. Raises StorageError."""
    inherited = read_inherited_seeds(state_folder) if saved.get("reuse") else {}
    index = 1
    for number, line in ManifestRecord.from_job_json(saved).snapshot(state_folder).rows():
        values = parse_snapshot_line(line)
        if values.get("invalid"):
            continue
        has_own_seed = values["seed"] is not None
        if not has_own_seed:
            values["seed"] = inherited.get(number, (saved["seed"] + index - 1) % (MAX_SEED + 1))
        index += values["n_iter"] * values["n_samples"]
        yield make_seeded_row(number, values, has_own_seed)


def make_seeded_row(number: int, values: dict[str, Any], has_own_seed: bool = False) -> SeededRow:
    """Create a row from values of the snapshot, where 0.1.0 stored text that was not normalized."""
    content = {name: normalize_if_text(value) for name, value in values.items() if name not in NON_CONTENT_FIELDS}
    content["own_seed"] = has_own_seed
    text = json.dumps(content, sort_keys=True)
    return SeededRow(number, values["id"], hashlib.blake2b(text.encode(), digest_size=16).digest(), values["seed"])


def match_seeds(old: Iterable[SeededRow], new: Iterable[SeededRow]) -> dict[int, int]:
    """Return row number -> seed for new rows that match an old row by id, or else by prompt and settings.

    Equal rows are matched in order. No old row is matched twice, as that would generate an image twice.
    """
    old, new = list(old), list(new)
    matched = pair_by_key([row for row in old if row.id is not None], [row for row in new if row.id is not None], "id")
    used = {row.number for row in matched.values()}
    unmatched_old = [row for row in old if row.number not in used]
    unmatched_new = [row for row in new if row.number not in matched]
    matched |= pair_by_key(unmatched_old, unmatched_new, "content")
    return {number: row.seed for number, row in matched.items() if row.seed is not None}


def pair_by_key(old: Iterable[SeededRow], new: Iterable[SeededRow], key: str) -> dict[int, SeededRow]:
    """Return number of a new row -> old row with the same attribute `key`, pairing equal rows in order."""
    old_by_key: dict[Any, list[SeededRow]] = defaultdict(list)
    for row in reversed(list(old)):
        old_by_key[getattr(row, key)].append(row)
    return {row.number: matches.pop() for row in new if (matches := old_by_key.get(getattr(row, key)))}


def save_inherited_seeds(seeds: dict[int, int], state_folder: Path) -> None:
    """Write the seeds (row number -> seed) to the job's state folder. Raises StorageError."""
    write_atomically(gzip.compress(json.dumps(list(seeds.items())).encode(), 1, mtime=0), state_folder / SEEDS_FILE)


def read_inherited_seeds(state_folder: Path) -> dict[int, int]:
    """Read what `save_inherited_seeds` wrote. Raises StorageError if the file is missing or damaged."""
    path = state_folder / SEEDS_FILE
    try:
        seeds = dict(json.loads(decompress_seeds(read_file(path, MAX_SEEDS_BYTES))))
        if not all(type(value) is int and 0 <= value <= MAX_SEED for item in seeds.items() for value in item):
            raise ValueError(f"row numbers and seeds must be integers from 0 to {MAX_SEED}")
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StorageError(
            f"{path}: cannot be read: {reason}; restore it to resume the job, or name another folder with -o"
        ) from None
    return seeds


def decompress_seeds(data: bytes) -> bytes:
    """Decompress a gzip file. Raises EOFError, zlib.error, or ValueError if it is truncated or too large."""
    decompressor = zlib.decompressobj(wbits=31)
    text = decompressor.decompress(data, MAX_SEEDS_BYTES)
    if not decompressor.eof:
        raise ValueError("truncated, or too large")
    return text
