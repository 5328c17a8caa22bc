"""Start a job in a process of its own, watch it and kill it."""

import random
import subprocess
import time
from pathlib import Path

import psutil

from tests.support.program import command, environment

IMAGES = 24


def start(folder: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("submit", "m.csv", "--model", model, "-o", "job", "--seed", "1", *more), cwd=folder, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def pictures(job: Path) -> int:
    return len(list((job / "images").rglob("seed_*"))) if (job / "images").exists() else 0


def wait_for_pictures(job: Path, goal: int, process: subprocess.Popen[str]) -> None:
    """Return when so many pictures are there or the process has ended; fail after two minutes."""
    deadline = time.monotonic() + 120
    while pictures(job) < goal and process.poll() is None:
        assert time.monotonic() < deadline, "no picture came"
        time.sleep(0.02)


def pause_within_an_image(job: Path, draw: random.Random) -> None:
    """Sleep for a random part of what the latest images took each, so that no machine is too fast for the test."""
    written = sorted(path.stat().st_mtime for path in (job / "images").rglob("seed_*"))[-5:]
    time.sleep(draw.random() * (written[-1] - written[0]) / (len(written) - 1 or 1))


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return children


def is_worker(process: psutil.Process) -> bool:
    try:
        return "ray::Worker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, [process.name() for process in alive]
