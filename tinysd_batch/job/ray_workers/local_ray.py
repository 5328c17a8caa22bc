"""A Ray of our own on this machine: what it needs to start, closed to others, and what ends it with this process."""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

from tinysd_batch.errors import NoWorkerError
from tinysd_batch.import_path import select_absolute_entries
from tinysd_batch.job.ray_workers import reaper
from tinysd_batch.job.ray_workers.temp_folder import RayTempFolder, create_temp_folder

OBJECT_STORE_BYTES = 80 * 2**20  # only small records travel; Ray's default would take a third of memory
RAY_START_TIMEOUT_S = 60.0  # then what has started is killed, after which Ray itself gives up within half a minute
REAPER_TIMEOUT_S = 30.0
LOOPBACK = "127.0.0.1"
LOOPBACK_TIMEOUT_S = 5.0
INLINE_HINT = "`--inline` runs the job in this process, without Ray"
ESSENTIAL_PROCESSES = ("raylet", "gcs_server")  # without which nothing works, while Ray goes on waiting
# Each names another Ray, or has it take code and settings from elsewhere.
FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_AUTH_TOKEN", "RAY_TMPDIR")


class LocalRay:
    """The folder and the guardian of one Ray, from before it starts until nothing is left of it."""

    def __init__(self) -> None:
        """Raises NoWorkerError where there is no place for Ray's files."""
        self.folder: RayTempFolder = create_temp_folder()
        self.driver_mark = uuid.uuid4().hex
        owner = self.folder.lock_file.fileno()  # a folder is ours for as long as its guardian lives
        command = [
            sys.executable,
            "-I",
            "-S",
            reaper.__file__,
            self.driver_mark,
            str(self.folder.path),
            str(RAY_START_TIMEOUT_S),
        ]
        self.reaper_process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, start_new_session=True, cwd="/", pass_fds=(owner,)
        )

    def init_options(self) -> dict[str, Any]:
        """For `ray.init`. Without an explicit address Ray joins whatever cluster it finds on the machine."""
        return {
            "address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self.folder.ray_temp_dir),
        }  # fmt: skip

    @contextlib.contextmanager
    def ray_environment(self) -> Iterator[None]:
        """What Ray's processes inherit: their mark, a current folder of ours, and an import path without it."""
        packages = [*select_absolute_entries(os.environ.get("PYTHONPATH", "")), str(self.folder.packages_folder)]
        ours = {
            reaper.MARK_VARIABLE: self.driver_mark, "PYTHONPATH": os.pathsep.join(packages),
            "RAY_AUTH_TOKEN_PATH": str(self.folder.token_file),
        }  # fmt: skip
        before = {name: os.environ.get(name) for name in (*ours, *FOREIGN_VARIABLES)}
        here = os.open(".", os.O_PATH)
        try:
            for name in FOREIGN_VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(ours)
            os.chdir(self.folder.packages_folder)
            yield
        finally:
            os.fchdir(here)
            os.close(here)
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def notify_started(self) -> None:
        """Tell the guardian that there is no need to end a start that hangs."""
        with contextlib.suppress(BrokenPipeError):
            self.reaper_process.stdin.write(b"started\n")  # type: ignore[union-attr]
            self.reaper_process.stdin.flush()  # type: ignore[union-attr]

    def stop_processes(self) -> None:
        """Have what Ray left ended and removed, and wait for that."""
        if self.reaper_process.poll() is not None:
            return
        try:
            self.reaper_process.communicate(timeout=REAPER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.reaper_process.kill()

    def close(self) -> None:
        self.stop_processes()
        self.folder.close()  # where Ray in this process has written since


def check_loopback() -> None:
    """Raise NoWorkerError where Ray's processes could not reach each other; they would try for a quarter of an hour."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_TIMEOUT_S).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NoWorkerError(
            f"Ray could not start: {LOOPBACK} cannot be reached on this machine: {reason}; {INLINE_HINT}"
        ) from None


def make_isolated_job_config() -> Any:
    """Of a job whose workers get no folder of the driver's on their import path.

    Ray would add the current folder, unless the job brings a working folder along.
    """
    from ray.job_config import JobConfig

    class ClosedJobConfig(JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return ClosedJobConfig()


def clear_token_cache() -> None:
    """Ray's native half reads a token once per process; each Ray of our own has another."""
    native: Any = importlib.import_module("ray._raylet")
    native.AuthenticationTokenLoader.instance().reset_cache()


def describe_ended_process() -> str | None:
    """Which of Ray's essential processes on this machine has ended, and how; None while all run."""
    import ray._private.worker as worker

    node = worker._global_node
    for name, process in node.dead_processes() if node is not None else ():
        if name in ESSENTIAL_PROCESSES:
            return f"its {name} {describe_exit_code(process.returncode)}"
    return None


def describe_exit_code(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
