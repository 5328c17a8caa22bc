"""What several tests need: writing inputs, running the program and jobs, reading what they left, breaking files."""

import contextlib
import fcntl
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.files import snapshot
from tests.support.fork_server import ForkedProcess, is_forkable
from tinysd_batch.cli import main

Capture = pytest.CaptureFixture[str]


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


def call(capture: Capture, *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process: exit code, stdout, stderr."""
    capture.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinysd-batch", *(str(argument) for argument in arguments)])
        with no_new_variables(), pytest.raises(SystemExit) as end:
            main()
    return (end.value.code or 0, *capture.readouterr())  # type: ignore[return-value]


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
