"""Faults of every type, in real processes with a scripted model (`tests.chaos.scripted_job`)."""

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


def run_scripted_job(folder: Path, *options: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.chaos.scripted_job", "m.csv", "job", *map(str, options)],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), **env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def start_scripted_job(folder: Path, *options: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.scripted_job", "m.csv", "job", *map(str, options)],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def write_manifest(folder: Path, prompts: list[str]) -> None:
    write_csv(folder / "m.csv", [{"prompt": prompt} for prompt in prompts])


def make_prompts(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


def get_failures(rows: list[dict[str, Any]]) -> dict[int, tuple[str, str]]:
    return {row["index"]: (row["status"], row["error_class"]) for row in rows if row["status"] != "ok"}


def wait_for_images(job: Path, goal: int) -> None:
    deadline = time.monotonic() + 120
    while len(list((job / "images").rglob("seed_*"))) < goal:
        assert time.monotonic() < deadline, "no image was written"
        time.sleep(0.05)


def test_a_poison_row_on_the_only_worker(tmp_path: Path) -> None:
    """It kills its worker each time. The other rows are generated, and the worker is replaced."""
    write_manifest(tmp_path, ["poison", *make_prompts(11)])
    done = run_scripted_job(tmp_path, "--workers", 1)
    assert done.returncode == 3, done.stdout + done.stderr
    assert get_failures(check_whole(tmp_path / "job", 12)) == {1: ("quarantined", "worker_died")}
    assert done.stdout.count(f"Worker {platform.node()}/cpu-0: lost (its process died: ") == 3
    assert "not restarted" not in done.stdout


def test_only_the_poison_row_among_quick_ones_is_suspected(tmp_path: Path) -> None:
    """Results of quick images are sent together. Those not sent when the worker dies are adopted from their files."""
    write_manifest(tmp_path, [*make_prompts(20), "poison", *make_prompts(20)])
    done = run_scripted_job(tmp_path, "--workers", 1, SCRIPTED_JOB_COUNT=str(tmp_path / "count"))
    assert done.returncode == 3, done.stdout + done.stderr
    rows = check_whole(tmp_path / "job", 41)
    assert get_failures(rows) == {21: ("quarantined", "worker_died")}
    assert {row["attempts"] for row in rows if row["status"] == "ok"} == {1}
    trials = (tmp_path / "count").stat().st_size - 40 - 3
    assert 0 <= trials <= 3, "a good image before each new attempt of a suspect"


def test_a_job_with_only_a_poison_row(tmp_path: Path) -> None:
    write_manifest(tmp_path, ["poison"])
    done = run_scripted_job(tmp_path, "--workers", 1)
    assert done.returncode == 3, done.stdout + done.stderr
    assert get_failures(check_whole(tmp_path / "job", 1)) == {1: ("quarantined", "worker_died")}


def test_one_row_in_a_hundred_raises(tmp_path: Path) -> None:
    prompts = [f"raise {number}" if number % 100 == 37 else f"p{number}" for number in range(10_000)]
    write_manifest(tmp_path, prompts)
    done = run_scripted_job(tmp_path, "--seconds", 0)
    assert done.returncode == 3, done.stdout + done.stderr
    rows = check_whole(tmp_path / "job", 10_000)
    assert Counter(row["status"] for row in rows) == {"ok": 9900, "failed": 100}
    for row in rows:
        assert (row["status"] == "failed") == row["prompt"].startswith("raise")
        assert row["error_message"] == (row["prompt"] if row["status"] == "failed" else None)


@pytest.mark.parametrize("script", ["assert once", "hang once"])
def test_a_worker_that_breaks_or_hangs_is_replaced(tmp_path: Path, script: str) -> None:
    write_manifest(tmp_path, [*make_prompts(5), f"{script} {tmp_path / 'marker'}", *make_prompts(6)])
    done = run_scripted_job(tmp_path, "--workers", 1, "--hang-timeout", 8)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = check_whole(tmp_path / "job", 12)
    assert not get_failures(rows)
    assert rows[5]["attempts"] == 2
    assert ("device-side assert" if script == "assert once" else "no answer for 8 s") in done.stdout


def test_a_machine_short_of_memory_loses_a_worker_and_no_image(tmp_path: Path) -> None:
    """Ray's memory monitor kills a worker. The machine goes on with one fewer."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 3e9) / memory.total
    write_manifest(tmp_path, [*make_prompts(20), f"allocate once {tmp_path / 'marker'}", *make_prompts(200)])
    done = run_scripted_job(
        tmp_path, "--seconds", 0.05, RAY_memory_usage_threshold=f"{threshold:.3f}", RAY_memory_monitor_refresh_ms="100"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not get_failures(check_whole(tmp_path / "job", 221))
    assert "it is not restarted" in done.stdout


def test_a_machine_too_small_for_its_only_worker_ends_the_run(tmp_path: Path) -> None:
    """The memory monitor kills that worker again and again."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 3e9) / memory.total
    write_manifest(tmp_path, [f"allocate once {tmp_path / str(number)}" for number in range(20)])
    done = run_scripted_job(
        tmp_path, "--workers", 1, RAY_memory_usage_threshold=f"{threshold:.3f}", RAY_memory_monitor_refresh_ms="100"
    )
    assert done.returncode == 6, done.stdout + done.stderr
    assert "no worker is left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_worker_on_other_storage_generates_nothing(tmp_path: Path) -> None:
    write_manifest(tmp_path, make_prompts(10))
    done = run_scripted_job(tmp_path, SCRIPTED_JOB_SCRATCH=str(tmp_path / "apart"))
    assert done.returncode == 6, done.stdout + done.stderr
    assert "put the job on storage that all machines share" in done.stderr
    assert not list((tmp_path / "job").rglob("seed_*"))


def kill_child(process: subprocess.Popen[str], name: str) -> None:
    """Kill a process that Ray started for the driver, as soon as it exists."""
    deadline = time.monotonic() + 60
    while True:
        descendants = psutil.Process(process.pid).children(recursive=True)
        if matches := [child for child in descendants if child.name() == name]:
            matches[0].kill()
            matches[0].wait()
            return
        assert time.monotonic() < deadline, f"there is no {name}"
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_ray_itself_dies_and_the_job_goes_on(tmp_path: Path, name: str) -> None:
    """As if the kernel's out-of-memory killer chose it. Ray itself would wait forever, or end the driver."""
    write_manifest(tmp_path, make_prompts(300))
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as ray_folder:
        process = start_scripted_job(tmp_path, "--seconds", 0.1, RAY_TMPDIR=ray_folder)
        wait_for_images(tmp_path / "job", 20)
        kill_child(process, name)
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
        assert not list(Path(ray_folder).iterdir()), "the files of both are removed"
    assert not get_failures(check_whole(tmp_path / "job", 300))
    (lost,) = [line for line in out.splitlines() if "stopped" in line]
    assert lost.startswith(f"Ray on this machine has stopped: its {name} was ended by SIGKILL; it was started again")
    assert not [line for line in out.splitlines() if "state-dump" in line or "(raylet)" in line or ": lost" in line]


def test_a_ray_that_dies_three_times_ends_the_run_and_the_job_can_be_resumed(tmp_path: Path) -> None:
    write_manifest(tmp_path, make_prompts(2000))
    process = start_scripted_job(tmp_path, "--seconds", 0.1)
    children: list[psutil.Process] = []
    for goal in (20, 60, 100):
        wait_for_images(tmp_path / "job", goal)
        children += psutil.Process(process.pid).children(recursive=True)
        kill_child(process, "raylet")
    killed_at = time.monotonic()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 6, out
    assert time.monotonic() - killed_at < 60
    assert "for the third time; run the same command again to resume" in out.splitlines()[-1]
    assert not psutil.wait_procs(children, timeout=30)[1]
    done = run_scripted_job(tmp_path, "--seconds", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not get_failures(check_whole(tmp_path / "job", 2000))


def mount(folder: Path, size: str) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False, capture_output=True
    )
    return done.returncode == 0


def test_a_disk_that_fills_during_the_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount(disk, "1m"):
        pytest.skip("file systems can only be mounted by root")
    try:
        write_manifest(disk, make_prompts(400))
        done = run_scripted_job(disk, "--seconds", 0)
        assert done.returncode == 5, done.stdout + done.stderr
        assert "No space left on device; make room" in done.stderr
        assert not list(disk.rglob(".tmp-*"))
        images = list((disk / "job" / "images").rglob("seed_*"))
        assert len(images) > 50
        assert all(path.stat().st_size > 500 for path in images)
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        done = run_scripted_job(disk, "--seconds", 0)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not get_failures(check_whole(disk / "job", 400))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LATE_WRITER = """
    import os, signal, sys
    from pathlib import Path
    from tinysd_batch.storage.atomic import publish

    data, path, scratch, stops = sys.argv[1].encode(), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "stops"
    link = os.link

    def stop_and_link(*arguments, **options):
        os.kill(os.getpid(), signal.SIGSTOP)
        link(*arguments, **options)

    os.link = stop_and_link if stops else link
    print(publish(data, path, scratch, lambda existing: existing.startswith(b"same")).decode())
"""


def test_a_worker_that_writes_late_changes_no_file(tmp_path: Path) -> None:
    """One is stopped after writing its image and before publishing it. Another publishes, then the first continues."""
    (tmp_path / "write.py").write_text(textwrap.dedent(LATE_WRITER))
    paths = [tmp_path / "images" / "x", tmp_path / "tmp"]

    def write(data: str, behaviour: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, tmp_path / "write.py", data, *map(str, paths), behaviour],
            env=environment(PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            text=True,
        )

    late = write("same, late", "stops")
    while psutil.Process(late.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.05)
    first = write("same, first", "continues")
    assert first.communicate(timeout=60)[0] == "same, first\n"
    late.send_signal(signal.SIGCONT)
    assert late.communicate(timeout=60)[0] == "same, first\n"
    assert (tmp_path / "images" / "x").read_text() == "same, first"
    assert not list((tmp_path / "tmp").iterdir())


def test_a_driver_that_was_suspended_kills_no_worker(tmp_path: Path) -> None:
    """A closed laptop lid, or Ctrl-Z: the driver is stopped for longer than the hang timeout."""
    write_manifest(tmp_path, make_prompts(300))
    process = start_scripted_job(tmp_path, "--seconds", 0.1, "--hang-timeout", 5)
    wait_for_images(tmp_path / "job", 10)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(40)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "no answer" not in out
    assert not get_failures(check_whole(tmp_path / "job", 300))


def read_files(job: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(job).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in job.rglob("*")
        if path.is_file()
    }


def test_a_stopped_driver_whose_job_was_taken_over_writes_nothing(tmp_path: Path) -> None:
    write_manifest(tmp_path, make_prompts(100))
    first = start_scripted_job(tmp_path, "--seconds", 0.2)
    wait_for_images(tmp_path / "job", 10)
    stop_between_writes(first, tmp_path / "job")
    refused = run_scripted_job(tmp_path)
    assert refused.returncode == 4
    assert f"process {first.pid}" in refused.stderr
    done = run_scripted_job(tmp_path, "--take-over", "--seconds", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    check_whole(tmp_path / "job", 100)
    before = read_files(tmp_path / "job")
    os.kill(first.pid, signal.SIGCONT)
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 4, out
    assert "has taken this job over; this one writes nothing more" in out
    assert read_files(tmp_path / "job") == before
