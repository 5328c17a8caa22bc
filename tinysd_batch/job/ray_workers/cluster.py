"""Start a local Ray on this machine or join a cluster, and leave nothing behind at the end."""

import atexit
import contextlib
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job.ray_workers.bounded_calls import BoundedCaller, RayLostError
from tinysd_batch.job.ray_workers.local_ray import (
    INLINE_HINT,
    LocalRay,
    check_loopback,
    clear_token_cache,
    describe_ended_process,
    make_isolated_job_config,
)
from tinysd_batch.job.ray_workers.ray_log import LOGGING_OPTIONS, RayLog

LOCAL_ADDRESS, AUTO_ADDRESS = "local", "auto"
CONNECT_TIMEOUT_S = 10.0
JOIN_TIMEOUT_S = 60.0  # a cluster whose head node hangs accepts the connection and never answers
STOP_TIMEOUT_S = 40.0
FIRST_TASK_TIMEOUT_S = 60.0  # Ray may have to start a process for it
JOIN_HINT = "the driver needs the cluster's token (~/.ray/auth_token), and a `ray start` on its own machine"
START_HINT = "start one with `ray start`, see configs/clusters/ssh.sh"
HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_DETAIL_PATTERN = re.compile(r"Worker exit detail: (.+?)(?:\. Some common causes|$)", re.MULTILINE)
USER_ERROR_PATTERN = re.compile(r"tinysd_batch\.errors\.(?:ModelError|UsageError): (.*)")
NOISE_PREFIXES = ("File ", "ray::", "^", "The actor", "class_name", "actor_id", "pid:", "namespace:", "ip:", "name:")
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
}
LOCAL_RAY_ENVIRONMENT = {
    # Ray would end this process a minute after its gcs_server, even if another one has been started since.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
    # Each failed health check of a raylet takes 13 s: with Ray's default of 5, a hang is noticed after over a minute.
    "RAY_health_check_failure_threshold": "3",
}


class RaySession:
    """This process's connection to Ray: a local Ray that only it can use, or the cluster at `options["address"]`."""

    def __init__(self, options: dict[str, Any], log: Path | None = None) -> None:
        self.options = options
        self.address: str = options.get("address", LOCAL_ADDRESS)
        self.log = RayLog(log)
        self.call = BoundedCaller()
        self.local_ray: LocalRay | None = None
        self.node_id = ""  # of this machine

    @property
    def is_local(self) -> bool:
        return self.address == LOCAL_ADDRESS

    def start(self) -> None:
        """Start or join Ray. Raises NoWorkerError if that is not possible."""
        if self.is_local:
            check_loopback()
        else:
            check_reachable(self.address)
        allows_open_cluster = os.environ.get("RAY_AUTH_MODE", "token") != "token"  # set by the user
        ray = import_ray(RAY_ENVIRONMENT | LOCAL_RAY_ENVIRONMENT if self.is_local else RAY_ENVIRONMENT)
        self.log.open()
        try:
            with keep_signal_handlers():
                self.connect_to_ray(ray)
            if not self.is_local and not allows_open_cluster:
                self.check_requires_token(ray)
        except BaseException:
            self.stop()
            raise

    def connect_to_ray(self, ray: Any) -> None:
        shared_options = {**LOGGING_OPTIONS, "job_config": make_isolated_job_config()}
        local_options: dict[str, Any] = {}
        # Ray must not import files from the current folder.
        environment: contextlib.AbstractContextManager[None] = contextlib.chdir("/")
        if self.is_local:
            self.local_ray = LocalRay()
            local_options, environment = self.local_ray.init_options(), self.local_ray.ray_environment()
        else:
            restrict_token_file()
        clear_token_cache()
        try:
            with environment:
                self.init_ray(ray, local_options | shared_options | self.options)
        except Exception as error:
            raise NoWorkerError(describe_connect_error(self.address, error)) from error
        if self.local_ray is not None:
            self.local_ray.notify_started()
        self.node_id = ray.get_runtime_context().get_node_id()

    def init_ray(self, ray: Any, options: dict[str, Any]) -> None:
        """Call `ray.init` with a timeout. The reaper enforces that of a local Ray."""
        if self.is_local:
            ray.init(**options)
        else:
            self.call(lambda: ray.init(**options), JOIN_TIMEOUT_S)

    def check_requires_token(self, ray: Any) -> None:
        """Raise NoWorkerError if the cluster runs code for anyone who can reach its ports."""
        reference = ray.remote(num_cpus=0)(lambda: os.environ.get("RAY_AUTH_MODE")).remote()
        try:
            mode = self.call(lambda: ray.get(reference, timeout=FIRST_TASK_TIMEOUT_S), 2 * FIRST_TASK_TIMEOUT_S)
        except Exception as error:
            reason = f"no worker process starts on it: {summarize_ray_error(error)}"
            raise NoWorkerError(f"--address {self.address}: {reason}") from error
        if mode != "token":
            raise NoWorkerError(
                f"--address {self.address}: this cluster runs code for anyone who can reach it; restart it with "
                f"RAY_AUTH_MODE=token, as configs/clusters/ssh.sh does, or set RAY_AUTH_MODE=disabled here, too"
            )

    def check_alive(self) -> None:
        """Raise RayLostError if a process has ended that Ray itself would wait for."""
        if self.is_local and (description := describe_ended_process()):
            raise RayLostError(f"Ray on this machine has stopped: {description}")

    def rotate_log_if_large(self) -> None:
        self.log.rotate_if_large()

    def list_nodes(self) -> list[dict[str, Any]]:
        """Return the cluster's nodes, as `ray.nodes()` does. Raises RayLostError."""
        import ray

        self.check_alive()
        nodes: list[dict[str, Any]] = self.call(ray.nodes)
        if not any(node["Alive"] for node in nodes if node["NodeID"] == self.node_id):
            raise RayLostError(
                "Ray on this machine has stopped: its raylet does not answer"
                if self.is_local
                else "this machine has left the cluster, which ended its workers; run `ray start` to join again"
            )
        return nodes

    def stop(self, is_lost: bool = False) -> None:
        """Stop the local Ray, or leave the cluster.

        Args:
            is_lost: Ray does not answer, so that its processes must be killed first.
        """
        import ray

        try:
            if is_lost and self.local_ray is not None:
                self.local_ray.stop_processes()
            self.call(ray.shutdown, STOP_TIMEOUT_S)
        except RayLostError:
            atexit.unregister(ray.shutdown)  # it would wait for the call that hangs
        finally:
            if self.local_ray is not None:
                self.local_ray.close()
                self.local_ray = None
            self.call.abandon_thread()
            self.log.close()


def start_ray(options: dict[str, Any], log: Path | None = None) -> RaySession:
    """Start or join Ray. Raises NoWorkerError if that is not possible."""
    session = RaySession(options, log)
    session.start()
    return session


def import_ray(variables: dict[str, str]) -> Any:
    """Import Ray with environment variables set, unless the user has set them."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    is_first_import = "ray" not in sys.modules
    import ray
    import ray._private.ray_constants as constants

    if not is_first_import:  # Ray reads the variables only once, when it is imported
        ray._raylet.Config.initialize("")
    constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # under `uv run`, workers would get a copy of the current folder
    logging.getLogger("ray").setLevel(logging.WARNING)
    return ray


def check_reachable(address: str) -> None:
    """Raise NoWorkerError at once if nothing listens at the address. Ray would retry for two minutes."""
    if address == AUTO_ADDRESS:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NoWorkerError(f"--address {address}: no cluster answers there: {reason}; {START_HINT}") from None


@contextlib.contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Restore our signal handlers: Ray installs its own, which abort the process on SIGTERM.

    Processes that Ray starts in the meantime ignore SIGHUP forever. A closed terminal sends it to all processes, and
    the driver is to stop cleanly then.
    """
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminals = [stream for stream in (0, 1, 2) if os.isatty(stream)]
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not all(os.isatty(stream) for stream in terminals):  # one was closed in the meantime, and its SIGHUP ignored
            signal.raise_signal(signal.SIGHUP)


def describe_connect_error(address: str, error: Exception) -> str:
    """Say why Ray could not be started or joined, and what to do."""
    line = summarize_ray_error(error)
    if address == LOCAL_ADDRESS:
        return f"Ray could not start: {line}; {INLINE_HINT}"
    if "Could not find any running Ray" in line:
        return f"--address {address}: Ray is not running on this machine; {START_HINT}"
    if "token" in line.lower() or "Failed to connect" in line:
        line = f"{line.split('. ')[0]}; {JOIN_HINT}"
    return f"--address {address}: the cluster could not be joined: {line}"


def summarize_ray_error(error: Exception) -> str:
    """Return the most informative line of a Ray error, which has whole tracebacks, or Ray's reason for an exit."""
    text = str(error)
    if detail := EXIT_DETAIL_PATTERN.search(text):
        return f"its process died: {detail[1].strip()}"[:300]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    informative = [line for line in lines if not line.startswith(NOISE_PREFIXES)]
    return (informative[-1] if informative else type(error).__name__)[:300]


def find_user_error(error: Exception) -> str | None:
    """Return the message of the ModelError or UsageError that caused a Ray error, if one did."""
    match = USER_ERROR_PATTERN.search(str(error))
    return match[1].strip() if match else None


def restrict_token_file() -> None:
    """Make Ray's token file readable by its owner only. Ray creates it readable by all users."""
    with contextlib.suppress(OSError, RuntimeError):  # there is no home folder, or it is read-only
        token = Path.home() / ".ray" / "auth_token"
        if token.stat().st_uid == os.getuid():
            token.chmod(0o600)
