"""A local Ray on this machine that only this process can use, and that ends with it."""

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

OBJECT_STORE_BYTES = 80 * 2**20  # only small records are sent; Ray's default would take a third of the memory
RAY_START_TIMEOUT_S = 60.0  # then its processes are killed, and Ray itself gives up within half a minute
REAPER_TIMEOUT_S = 30.0
LOOPBACK = "127.0.0.1"
LOOPBACK_TIMEOUT_S = 5.0
INLINE_HINT = "`--inline` runs the job in this process, without Ray"
ESSENTIAL_PROCESSES = ("raylet", "gcs_server")  # if one of them ends, Ray waits forever
# Each names another Ray, or makes Ray load code or settings from elsewhere.
FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_AUTH_TOKEN", "RAY_TMPDIR")


class LocalRay:
    """The folder and the reaper of one local Ray, from before it starts until all of it is removed."""

    def __init__(self) -> None:
        """Create the folder and start the reaper. Raises NoWorkerError if there is no usable folder."""
        self.folder: RayTempFolder = create_temp_folder()
        self.driver_mark = uuid.uuid4().hex
        lock = self.folder.lock_file.fileno()  # inherited, so that the folder is locked for as long as the reaper runs
        arguments = [self.driver_mark, str(self.folder.path), str(RAY_START_TIMEOUT_S)]
        command = [sys.executable, "-I", "-S", reaper.__file__, *arguments]
        self.reaper_process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, start_new_session=True, cwd="/", pass_fds=(lock,)
        )

    def init_options(self) -> dict[str, Any]:
        """Return options of `ray.init`. Without an address, Ray would join any cluster that it finds on the machine."""
        return {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self.folder.ray_temp_dir),
        }

    @contextlib.contextmanager
    def ray_environment(self) -> Iterator[None]:
        """Set what Ray's processes inherit: mark, current folder, and an import path without the user's folder."""
        import_path = [*select_absolute_entries(os.environ.get("PYTHONPATH", "")), str(self.folder.packages_folder)]
        variables = {
            reaper.MARK_VARIABLE: self.driver_mark,
            "PYTHONPATH": os.pathsep.join(import_path),
            "RAY_AUTH_TOKEN_PATH": str(self.folder.token_file),
        }
        before = {name: os.environ.get(name) for name in (*variables, *FOREIGN_VARIABLES)}
        current_folder = os.open(".", os.O_PATH)
        try:
            for name in FOREIGN_VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(variables)
            os.chdir(self.folder.packages_folder)
            yield
        finally:
            os.fchdir(current_folder)
            os.close(current_folder)
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def notify_started(self) -> None:
        """Notify the reaper that Ray has started, so that it does not kill the processes."""
        with contextlib.suppress(BrokenPipeError):
            self.reaper_process.stdin.write(b"started\n")  # type: ignore[union-attr]
            self.reaper_process.stdin.flush()  # type: ignore[union-attr]

    def stop_processes(self) -> None:
        """Make the reaper kill Ray's remaining processes and remove the folder, and wait for it."""
        if self.reaper_process.poll() is not None:
            return
        try:
            self.reaper_process.communicate(timeout=REAPER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.reaper_process.kill()

    def close(self) -> None:
        self.stop_processes()
        self.folder.close()  # Ray in this process may have written to it since


def check_loopback() -> None:
    """Raise NoWorkerError if Ray's processes could not reach each other. They would retry for a quarter of an hour."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_TIMEOUT_S).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NoWorkerError(
            f"Ray could not start: {LOOPBACK} cannot be reached on this machine: {reason}; {INLINE_HINT}"
        ) from None


def make_isolated_job_config() -> Any:
    """Return the config of a job whose workers have no folder of the driver on their import path.

    Ray adds the current folder unless the job has a working directory. The config claims to have one.
    """
    from ray.job_config import JobConfig

    class IsolatedJobConfig(JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return IsolatedJobConfig()


def clear_token_cache() -> None:
    """Make Ray's native code read the token again. It reads it once per process, but each local Ray has its own."""
    native: Any = importlib.import_module("ray._raylet")
    native.AuthenticationTokenLoader.instance().reset_cache()


def describe_ended_process() -> str | None:
    """Say which of the local Ray's essential processes has ended, and how. None if all are running."""
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
