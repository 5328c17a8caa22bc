"""What several tests need: writing inputs, running the program and jobs, reading what they left, breaking files."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fork_server import ForkedProcess, is_forkable
from tinysd_batch.cli import main
from tinysd_batch.config import Settings
from tinysd_batch.job.dispatch.job_progress import InvalidRows
from tinysd_batch.job.driver import Summary, run_job
from tinysd_batch.job.results.table import readable
from tinysd_batch.job.state.job import Job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.pool import WorkerLost, WorkerReady
from tinysd_batch.job.workers.worker import WorkerSetup
from tinysd_batch.records import ImageRequest, ImageResult
from tinysd_batch.storage.atomic import TEMPORARY_PREFIX

Capture = pytest.CaptureFixture[str]
Change = Callable[[Path], object]
DEFAULT_EXAMPLES = 50  # of a property, by hypothesis


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


def start(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
    **options: Any,
) -> subprocess.Popen[Any]:
    """Start the program as a user does; `options` are those of `subprocess.Popen`.

    The process is forked from one with its imports done, which saves it three seconds. It is a fresh one if `fresh`
    says so, or if a variable of `env` may be read when an interpreter or a library loads.
    """
    variables = environment() if env is None else dict(env)
    kind = subprocess.Popen if fresh or not is_forkable(variables) else ForkedProcess
    return kind(command(*arguments), cwd=cwd, env=variables, **options)


def run(
    *arguments: object, cwd: Path | None = None, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does, to its end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(*arguments, cwd=cwd, env=environment(**env), fresh=fresh, text=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=200)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def no_new_variables() -> Iterator[None]:
    """Variables that a command adds to its environment end with it, as they would with its process."""
    before = set(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            del os.environ[name]


def run_here(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program in this process: much quicker, since torch is loaded already."""
    words = [str(argument) for argument in arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, ["tinysd-batch", *words]
    try:
        with (
            contextlib.chdir(cwd),
            no_new_variables(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file or folder that all workers of a test run share: the first that needs it has `make` write it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(f"partial-{path.name}")
            make(partial)
            partial.rename(path)
    return path


def examples(count: int) -> hypothesis.settings:
    """For a property that is slow to test: so many examples by default, in proportion in other profiles."""
    profile = hypothesis.settings.default
    assert profile is not None
    return hypothesis.settings(max_examples=count * profile.max_examples // DEFAULT_EXAMPLES)


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
    rows: list[dict[str, Any]] = readable(pq.read_table(job / "results.parquet")).to_pylist()
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


class Quiet:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.notes: list[str] = []

    def started(self, total: int, finished: int, invalid: InvalidRows) -> None: ...
    def worker(self, event: WorkerReady | WorkerLost) -> None: ...
    def durable(self) -> None: ...

    def note(self, line: str) -> None:
        self.notes.append(line)

    def image(self, request: ImageRequest, result: ImageResult) -> None:
        self.made.append(request.index)


def setup_for(job: Job) -> WorkerSetup:
    model = job.model
    return WorkerSetup(
        job.folder, job.scratch, model.path, model.name, model.digest, "cpu", "auto", None, stop_file=job.stop_file
    )


def draw(
    manifest: Path, folder: Path, model: Path, stop_after: int | None = None, limit: int | None = None, **settings: Any
) -> tuple[Summary, Quiet]:
    job = open_job(manifest, folder, Settings(model=str(model), **settings))
    progress = Quiet()
    stop: Callable[[], bool] = lambda: stop_after is not None and len(progress.made) >= stop_after  # noqa: E731
    return run_job(job, lambda _: InlinePool(setup_for(job)), progress, stop, limit), progress


def call(capture: Capture, *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process: exit code, stdout, stderr."""
    capture.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinysd-batch", *(str(argument) for argument in arguments)])
        with no_new_variables(), pytest.raises(SystemExit) as end:
            main()
    return (end.value.code or 0, *capture.readouterr())  # type: ignore[return-value]


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def snapshot(folder: Path) -> dict[str, object]:
    """Every file below with its bytes. The lock holds the number of the last process and may change."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() and path.name != "lock" else None
        for path in folder.rglob("*")
    }


def check_refused(capture: Capture, folder: Path, arguments: list[object], code: int, message: str) -> None:
    """One line on stderr (the parser's own complaints are longer), the right exit code, no file more or less."""
    before = snapshot(folder)
    found, _, stderr = call(capture, *arguments)
    assert (found, message in stderr) == (code, True), f"exit code {found}, stderr: {stderr}"
    assert "Traceback" not in stderr
    if not stderr.startswith(("Usage: ", "Error: ")):
        assert stderr.startswith("tinysd-batch: ")
        assert len(stderr.splitlines()) == 1, stderr
    assert snapshot(folder) == before


# Files that are changed for the worse


def set_json(file: str, **values: object) -> Change:
    """Change entries of one of the model's files; None removes."""

    def change(model: Path) -> None:
        content = json.loads((model / file).read_text()) | values
        (model / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def put(file: str, data: bytes) -> Change:
    return lambda model: (model / file).write_bytes(data)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def instead(file: str, make: Change) -> Change:
    """Put something else in a file's place."""

    def change(model: Path) -> None:
        remove(model / file)
        make(model / file)

    return change


def parquet_bytes(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())
