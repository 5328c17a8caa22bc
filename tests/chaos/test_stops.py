"""Every way in which a driver is stopped, and what it leaves behind."""

import fcntl
import os
import platform
import pty
import random
import signal
import stat
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.test_kills import manifest
from tests.support.files import write_csv
from tests.support.jobs import check_whole, read_results
from tests.support.processes import (
    IMAGES,
    count_images,
    list_descendants,
    sleep_part_of_an_image,
    start_submit,
    wait_for_images,
)
from tests.support.program import command, environment, run, run_here, stop_between_writes
from tinysd_batch.job.workers.worker import Worker
from tinysd_batch.records import ImageResult

__all__ = ["manifest"]  # a fixture
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
MODES = pytest.mark.parametrize("mode", ["--inline", "--workers=2"])


def finish(folder: Path, model: Path, *more: str, images: int = IMAGES) -> list[dict[str, Any]]:
    last = run("submit", "m.csv", "--model", model, "-o", "job", "--inline", *more, cwd=folder)
    assert last.returncode == 0, last.stdout + last.stderr
    return check_whole(folder / "job", images)


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for Ray's files. It must be empty at the end."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)
        assert not list(Path(folder).iterdir())


def test_nothing_outlives_a_killed_driver(manifest: Path, ray_folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Without the reaper, Ray's workers would run on for seconds and its agents for a minute."""
    process = start_submit(tmp_path, tiny_model, "--workers=2")
    wait_for_images(tmp_path / "job", 3, process)
    children = list_descendants(process)
    assert {"raylet", "gcs_server"} < {child.name() for child in children}
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in ray_folder.iterdir()] == [0o700]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [child.name() for child in alive]
    finish(tmp_path, tiny_model)


def test_nothing_outlives_a_driver_killed_while_ray_starts(
    manifest: Path, ray_folder: Path, tmp_path: Path, tiny_model: Path
) -> None:
    process = start_submit(tmp_path, tiny_model, "--workers=2")
    children: list[psutil.Process] = []
    while "raylet" not in {child.name() for child in children}:
        children = list_descendants(process)
        time.sleep(0.02)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [child.name() for child in alive]


def start_in_terminal(folder: Path, model: Path, mode: str) -> tuple[subprocess.Popen[bytes], int]:
    """Return a process that leads a session on a terminal of its own, and the terminal's other end."""
    master, slave = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command("submit", "m.csv", "--model", model, "-o", "job", mode),
        cwd=folder,
        env=environment(),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=take_terminal,
    )
    os.close(slave)
    return process, master


@MODES
def test_a_closed_terminal_is_a_clean_stop(manifest: Path, tmp_path: Path, tiny_model: Path, mode: str) -> None:
    process, terminal = start_in_terminal(tmp_path, tiny_model, mode)
    job = tmp_path / "job"
    while count_images(job) < 3:
        assert process.poll() is None
        os.read(terminal, 65536)
    children = list_descendants(process)  # type: ignore[arg-type]
    os.close(terminal)
    assert process.wait(timeout=120) == 129
    assert len(read_results(job)) == count_images(job) >= 3
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert all(row["status"] == "ok" for row in finish(tmp_path, tiny_model))


def test_under_nohup_a_closed_terminal_does_not_stop_the_job(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    process = subprocess.Popen(
        ["nohup", *command("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline")],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_images(tmp_path / "job", 1, process)
    os.killpg(process.pid, signal.SIGHUP)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    check_whole(tmp_path / "job", IMAGES)


@MODES
def test_a_second_ctrl_c_leaves_at_once(manifest: Path, tmp_path: Path, tiny_model: Path, mode: str) -> None:
    """Even while an image is generated. All reported images are in the table, and no process runs on."""
    job = tmp_path / "job"
    quick, endless = (40, 16), (1000, 128)  # steps and side in pixels; the latter takes over a minute
    columns = ("steps", "width", "height")
    sizes = [(steps, side, side) for steps, side in [quick] * 4 + [endless] * 4]
    write_csv(tmp_path / "m.csv", [{"prompt": "p", **dict(zip(columns, size, strict=True))} for size in sizes])
    process = start_submit(tmp_path, tiny_model, mode)
    wait_for_images(job, 4, process)
    children = list_descendants(process)
    time.sleep(3)  # the workers are generating the endless images now
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the first Ctrl-C waits for the image"
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "press Ctrl-C again to exit at once" in out
    assert "Stopped immediately. To resume:\n  tinysd-batch submit " in out
    assert "Traceback" not in out
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert len(read_results(job)) == 4


def test_a_second_driver_names_the_first(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    first = start_submit(tmp_path, tiny_model, "--inline")
    wait_for_images(tmp_path / "job", 1, first)
    second = run("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline", cwd=tmp_path)
    assert second.returncode == 4
    assert f"process {first.pid} on {platform.node()} since 20" in second.stderr
    reuse = run("submit", "m.csv", "--model", tiny_model, "-o", "new", "--reuse", "job", "--inline", cwd=tmp_path)
    assert reuse.returncode == 4
    assert not (tmp_path / "new").exists()
    first.kill()
    first.communicate()


def test_a_suspended_driver_that_lost_its_lock_writes_nothing(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    job = tmp_path / "job"
    first = start_submit(tmp_path, tiny_model, "--inline")
    wait_for_images(job, 2, first)
    stop_between_writes(first, job)
    (job / "_tinysd" / "lock").unlink()
    finish(tmp_path, tiny_model)
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    first.send_signal(signal.SIGCONT)
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 4, out
    assert "has taken this job over; this one writes nothing more" in out
    assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before
    check_whole(job, IMAGES)


def test_failed_images_are_retried_despite_kills(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end each image has one row, whichever run wrote it."""
    write_csv(tmp_path / "m.csv", [{"prompt": f"p{number}", "steps": 30} for number in range(IMAGES)])
    original = Worker.generate_and_publish

    def fail_three_of_four(self: Worker, images: Any, wanted: Any) -> list[ImageResult]:
        if images[0].index % 4:
            raise RuntimeError("injected")
        return original(self, images, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "generate_and_publish", fail_three_of_four)
        done = run_here("submit", "m.csv", "--model", tiny_model, "-o", "job", "--seed", 1, "--inline", cwd=tmp_path)
    assert done.returncode == 3
    job = tmp_path / "job"
    assert count_images(job) == IMAGES // 4
    seed = random.randrange(10**6)
    print(f"kill seed {seed}")
    rng, kills = random.Random(seed), 0
    for more in (2, 4, 4):
        process = start_submit(tmp_path, tiny_model, "--inline", "--retry-failed")
        wait_for_images(job, count_images(job) + more, process)
        sleep_part_of_an_image(job, rng)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills == 3, "the job was too quick to be killed three times"
    rows = finish(tmp_path, tiny_model, "--retry-failed")
    assert all(row["status"] == "ok" for row in rows)
    first_run = [row["index"] for row in rows if row["run_id"] == rows[3]["run_id"]]
    assert first_run == list(range(4, IMAGES + 1, 4)), "successful images were not generated again"
