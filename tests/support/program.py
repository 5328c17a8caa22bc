"""Run the command line in tests, in a process of its own or in this one."""

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

    The process is forked from one that has done the imports, which saves three seconds. It is a fresh one if `fresh` is
    set, or if `env` has a variable that may be read when an interpreter or a library loads.
    """
    variables = environment() if env is None else dict(env)
    process_class = subprocess.Popen if fresh or not is_forkable(variables) else ForkedProcess
    return process_class(command(*arguments), cwd=cwd, env=variables, **options)


def run(
    *arguments: object, cwd: Path | None = None, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does, and wait for its end."""
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
    """Remove the environment variables that a command adds, as the end of its process would."""
    before = set(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            del os.environ[name]


def run_here(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program in this process, which is much faster because torch is already imported."""
    words = [str(argument) for argument in arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    old_argv, sys.argv = sys.argv, ["tinysd-batch", *words]
    try:
        with (
            contextlib.chdir(cwd),
            no_new_variables(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = old_argv
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def stop_between_writes(process: subprocess.Popen[str], job: Path) -> None:
    """Stop the process (SIGSTOP) while it is not writing: after a stop within a write, only a kill frees the job."""
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
    """Run the program in this process, and return exit code, stdout and stderr."""
    capture.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinysd-batch", *(str(argument) for argument in arguments)])
        with no_new_variables(), pytest.raises(SystemExit) as error:
            main()
    return (error.value.code or 0, *capture.readouterr())  # type: ignore[return-value]


def check_refused(capture: Capture, folder: Path, arguments: list[object], code: int, message: str) -> None:
    """Assert one line on stderr (more from the option parser), the exit code, and that no file changed."""
    before = snapshot(folder)
    actual_code, _, stderr = call(capture, *arguments)
    assert (actual_code, message in stderr) == (code, True), f"exit code {actual_code}, stderr: {stderr}"
    assert "Traceback" not in stderr
    if not stderr.startswith(("Usage: ", "Error: ")):
        assert stderr.startswith("tinysd-batch: ")
        assert len(stderr.splitlines()) == 1, stderr
    assert snapshot(folder) == before
