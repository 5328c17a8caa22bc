"""Start the command line quickly by forking a process that has already imported torch, diffusers and the package.

A fresh `python -m tinysd_batch submit` spends three seconds of CPU time on imports; most tests need a tenth of that for
their work. `ForkedProcess` is a `subprocess.Popen` whose process comes from a fork server instead, one for each pytest
worker. It is a child of the test process, with its own standard streams, folder and environment, so that exit codes,
signals, stops and kills work as usual. Variables that are read when an interpreter or a library loads
(`OMP_NUM_THREADS`, `PYTHONPATH`, a locale) have no effect: tests of these need a fresh process, see `program.start`.

The server is this file, run as a module. It must never have more than one thread: a fork would lose the other threads,
and OpenMP's pool would wait for them forever.
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

MODULE = [sys.executable, "-m", "tinysd_batch"]  # the only command that can be forked
MAX_REQUEST_BYTES = 1 << 20
PR_SET_CHILD_SUBREAPER = 36
START_ENVIRONMENT = dict(os.environ)  # before any test changes it


# Client: the test process


class ForkServer:
    """Starts a server and requests processes from it. The server ends when this process does."""

    def __init__(self) -> None:
        self.socket, server_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST_BYTES)
        self.lock = threading.Lock()
        with server_socket:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(server_socket.fileno())],
                cwd=ROOT,
                env={**START_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
                pass_fds=[server_socket.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.receive()  # the server has imported everything

    def receive(self) -> int:
        """Return the server's response: a process id, or 0 when it is ready."""
        response = self.socket.recv(64)
        if not response:
            raise ChildProcessError("the fork server ended; its messages are on stderr")
        return int(response)

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
    """Within this context, descendants whose parent ends become our children."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class ForkedProcess(subprocess.Popen[Any]):
    """`subprocess.Popen` for `python -m tinysd_batch ...`, forked. Supports no `preexec_fn`, `pass_fds` or `user`."""

    def _execute_child(self, *values: Any) -> None:
        popen_arguments = inspect.signature(subprocess.Popen._execute_child).bind(self, *values).arguments  # type: ignore[attr-defined]
        arguments = [os.fspath(argument) for argument in popen_arguments["args"]]
        if arguments[: len(MODULE)] != MODULE:
            raise ValueError(f"only {' '.join(MODULE)} can be forked")
        if popen_arguments["preexec_fn"] or popen_arguments["pass_fds"]:
            raise ValueError("a process with preexec_fn or pass_fds cannot be forked")
        streams = [
            popen_arguments[name] if popen_arguments[name] != -1 else number for number, name in enumerate(STREAMS)
        ]
        request = {
            "arguments": arguments,
            "folder": os.fspath(popen_arguments["cwd"] or Path.cwd()),
            "environment": dict(os.environ if popen_arguments["env"] is None else popen_arguments["env"]),
            "session": popen_arguments["start_new_session"],
            "group": popen_arguments["process_group"],
            "umask": current_umask(),
        }
        try:
            self.pid = fork_server().fork(request, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(*(popen_arguments[name] for name in PIPES))  # type: ignore[attr-defined]


STREAMS = ("p2cread", "c2pwrite", "errwrite")
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
# Variables that are read on use, not when an interpreter or library loads.
READ_ON_USE = {"COLUMNS", "LINES", "TERM", "NO_COLOR", "CUDA_VISIBLE_DEVICES", "PYTEST_CURRENT_TEST"}
SET_BY_LIBRARIES = {"TORCHINDUCTOR_CACHE_DIR", "RAY_CLIENT_MODE"}  # at import, also in the server


def drop_ignored_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in READ_ON_USE | SET_BY_LIBRARIES}


def is_forkable(environment: Mapping[str, str]) -> bool:
    """Whether the server's libraries would have been loaded in the same way with this environment."""
    return drop_ignored_variables(environment) == drop_ignored_variables(START_ENVIRONMENT)


def current_umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


# Server


def preload() -> None:
    """Import all modules of the package, and the modules that their functions import."""
    for file in (ROOT / "tinysd_batch").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if not name.endswith("__main__"):
            importlib.import_module(name.removesuffix(".__init__"))
    gc.collect()
    gc.freeze()


def wait_for_request(server_socket: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork a process for each request. Return the request in the forked processes, and None when the client ends."""
    server_socket.send(b"0")
    while True:
        data, streams, _, _ = socket.recv_fds(server_socket, MAX_REQUEST_BYTES, len(STREAMS))
        if not data:
            return None
        if threading.active_count() > 1:
            raise RuntimeError(f"threads that a fork would lose: {threading.enumerate()}")
        pid = fork_orphan()
        if not pid:
            return json.loads(data), list(streams)
        for stream in streams:
            os.close(stream)
        server_socket.send(str(pid).encode())


def fork_orphan() -> int:
    """Fork a process whose parent ends at once, so that the client adopts it. Return 0 in it, its id in the server."""
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        pid = os.fork()
        if not pid:
            os.close(reading)
            os.close(writing)
            return 0
        os.write(writing, str(pid).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(parent, 0)
    with os.fdopen(reading) as file:
        return int(file.read())


def become_program(request: dict[str, Any], streams: list[int]) -> None:
    """Turn this process into the one that `subprocess` would have started."""
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
    """Open the standard streams as the interpreter would."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old_stream = getattr(sys, name)
        file = open(  # noqa: SIM115
            number, "wb" if number else "rb", buffering=0 if old_stream.write_through else -1, closefd=False
        )
        is_line_buffered = name == "stderr" or os.isatty(number)
        stream = io.TextIOWrapper(
            file,
            old_stream.encoding,
            old_stream.errors,
            line_buffering=is_line_buffered,
            write_through=old_stream.write_through,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def reseed() -> None:
    """Seed numpy's generator. Python seeds its own after a fork, and torch's is the same in every fresh process."""
    import numpy as np

    np.random.seed()  # noqa: NPY002


def serve(server_socket: socket.socket) -> bool:
    """Return True in a process that shall run the command line, and False in the server at its end."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, which ends the server
    request = wait_for_request(server_socket)
    if request is None:
        return False
    server_socket.close()
    signal.signal(signal.SIGINT, interrupt)
    become_program(*request)
    return True


def run_program() -> None:
    """Run the command line as `python -m` does, and end without tearing down modules.

    The teardown would copy every memory page with an object of theirs, which costs ten times as much as the fork.
    """
    try:
        runpy.run_module("tinysd_batch", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = 0 if error.code is None else error.code
        if not isinstance(code, int):
            raise
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # a broken pipe or a closed stream
            raise error from None
        os._exit(code & 0xFF)


if __name__ == "__main__":
    preload()
    if serve(socket.socket(fileno=int(sys.argv[1]))):
        run_program()
