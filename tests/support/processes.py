"""Start a job in a process of its own, watch it and kill it."""

import random
import statistics
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import psutil

from tests.support.program import command, environment

IMAGES = 24


def start_submit(folder: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("submit", "m.csv", "--model", model, "-o", "job", "--seed", "1", *more),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def count_images(job: Path) -> int:
    return len(list((job / "images").rglob("seed_*"))) if (job / "images").exists() else 0


def wait_for_images(job: Path, goal: int, process: subprocess.Popen[str]) -> None:
    """Wait until the job has `goal` images or the process has ended. Fail after two minutes."""
    deadline = time.monotonic() + 120
    while count_images(job) < goal and process.poll() is None:
        assert time.monotonic() < deadline, "no image was written"
        time.sleep(0.02)


def sleep_part_of_an_image(job: Path, rng: random.Random) -> None:
    """Sleep for a random part of the time that the latest images took, so that no machine is too fast for the test.

    The median ignores the pause between two runs.
    """
    written = sorted(path.stat().st_mtime for path in (job / "images").rglob("seed_*"))[-5:]
    durations_s = [later - earlier for earlier, later in pairwise(written)]
    time.sleep(rng.random() * statistics.median(durations_s or [0.0]))


def list_descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
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
