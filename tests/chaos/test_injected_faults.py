"""Faults of every kind, on real processes with a model that obeys (`tests.chaos.scripted_job`)."""

import os
import platform
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.paths import ROOT
from tests.support.program import environment, stop_between_writes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


def farm(folder: Path, *options: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.chaos.scripted_job", "m.csv", "job", *map(str, options)], cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), **env), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def start(folder: Path, *options: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.scripted_job", "m.csv", "job", *map(str, options)], cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def manifest(folder: Path, prompts: list[str]) -> None:
    write_csv(folder / "m.csv", [{"prompt": prompt} for prompt in prompts])


def plain(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


def faults(rows: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    return {row["index"]: (row["status"], row["error_class"]) for row in rows if row["status"] != "ok"}


def wait_for_pictures(job: Path, goal: int) -> None:
    deadline = time.monotonic() + 120
    while len(list((job / "images").rglob("seed_*"))) < goal:
        assert time.monotonic() < deadline, "no picture came"
        time.sleep(0.05)


def test_a_poison_row_on_the_only_card(tmp_path: Path) -> None:
    """It kills its worker each time; the other rows are made, and the card goes on."""
    manifest(tmp_path, ["poison", *plain(11)])
    done = farm(tmp_path, "--workers", 1)
    assert done.returncode == 3, done.stdout + done.stderr
    assert faults(check_whole(tmp_path / "job", 12)) == {1: ("quarantined", "worker_died")}
    assert done.stdout.count(f"Worker {platform.node()}/cpu-0: lost (its process died: ") == 3
    assert "given up" not in done.stdout


def test_a_poison_row_among_quick_ones_is_the_only_one_suspected(tmp_path: Path) -> None:
    """Results of quick pictures travel together: those not told of when the worker dies are found by their files."""
    manifest(tmp_path, [*plain(20), "poison", *plain(20)])
    done = farm(tmp_path, "--workers", 1, FARM_COUNT=str(tmp_path / "count"))
    assert done.returncode == 3, done.stdout + done.stderr
    rows = check_whole(tmp_path / "job", 41)
    assert faults(rows) == {21: ("quarantined", "worker_died")}
    assert {row["attempts"] for row in rows if row["status"] == "ok"} == {1}
    trials = (tmp_path / "count").stat().st_size - 40 - 3
    assert 0 <= trials <= 3, "a good image before each new try of a suspect"


def test_a_job_of_nothing_but_a_poison_row(tmp_path: Path) -> None:
    manifest(tmp_path, ["poison"])
    done = farm(tmp_path, "--workers", 1)
    assert done.returncode == 3, done.stdout + done.stderr
    assert faults(check_whole(tmp_path / "job", 1)) == {1: ("quarantined", "worker_died")}


def test_one_bad_row_in_a_hundred_of_ten_thousand(tmp_path: Path) -> None:
    prompts = [f"raise {number}" if number % 100 == 37 else f"p{number}" for number in range(10_000)]
    manifest(tmp_path, prompts)
    done = farm(tmp_path, "--seconds", 0)
    assert done.returncode == 3, done.stdout + done.stderr
    rows = check_whole(tmp_path / "job", 10_000)
    assert Counter(row["status"] for row in rows) == {"ok": 9900, "failed": 100}
    for row in rows:
        assert (row["status"] == "failed") == row["prompt"].startswith("raise")
        assert row["error_message"] == (row["prompt"] if row["status"] == "failed" else None)


@pytest.mark.parametrize("what", ["assert once", "hang once"])
def test_a_worker_that_breaks_or_hangs_is_replaced_and_its_image_made(tmp_path: Path, what: str) -> None:
    manifest(tmp_path, [*plain(5), f"{what} {tmp_path / 'mark'}", *plain(6)])
    done = farm(tmp_path, "--workers", 1, "--patience", 8)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = check_whole(tmp_path / "job", 12)
    assert not faults(rows)
    assert rows[5]["attempts"] == 2
    assert ("device-side assert" if what == "assert once" else "no answer for 8 s") in done.stdout


def test_a_machine_short_of_memory_loses_a_worker_and_no_image(tmp_path: Path) -> None:
    """Ray's memory monitor ends a worker; the machine goes on with one fewer."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 3e9) / memory.total
    manifest(tmp_path, [*plain(20), f"eat once {tmp_path / 'mark'}", *plain(200)])
    done = farm(
        tmp_path, "--seconds", 0.05, RAY_memory_usage_threshold=f"{threshold:.3f}", RAY_memory_monitor_refresh_ms="100"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not faults(check_whole(tmp_path / "job", 221))
    assert "it is not restarted" in done.stdout


def test_a_machine_too_small_for_its_only_worker_ends_the_run(tmp_path: Path) -> None:
    """The memory monitor ends that worker again and again."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 3e9) / memory.total
    manifest(tmp_path, [f"eat once {tmp_path / str(number)}" for number in range(20)])
    done = farm(
        tmp_path, "--workers", 1, RAY_memory_usage_threshold=f"{threshold:.3f}", RAY_memory_monitor_refresh_ms="100"
    )
    assert done.returncode == 6, done.stdout + done.stderr
    assert "no worker is left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_worker_on_other_storage_draws_nothing(tmp_path: Path) -> None:
    manifest(tmp_path, plain(10))
    done = farm(tmp_path, FARM_APART=str(tmp_path / "apart"))
    assert done.returncode == 6, done.stdout + done.stderr
    assert "put the job on storage that all machines share" in done.stderr
    assert not list((tmp_path / "job").rglob("seed_*"))


def kill_child(process: subprocess.Popen[str], name: str) -> None:
    """Kill a process that Ray started for the driver, once it is there."""
    deadline = time.monotonic() + 60
    while True:
        family = psutil.Process(process.pid).children(recursive=True)
        if found := [child for child in family if child.name() == name]:
            found[0].kill()
            found[0].wait()
            return
        assert time.monotonic() < deadline, f"there is no {name}"
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_ray_itself_dies_and_the_job_goes_on(tmp_path: Path, name: str) -> None:
    """As when the kernel's out-of-memory killer picks it: Ray alone would wait for ever, or end the driver."""
    manifest(tmp_path, plain(300))
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as place:
        process = start(tmp_path, "--seconds", 0.1, RAY_TMPDIR=place)
        wait_for_pictures(tmp_path / "job", 20)
        kill_child(process, name)
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
        assert not list(Path(place).iterdir()), "Ray's files are removed, of both"
    assert not faults(check_whole(tmp_path / "job", 300))
    (lost,) = [line for line in out.splitlines() if "stopped" in line]
    assert lost.startswith(f"Ray on this machine has stopped: its {name} was ended by SIGKILL; it was started again")
    assert not [line for line in out.splitlines() if "state-dump" in line or "(raylet)" in line or ": lost" in line]


def test_a_ray_that_dies_again_and_again_ends_the_run_and_the_job_goes_on_later(tmp_path: Path) -> None:
    manifest(tmp_path, plain(2000))
    process = start(tmp_path, "--seconds", 0.1)
    children: list[psutil.Process] = []
    for goal in (20, 60, 100):
        wait_for_pictures(tmp_path / "job", goal)
        children += psutil.Process(process.pid).children(recursive=True)
        kill_child(process, "raylet")
    killed_at = time.monotonic()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 6, out
    assert time.monotonic() - killed_at < 60
    assert "for the third time; the same command goes on" in out.splitlines()[-1]
    assert not psutil.wait_procs(children, timeout=30)[1]
    done = farm(tmp_path, "--seconds", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not faults(check_whole(tmp_path / "job", 2000))


def mount(folder: Path, size: str) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False, capture_output=True
    )
    return done.returncode == 0


def test_a_disk_that_fills_in_mid_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount(disk, "1m"):
        pytest.skip("file systems can only be mounted by root")
    try:
        manifest(disk, plain(400))
        done = farm(disk, "--seconds", 0)
        assert done.returncode == 5, done.stdout + done.stderr
        assert "No space left on device; make room" in done.stderr
        assert not list(disk.rglob(".tmp-*"))
        there = list((disk / "job" / "images").rglob("seed_*"))
        assert len(there) > 50
        assert all(path.stat().st_size > 500 for path in there)
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        done = farm(disk, "--seconds", 0)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not faults(check_whole(disk / "job", 400))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LATE_WRITER = """
    import os, signal, sys
    from pathlib import Path
    from tinysd_batch.storage.atomic import publish

    data, path, scratch, stops = sys.argv[1].encode(), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "stops"
    link = os.link

    def late(*arguments, **options):
        os.kill(os.getpid(), signal.SIGSTOP)
        link(*arguments, **options)

    os.link = late if stops else link
    print(publish(data, path, scratch, lambda found: found.startswith(b"same")).decode())
"""


def test_a_worker_that_writes_late_changes_no_file(tmp_path: Path) -> None:
    """One is stopped with its picture written and not yet published; another publishes; the first goes on."""
    (tmp_path / "write.py").write_text(textwrap.dedent(LATE_WRITER))
    words = [tmp_path / "images" / "x", tmp_path / "tmp"]

    def write(data: str, how: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, tmp_path / "write.py", data, *map(str, words), how],
            env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    late = write("same, late", "stops")
    while psutil.Process(late.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.05)
    first = write("same, first", "goes on")
    assert first.communicate(timeout=60)[0] == "same, first\n"
    late.send_signal(signal.SIGCONT)
    assert late.communicate(timeout=60)[0] == "same, first\n"
    assert (tmp_path / "images" / "x").read_text() == "same, first"
    assert not list((tmp_path / "tmp").iterdir())


def test_a_driver_that_was_asleep_takes_no_worker_for_hung(tmp_path: Path) -> None:
    """A laptop's lid, or Ctrl-Z: the driver is stopped for longer than any worker may take."""
    manifest(tmp_path, plain(300))
    process = start(tmp_path, "--seconds", 0.1, "--patience", 5)
    wait_for_pictures(tmp_path / "job", 10)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(40)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "no answer" not in out
    assert not faults(check_whole(tmp_path / "job", 300))


def contents(job: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(job).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in job.rglob("*")
        if path.is_file()
    }


def test_a_stopped_driver_whose_job_was_taken_over_writes_nothing(tmp_path: Path) -> None:
    manifest(tmp_path, plain(100))
    old = start(tmp_path, "--seconds", 0.2)
    wait_for_pictures(tmp_path / "job", 10)
    stop_between_writes(old, tmp_path / "job")
    refused = farm(tmp_path)
    assert refused.returncode == 4
    assert f"process {old.pid}" in refused.stderr
    done = farm(tmp_path, "--take-over", "--seconds", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    check_whole(tmp_path / "job", 100)
    before = contents(tmp_path / "job")
    os.kill(old.pid, signal.SIGCONT)
    out, _ = old.communicate(timeout=120)
    assert old.returncode == 4, out
    assert "has taken this job over; this one writes nothing more" in out
    assert contents(tmp_path / "job") == before
