"""Real kills of real processes: whatever dies, every image is there once in the end."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.tools import check_whole, command, environment, read_results, run, write_csv

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]
IMAGES = 24


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Enough work that a kill finds it unfinished: 12 rows of 2, slow by many steps."""
    return write_csv(tmp_path / "m.csv", [{"prompt": f"p{n}", "n_samples": 2, "steps": 60} for n in range(IMAGES // 2)])


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


@pytest.mark.parametrize("mode", ["--inline", "--workers=2"])
def test_a_driver_killed_three_times(manifest: Path, tmp_path: Path, tiny_model: Path, mode: str) -> None:
    seed = random.randrange(10**6)
    print(f"kill seed {seed}")
    draw = random.Random(seed)
    job = tmp_path / "job"
    kills = 0
    for goal in (2, 8, 14):
        process = start(tmp_path, tiny_model, mode)
        wait_for_pictures(job, goal, process)
        pause_within_an_image(job, draw)
        children = family(process) if process.poll() is None else []
        kills += process.poll() is None
        process.kill()
        process.communicate()
        assert_gone(children)
    assert kills == 3, "the job was too quick to be killed three times"
    last = run("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline", cwd=tmp_path)
    assert last.returncode == 0, last.stdout + last.stderr
    check_whole(job, IMAGES)


def test_a_worker_killed_while_it_draws(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    job = tmp_path / "job"
    process = start(tmp_path, tiny_model, "--workers=2")
    killed = 0
    for goal in (3, 9):
        wait_for_pictures(job, goal, process)
        random.choice([child for child in family(process) if is_worker(child)]).kill()
        killed += 1
    out, _ = process.communicate(timeout=300)
    assert killed == 2
    assert process.returncode == 0, out
    assert "lost" in out
    rows = check_whole(job, IMAGES)
    assert all(row["status"] == "ok" for row in rows)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("mode", ["--inline", "--workers=2"])
def test_a_signal_stops_cleanly_and_the_job_goes_on(
    manifest: Path, tmp_path: Path, tiny_model: Path, mode: str, sent: signal.Signals, code: int
) -> None:
    job = tmp_path / "job"
    process = start(tmp_path, tiny_model, mode)
    wait_for_pictures(job, 3, process)
    children = family(process)
    # To the whole process group, as a terminal's Ctrl-C does.
    os.killpg(process.pid, sent)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert "To go on:\n  tinysd-batch submit " in out
    assert_gone(children)
    done = len(read_results(job))
    assert done >= 3
    assert done == pictures(job)
    last = run("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline", cwd=tmp_path)
    assert last.returncode == 0
    check_whole(job, IMAGES)


def test_two_drivers_at_once(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    first = start(tmp_path, tiny_model, "--inline")
    wait_for_pictures(tmp_path / "job", 1, first)
    second = run("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline", cwd=tmp_path)
    assert second.returncode == 4
    assert f"process {first.pid}" in second.stderr
    told = run("status", "job", cwd=tmp_path)
    assert "running" in told.stdout
    first.kill()
    first.communicate()
