"""Seeds that rows without one had in another job, so that the same rows give the same pictures in a new one."""

import gzip
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysd_batch.config import MAX_SEED
from tinysd_batch.errors import StorageError
from tinysd_batch.job.manifest.snapshot import parse_snapshot_line, row_to_dict
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.job import ManifestRecord
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.storage.atomic import read_file, write_atomically
from tinysd_batch.text import normalize_text

SEEDS_FILE = "seeds.json.gz"
NON_CONTENT_FIELDS = ("id", "seed", "extra")
CONTENT_COLUMNS = (
    "prompt", "negative_prompt", "prompt_syntax", "width", "height", "steps", "sampler", "scale", "eta",
)  # fmt: skip
MAX_SEEDS_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class SeededRow:
    """What is needed of a row to match it with one of another job."""

    number: int
    id: str | None
    content: bytes  # digest of prompt and settings
    seed: int | None  # of its first image


def find_inherited_seeds(old_state: Path, saved: dict[str, Any], rows: Iterable[Row | InvalidRow]) -> dict[int, int]:
    """Number of a row -> the seed its first image had in the job with that `_tinysd` and `job.json`.

    Raises StorageError.
    """
    wanted = [make_seeded_row(row.number, row_to_dict(row)) for row in rows if isinstance(row, Row)]
    return match_seeds(list(read_seeded_rows(old_state, saved)), [row for row in wanted if row.seed is None])


def find_inherited_seeds_in_results(old: Path, rows: Iterable[Row | InvalidRow]) -> dict[int, int]:
    """The same from a job's results alone, for one that has lost its `job.json`.

    The table knows neither which seeds the manifest gave nor rows without any image. Raises StorageError.
    """
    new = [
        make_seeded_row_from_table(row.number, select_table_fields(row))
        for row in rows
        if isinstance(row, Row) and row.seed is None
    ]
    names = ["row", "index", "sample", "id", "seed", *CONTENT_COLUMNS]
    first: dict[int, SeededRow] = {}
    for values in ResultsTable(old).read_newest(names).to_pylist() if new else ():
        number, seed, sample = values["row"], values["seed"], values["sample"]
        if values["index"] is not None and seed is not None and sample is not None:
            values["seed"] = (seed - sample + 1) % (MAX_SEED + 1)
            first.setdefault(number, make_seeded_row_from_table(number, values))
    return match_seeds(first.values(), new)


def select_table_fields(row: Row) -> dict[str, Any]:
    kept = row_to_dict(row)
    return {name: kept[name] for name in ("id", "seed", *CONTENT_COLUMNS)}


def make_seeded_row_from_table(number: int, values: dict[str, Any]) -> SeededRow:
    texts = [str(float(value) if isinstance(value := values[name], int | float) else value) for name in CONTENT_COLUMNS]
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()
    return SeededRow(number, values["id"], digest, values["seed"])


def read_seeded_rows(state: Path, saved: dict[str, Any]) -> Iterator[SeededRow]:
    """The valid rows of a job with the seeds they were given. Raises StorageError."""
    given = read_inherited_seeds(state) if saved.get("reuse") else {}
    index = 1
    for number, line in ManifestRecord.from_job_json(saved).snapshot(state).rows():
        kept = parse_snapshot_line(line)
        if kept.get("invalid"):
            continue
        own = kept["seed"] is not None
        kept["seed"] = kept["seed"] if own else given.get(number, (saved["seed"] + index - 1) % (MAX_SEED + 1))
        index += kept["n_iter"] * kept["n_samples"]
        yield make_seeded_row(number, kept, own)


def make_seeded_row(number: int, kept: dict[str, Any], own_seed: bool = False) -> SeededRow:
    content = {name: in_normal_form(value) for name, value in kept.items() if name not in NON_CONTENT_FIELDS}
    content["own_seed"] = own_seed
    text = json.dumps(content, sort_keys=True)
    return SeededRow(number, kept["id"], hashlib.blake2b(text.encode(), digest_size=16).digest(), kept["seed"])


def in_normal_form(value: Any) -> Any:
    """Jobs of 0.1.0 hold text as it was written."""
    return normalize_text(value) if isinstance(value, str) else value


def match_seeds(old: Iterable[SeededRow], new: Iterable[SeededRow]) -> dict[int, int]:
    """Number of a new row -> seed of the old row it is: the one of its id, else of the same prompt and settings.

    The n-th of several alike is the n-th of those there. No old row is matched twice: that would draw a picture twice.
    """
    old, new = list(old), list(new)
    matched = pair_by_key([row for row in old if row.id is not None], [row for row in new if row.id is not None], "id")
    used = {row.number for row in matched.values()}
    rest = [row for row in old if row.number not in used], [row for row in new if row.number not in matched]
    matched |= pair_by_key(*rest, "content")
    return {number: row.seed for number, row in matched.items() if row.seed is not None}


def pair_by_key(old: Iterable[SeededRow], new: Iterable[SeededRow], key: str) -> dict[int, SeededRow]:
    """Number of a new row -> the old row with the same key, in order."""
    waiting: dict[Any, list[SeededRow]] = defaultdict(list)
    for row in reversed(list(old)):
        waiting[getattr(row, key)].append(row)
    return {row.number: found.pop() for row in new if (found := waiting.get(getattr(row, key)))}


def save_inherited_seeds(seeds: dict[int, int], state: Path) -> None:
    """Raises StorageError."""
    write_atomically(gzip.compress(json.dumps(list(seeds.items())).encode(), 1, mtime=0), state / SEEDS_FILE)


def read_inherited_seeds(state: Path) -> dict[int, int]:
    """Raises StorageError."""
    path = state / SEEDS_FILE
    try:
        seeds = dict(json.loads(decompress_seeds(read_file(path, MAX_SEEDS_BYTES))))
        if not all(type(value) is int and 0 <= value <= MAX_SEED for item in seeds.items() for value in item):
            raise ValueError("a seed is none")
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StorageError(
            f"{path}: cannot be read: {reason}; without it the job cannot go on: name another folder with -o"
        ) from None
    return seeds


def decompress_seeds(data: bytes) -> bytes:
    """Raises EOFError, zlib.error, or ValueError for far more than seeds can be."""
    packer = zlib.decompressobj(wbits=31)
    text = packer.decompress(data, MAX_SEEDS_BYTES)
    if not packer.eof:
        raise ValueError("cut off, or too large")
    return text
