"""Start the command line quickly: fork it from a process that has imported torch, diffusers and the package already.

A fresh `python -m tinysd_batch submit` spends three seconds of processor time on imports, most tests of it a tenth of
that on work. `ForkedProcess` is a `subprocess.Popen` whose process comes from a fork server instead, one for each
pytest worker. It is a child of the test's own process, with its own standard streams, folder and environment, so that
exit codes, signals, stops and kills are what they would be. What is decided when an interpreter or a library loads
(`OMP_NUM_THREADS`, `PYTHONPATH`, a locale) is not: such tests need a fresh process, see `tools.start`.

The server is this file, run as a module. It has one thread and has run nothing on several: a fork would lose the
others, and OpenMP's pool would wait for them forever.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

MODULE = [sys.executable, "-m", "tinysd_batch"]  # the one command that is forked
LARGEST_REQUEST = 1 << 20
PR_SET_CHILD_SUBREAPER = 36
AT_START = dict(os.environ)  # before any test changes it


# In the test's process


class ForkServer:
    """The client's side: start a server, ask it for processes. The server ends when this process does."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_REQUEST)
        self.lock = threading.Lock()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=ROOT,
                env={**AT_START, "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.receive()  # that all is imported

    def receive(self) -> int:
        answer = self.socket.recv(64)
        if not answer:
            raise ChildProcessError("the fork server ended; its messages are on stderr")
        return int(answer)

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """Start a process and return its id."""
        with self.lock, adopting_orphans():
            socket.send_fds(self.socket, [json.dumps(request).encode()], streams)
            return self.receive()


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer()


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """While this holds, a process below us whose parent ends becomes our child."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class ForkedProcess(subprocess.Popen[Any]):
    """`subprocess.Popen` for `python -m tinysd_batch ...`, forked. Takes no `preexec_fn`, `pass_fds` or `user`."""

    def _execute_child(self, *values: Any) -> None:
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *values).arguments  # type: ignore[attr-defined]
        arguments = [os.fspath(word) for word in given["args"]]
        if arguments[: len(MODULE)] != MODULE:
            raise ValueError(f"only {' '.join(MODULE)} can be forked")
        if given["preexec_fn"] or given["pass_fds"]:
            raise ValueError("a process with preexec_fn or pass_fds cannot be forked")
        streams = [given[name] if given[name] != -1 else number for number, name in enumerate(STREAMS)]
        request = {
            "arguments": arguments,
            "folder": os.fspath(given["cwd"] or Path.cwd()),
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "session": given["start_new_session"],
            "group": given["process_group"],
            "umask": current_umask(),
        }
        try:
            self.pid = fork_server().fork(request, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(*(given[name] for name in PIPES))  # type: ignore[attr-defined]


STREAMS = ("p2cread", "c2pwrite", "errwrite")
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
# Variables that are read when they are needed, not when something is loaded.
READ_LATE = {"COLUMNS", "LINES", "TERM", "NO_COLOR", "CUDA_VISIBLE_DEVICES", "PYTEST_CURRENT_TEST"}
SET_BY_LIBRARIES = {"TORCHINDUCTOR_CACHE_DIR", "RAY_CLIENT_MODE"}  # while they load, in the server as well


def comparable(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in READ_LATE | SET_BY_LIBRARIES}


def is_forkable(environment: Mapping[str, str]) -> bool:
    """Return whether the server's libraries would have loaded alike in this environment."""
    return comparable(environment) == comparable(AT_START)


def current_umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


# In the server


def preload() -> None:
    """Import all of the package, and what it imports inside its functions."""
    for file in (ROOT / "tinysd_batch").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith("__main__"):
            importlib.import_module(name.removesuffix(".__init__"))
    gc.collect()
    gc.freeze()


def next_request(door: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork a process for each request. Return in the forked ones, with the request; or with None at the end."""
    door.send(b"0")
    while True:
        data, streams, _, _ = socket.recv_fds(door, LARGEST_REQUEST, len(STREAMS))
        if not data:
            return None
        if threading.active_count() > 1:
            raise RuntimeError(f"threads that a fork would lose: {threading.enumerate()}")
        pid = fork_orphan()
        if not pid:
            return json.loads(data), list(streams)
        for stream in streams:
            os.close(stream)
        door.send(str(pid).encode())


def fork_orphan() -> int:
    """Fork a process whose parent has ended, so that the client adopts it. Return 0 in it, its id in the server."""
    reading, writing = os.pipe()
    between = os.fork()
    if not between:
        pid = os.fork()
        if not pid:
            os.close(reading)
            os.close(writing)
            return 0
        os.write(writing, str(pid).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(between, 0)
    with os.fdopen(reading) as file:
        return int(file.read())


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Turn this process into what `subprocess` would have started."""
    if request["session"]:
        os.setsid()
    elif request["group"] is not None and request["group"] >= 0:
        os.setpgid(0, request["group"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    os.umask(request["umask"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    open_streams()
    reseed()
    sys.path[0] = request["folder"]
    sys.orig_argv = request["arguments"]
    sys.argv = request["arguments"][len(MODULE) - 1 :]


def open_streams() -> None:
    """The interpreter's own, as it would open them on these files."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        before = getattr(sys, name)
        file = open(  # noqa: SIM115
            number, "wb" if number else "rb", buffering=0 if before.write_through else -1, closefd=False
        )
        by_line = name == "stderr" or os.isatty(number)
        stream = io.TextIOWrapper(
            file, before.encoding, before.errors, line_buffering=by_line, write_through=before.write_through
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def reseed() -> None:
    """Python's generator is seeded anew by the fork, torch's is the same in every process; numpy's is not."""
    import numpy as np

    np.random.seed()  # noqa: NPY002


def serve(door: socket.socket) -> bool:
    """Return True in a process that is to run the command line, False in the server when it is over."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and with them the server
    found = next_request(door)
    if found is None:
        return False
    door.close()
    signal.signal(signal.SIGINT, interrupt)
    become(*found)
    return True


def run_program() -> None:
    """Run the command line as `python -m` does; end as the interpreter does, but for one thing.

    Tearing down modules would copy every page that holds one of their objects, at ten times the cost of the fork.
    """
    try:
        runpy.run_module("tinysd_batch", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = 0 if end.code is None else end.code
        if not isinstance(code, int):
            raise
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # a pipe that nobody reads, or a stream that is closed
            raise end from None
        os._exit(code & 0xFF)


if __name__ == "__main__":
    preload()
    if serve(socket.socket(fileno=int(sys.argv[1]))):
        run_program()
