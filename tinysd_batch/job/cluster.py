"""Ray itself: start one of our own on this machine, or join a cluster, and leave nothing behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job import guardian

OBJECT_STORE_BYTES = 80 * 2**20  # only small records travel; Ray's default would take a third of memory
LOCAL, AUTO = "local", "auto"
CONNECT_S = 10.0
HOW_TO_JOIN = "the driver needs the cluster's token (~/.ray/auth_token), and a `ray start` on its own machine"
HOW_TO_START = "`ray start` starts one, see configs/clusters/ssh.sh"
OUR_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_DETAIL = re.compile(r"Worker exit detail: (.+?)(?:\. Some common causes|$)", re.MULTILINE)
NOT_TELLING = ("File ", "ray::", "^", "The actor", "class_name", "actor_id", "pid:", "namespace:", "ip:", "name:")
guards: list[subprocess.Popen[bytes]] = []


def start_ray(options: dict[str, Any]) -> Any:
    """Start a Ray of our own on this machine, closed to strangers, or join the cluster at `options["address"]`.

    Raises NoWorkerError where that is not possible.
    """
    address = options.get("address", LOCAL)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    wanted_open = os.environ.setdefault("RAY_AUTH_MODE", "token") != "token"  # by the user's own word
    if address != LOCAL:
        check_answers(address)
    knows_mode = "ray" not in sys.modules
    import ray

    if not knows_mode:  # Ray reads the variable on import, and once only
        ray._raylet.Config.initialize("")
    # Without an explicit address Ray joins whatever cluster it finds on the machine.
    own = {"address": LOCAL, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    with our_signals(), guarded() if address == LOCAL else silent_stderr():
        try:
            context = ray.init(**{**(own if address == LOCAL else {}), **quiet, **options})
        except Exception as error:
            stop_guards()
            raise NoWorkerError(why_not(address, error)) from error
        tell_guards(context.address_info["session_dir"])
    protect_token()
    if address != LOCAL and not wanted_open:
        check_closed(address)
    return ray


def check_answers(address: str) -> None:
    """Raise NoWorkerError at once where nothing listens: Ray would try for two minutes."""
    if address == AUTO:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NoWorkerError(f"--address {address}: no cluster answers there: {reason}; {HOW_TO_START}") from None


def check_closed(address: str) -> None:
    """Raise NoWorkerError where the cluster runs code for anybody who reaches its ports."""
    import ray

    mode = ray.get(ray.remote(num_cpus=0)(lambda: os.environ.get("RAY_AUTH_MODE")).remote())
    if mode != "token":
        ray.shutdown()
        raise NoWorkerError(
            f"--address {address}: this cluster runs code for anybody who reaches it; start it anew with "
            f"RAY_AUTH_MODE=token, as configs/clusters/ssh.sh does, or set RAY_AUTH_MODE=disabled here, too"
        )


def stop_ray() -> None:
    import ray

    ray.shutdown()
    stop_guards()


@contextlib.contextmanager
def our_signals() -> Iterator[None]:
    """Keep our handlers: Ray puts in its own, which on SIGTERM aborts the process.

    What Ray starts meanwhile ignores SIGHUP for ever: a closed terminal sends it to all, and ours is a clean stop.
    """
    handlers = {number: signal.getsignal(number) for number in OUR_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminals = [stream for stream in (0, 1, 2) if os.isatty(stream)]
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not all(os.isatty(stream) for stream in terminals):  # closed meanwhile, and its SIGHUP ignored
            signal.raise_signal(signal.SIGHUP)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Ray's C++ half tells of a wrong token twenty times, before its log level can be set."""
    sys.stderr.flush()
    ours = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(ours, 2)
        os.close(ours)
        os.close(nowhere)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Have all processes that are started meanwhile, and theirs, ended when we are no more."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-I", "-S", guardian.__file__, mark]
    guards.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/"))  # noqa: S603
    os.environ[guardian.MARK] = mark
    try:
        yield
    finally:
        del os.environ[guardian.MARK]


def tell_guards(session_folder: str) -> None:
    for guard in guards:
        with contextlib.suppress(BrokenPipeError):
            guard.stdin.write(os.fsencode(session_folder) + b"\n")  # type: ignore[union-attr]
            guard.stdin.flush()  # type: ignore[union-attr]


def stop_guards() -> None:
    """Have what Ray left ended, and wait for that."""
    while guards:
        guard = guards.pop()
        guard.communicate()


def why_not(address: str, error: Exception) -> str:
    """What to do where Ray cannot start or be joined."""
    line = fault_line(error)
    if address == LOCAL:
        return f"Ray could not start: {line}; `--inline` runs the job in this process, without Ray"
    if "Could not find any running Ray" in line:
        return f"--address {address}: no Ray runs on this machine; {HOW_TO_START}"
    if "token" in line.lower() or "Failed to connect" in line:
        line = f"{line.split('. ')[0]}; {HOW_TO_JOIN}"
    return f"--address {address}: the cluster could not be joined: {line}"


def fault_line(error: Exception) -> str:
    """The most telling line of a Ray error, which carries whole tracebacks, or Ray's explanation of a death."""
    text = str(error)
    if detail := EXIT_DETAIL.search(text):
        return f"its process died: {detail[1].strip()}"[:300]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(NOT_TELLING)]
    return (telling[-1] if telling else type(error).__name__)[:300]


def protect_token() -> None:
    """Ray writes its token file readable by everybody; keep it to its owner."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)
