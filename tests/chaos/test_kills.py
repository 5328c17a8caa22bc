"""Kill real processes: whichever dies, every image exists once at the end."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.support.files import write_csv
from tests.support.jobs import check_whole, read_results
from tests.support.processes import (
    IMAGES,
    assert_gone,
    count_images,
    is_worker,
    list_descendants,
    sleep_part_of_an_image,
    start_submit,
    wait_for_images,
)
from tests.support.program import run

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest with enough work to be killed before its end: 12 rows of 2 images, with many steps."""
    return write_csv(tmp_path / "m.csv", [{"prompt": f"p{n}", "n_samples": 2, "steps": 60} for n in range(IMAGES // 2)])


@pytest.mark.parametrize("mode", ["--inline", "--workers=2"])
def test_a_driver_killed_three_times(manifest: Path, tmp_path: Path, tiny_model: Path, mode: str) -> None:
    seed = random.randrange(10**6)
    print(f"kill seed {seed}")
    rng = random.Random(seed)
    job = tmp_path / "job"
    kills = 0
    for goal in (2, 8, 14):
        process = start_submit(tmp_path, tiny_model, mode)
        wait_for_images(job, goal, process)
        sleep_part_of_an_image(job, rng)
        children = list_descendants(process) if process.poll() is None else []
        kills += process.poll() is None
        process.kill()
        process.communicate()
        assert_gone(children)
    assert kills == 3, "the job was too quick to be killed three times"
    last = run("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline", cwd=tmp_path)
    assert last.returncode == 0, last.stdout + last.stderr
    check_whole(job, IMAGES)


def test_a_worker_killed_while_it_generates(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    job = tmp_path / "job"
    process = start_submit(tmp_path, tiny_model, "--workers=2")
    killed = 0
    for goal in (3, 9):
        wait_for_images(job, goal, process)
        random.choice([child for child in list_descendants(process) if is_worker(child)]).kill()
        killed += 1
    out, _ = process.communicate(timeout=300)
    assert killed == 2
    assert process.returncode == 0, out
    assert "lost" in out
    rows = check_whole(job, IMAGES)
    assert all(row["status"] == "ok" for row in rows)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("mode", ["--inline", "--workers=2"])
def test_a_signal_stops_cleanly_and_the_job_can_be_resumed(
    manifest: Path, tmp_path: Path, tiny_model: Path, mode: str, sent: signal.Signals, code: int
) -> None:
    job = tmp_path / "job"
    process = start_submit(tmp_path, tiny_model, mode)
    wait_for_images(job, 3, process)
    children = list_descendants(process)
    # The whole process group gets it, as by Ctrl-C in a terminal.
    os.killpg(process.pid, sent)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert "To resume:\n  tinysd-batch submit " in out
    assert_gone(children)
    done = len(read_results(job))
    assert done >= 3
    assert done == count_images(job)
    last = run("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline", cwd=tmp_path)
    assert last.returncode == 0
    check_whole(job, IMAGES)


def test_two_drivers_at_once(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    first = start_submit(tmp_path, tiny_model, "--inline")
    wait_for_images(tmp_path / "job", 1, first)
    second = run("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline", cwd=tmp_path)
    assert second.returncode == 4
    assert f"process {first.pid}" in second.stderr
    status = run("status", "job", cwd=tmp_path)
    assert "running" in status.stdout
    first.kill()
    first.communicate()
