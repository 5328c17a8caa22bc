"""How long `submit` takes, when it starts, to compare the results table of a large finished job with the files on disk.

    python -m benchmarks.job.compare_disk [--images 1000000] [--folder DIR]

Writes a job folder with a results table in parts, and files of the sizes in the table but without content. Prints the
seconds for reading the table, and for the comparison in addition, with the file names in the kernel's cache.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from tinysd_batch.job.plan.batches import IMAGES_PER_FOLDER, format_file_name
from tinysd_batch.job.results.columns import COLUMN_FIELDS
from tinysd_batch.job.results.compare import find_differences, iterate_saved_images, read_saved_images
from tinysd_batch.job.results.table import ResultsTable, conform_to_schema
from tinysd_batch.job.results.writer import SEAL_ROWS, to_parquet
from tinysd_batch.storage.atomic import write_atomically

SEED = 1_000_000
FILE_SIZE_RANGE_BYTES = (300_000, 500_000)


def make_files(folder: Path, sizes: np.ndarray) -> None:
    for first in range(0, len(sizes), IMAGES_PER_FOLDER):
        names = [format_file_name(SEED + index - 1, index) for index in range(first + 1, first + IMAGES_PER_FOLDER + 1)]
        (folder / names[0]).parent.mkdir(parents=True)
        for name, size in zip(names, sizes[first:].tolist(), strict=False):
            path = os.fspath(folder / name)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            os.truncate(path, size)


def make_table(folder: Path, sizes: np.ndarray) -> None:
    schema = pa.schema(COLUMN_FIELDS)
    for part, first in enumerate(range(0, len(sizes), SEAL_ROWS)):
        part_sizes = sizes[first : first + SEAL_ROWS]
        indexes = np.arange(first + 1, first + len(part_sizes) + 1)
        names = [format_file_name(SEED + index - 1, index) for index in indexes.tolist()]
        ids = [f"{index:032x}" for index in indexes.tolist()]
        table = pa.table({
            "index": indexes, "row": indexes, "sample": np.ones(len(part_sizes), np.int32), "seed": indexes + SEED - 1,
            "prompt": ids, "image_id": ids, "status": ["ok"] * len(part_sizes), "file_name": names, "bytes": part_sizes,
            "sha256": [image_id * 2 for image_id in ids], "run_id": ["0"] * len(part_sizes),
        })  # fmt: skip
        write_atomically(to_parquet(conform_to_schema(table, schema)), ResultsTable(folder).part_path(part))


def time_call_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(folder: Path, images: int) -> None:
    reading_s = min(time_call_s(lambda: list(iterate_saved_images(read_saved_images(folder)))) for _ in range(3))
    total_s = min(time_call_s(lambda: find_differences(folder)) for _ in range(3))
    print(f"{images:,} images: reading the table {reading_s:.2f} s, comparing {total_s - reading_s:.2f} s more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="parent of the job folder (default: the temporary folder)")
    arguments = parser.parse_args()
    sizes = np.random.default_rng(0).integers(*FILE_SIZE_RANGE_BYTES, arguments.images)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        writing_s = time_call_s(lambda: make_files(folder, sizes)) + time_call_s(lambda: make_table(folder, sizes))
        print(f"written in {writing_s:.0f} s")
        differences = find_differences(folder)
        assert differences.images == arguments.images
        assert not differences.indexes, f"{differences}"
        measure(folder, arguments.images)


if __name__ == "__main__":
    main()
