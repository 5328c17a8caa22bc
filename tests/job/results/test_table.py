"""Reading the results table."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.program import environment
from tinysd_batch.job.results.columns import COLUMN_FIELDS

READ = """
import os, sys
from pathlib import Path
from tinysd_batch.job.results.table import read_table

threads = len(os.listdir("/proc/self/task"))
read_table(Path(sys.argv[1]))
print(len(os.listdir("/proc/self/task")) - threads)
"""


def test_reading_starts_no_thread(tmp_path: Path) -> None:
    """A thread of pyarrow that still frees a buffer when the process exits would abort it (SIGABRT)."""
    table = pa.Table.from_pylist([{"row": 1, "status": "ok"}], pa.schema(COLUMN_FIELDS))
    pq.write_table(table, tmp_path / "results.parquet")
    command = [sys.executable, "-c", READ, str(tmp_path / "results.parquet")]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert result.stdout == "0\n"
