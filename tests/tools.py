"""What several tests need: writing inputs, running the program, reading what it left."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tinysd_batch.cli import main
from tinysd_batch.storage import TEMPORARY_PREFIX


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A CSV manifest; the first row's keys are the columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", **more}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tinysd_batch", *(str(argument) for argument in arguments)]


def run(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=200, check=False
    )


def run_here(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program in this process: much quicker, since torch is loaded already."""
    words = [str(argument) for argument in arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, ["tinysd-batch", *words]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def stop_between_writes(process: subprocess.Popen[str], job: Path) -> None:
    """One that stands still in the middle of a write has to be killed before another can have its job."""
    folder = os.open(job / "_tinysd", os.O_RDONLY)
    try:
        while True:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)
    finally:
        os.close(folder)


def read_results(job: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(job / "results.parquet").to_pylist()
    return rows


def check_whole(
    job: Path, images: int, read: Callable[[Path], list[dict[str, Any]]] = read_results
) -> list[dict[str, Any]]:
    """Assert what a finished job promises: every index once, every hash right, nothing left over. Returns the rows."""
    rows = read(job)
    made = [row for row in rows if row["index"] is not None]
    assert sorted(row["index"] for row in made) == list(range(1, images + 1))
    for row in made:
        if row["status"] == "ok":
            data = (job / row["file_name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == row["sha256"], row["file_name"]
    there = {path.relative_to(job).as_posix() for path in (job / "images").rglob("*") if path.is_file()}
    assert there == {row["file_name"] for row in made if row["status"] == "ok"}
    assert not list(job.rglob(f"{TEMPORARY_PREFIX}*"))
    assert not list((job / "_tinysd" / "journal").iterdir())
    return rows
