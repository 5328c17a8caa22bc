"""A Ray of our own: where its files are, how long it may take to start, and where its text goes."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.program import environment, run
from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job.ray_workers import reaper
from tinysd_batch.job.ray_workers.bounded_calls import BoundedCaller, RayLostError
from tinysd_batch.job.ray_workers.local_ray import describe_exit_code
from tinysd_batch.job.ray_workers.temp_folder import (
    FOLDER_PREFIX,
    MAX_SOCKET_PATH_BYTES,
    SOCKET_PATH_BYTES,
    create_temp_folder,
    remove_stale_folders,
)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for Ray's files."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def test_rays_folder_is_short_closed_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 40)))
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = create_temp_folder()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.token_file.stat().st_mode) == 0o600
    assert len(os.fsencode(folder.path)) - len("/r") + SOCKET_PATH_BYTES <= MAX_SOCKET_PATH_BYTES
    assert [path.name for path in folder.packages_folder.iterdir()] == ["tinysd_batch"]
    folder.close()
    assert not folder.path.exists()


def test_folders_whose_owner_died_are_removed_and_nothing_else(place: Path) -> None:
    stale, used = create_temp_folder(), create_temp_folder()
    stale.lock_file.close()  # as the end of a process does
    others = [place / f"{FOLDER_PREFIX}mine", place / f"{FOLDER_PREFIX}data"]
    others[0].mkdir()
    others[1].symlink_to(others[0])
    (others[0] / "owner").write_text("somebody else")
    remove_stale_folders(place)
    assert not stale.path.exists()
    assert used.path.exists()
    assert all(other.exists() for other in others)
    used.close()


@pytest.mark.parametrize(
    ("named", "reason"),
    [("/x" * 40, "Ray's sockets need"), ("here", "not an absolute path"), ("/nonexistent", "no such")],
)
def test_a_folder_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, named: str, reason: str) -> None:
    monkeypatch.setenv("RAY_TMPDIR", named)
    with pytest.raises(NoWorkerError, match=f"{named}: .*{reason}.*--inline"):
        create_temp_folder()


def without_network(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no right to make a network namespace")
    return subprocess.run(
        ["unshare", "-n", *command], capture_output=True, text=True, check=False, env=environment(**more)
    )


def test_without_a_loopback_ray_is_not_started() -> None:
    script = "from tinysd_batch.job.ray_workers.local_ray import check_loopback; check_loopback()"
    done = without_network(sys.executable, "-c", script)
    assert "NoWorkerError: Ray could not start: 127.0.0.1 cannot be reached on this machine" in done.stderr
    assert "--inline" in done.stderr


def test_a_start_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    (tmp_path / "session").mkdir()
    guarding = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, "word", str(tmp_path / "session"), "0.2"], stdin=subprocess.PIPE
    )
    started = subprocess.Popen(["sleep", "60"], env=environment(**{reaper.MARK_VARIABLE: "word"}))
    assert started.wait(timeout=30) == -signal.SIGKILL
    assert guarding.poll() is None, "it watches on"
    guarding.communicate()
    assert not (tmp_path / "session").exists()


def test_a_call_that_hangs_is_given_up_and_the_next_one_works() -> None:
    call = BoundedCaller()
    with pytest.raises(RayLostError, match="did not answer"):
        call(lambda: time.sleep(30), 0.05)
    assert call(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 // 0)


def test_how_a_process_ended() -> None:
    assert describe_exit_code(-9) == "was ended by SIGKILL"
    assert describe_exit_code(1) == "ended with code 1"


OUTPUT = """
    import logging, os, sys
    from pathlib import Path
    from tinysd_batch.job import job_log
    from tinysd_batch.job.ray_workers import ray_log
    import ray._private.worker as worker

    job_log.MAX_LOG_BYTES = ray_log.MAX_LOG_BYTES = 1000
    output = ray_log.RayLog(Path(sys.argv[1]))
    output.open()
    os.write(2, b"native\\n")
    worker.print_to_stdstream({"lines": ["state dump"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    logging.getLogger("ray.x").warning("its Python half")
    print("for people", file=sys.stderr)
    os.write(2, b"x" * 2000)
    output.rotate_if_large()
    os.write(2, b"new")
    output.close()
    print("after", file=sys.stderr)
    os.write(2, b"at last\\n")
"""


def test_text_of_ray_goes_to_the_log_and_ours_to_the_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OUTPUT), tmp_path / "job.log"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "for people\nafter\nat last\n")
    old = (tmp_path / "job.log.1").read_text()
    assert old.startswith("native\nstate dump\n")
    assert "WARNING ray.x: its Python half" in old
    assert (tmp_path / "job.log").read_text() == "new"


def shared_places() -> dict[str, float]:
    """Where a Ray of any user's leaves files by itself, and when that was changed."""
    found = [*Path("/tmp").glob("ray*"), Path.home() / ".ray"]
    return {str(path): path.stat().st_mtime for path in found if path.exists()}


@pytest.mark.slow
def test_a_job_leaves_nothing_outside_its_folder(tmp_path: Path, tiny_model: Path) -> None:
    """Neither in shared folders nor at home, be TMPDIR as long as on a cluster of Slurm."""
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    long = tmp_path / ("x" * 100)
    home = tmp_path / "home"
    for folder in (long, home):
        folder.mkdir()
    before = shared_places()
    done = run(
        "submit", "m.csv", "--model", tiny_model, "-o", "job", "--workers", 1, cwd=tmp_path, TMPDIR=str(long),
        HOME=str(home),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shared_places() == before
    assert not (home / ".ray").exists()
    assert not [path for path in long.iterdir() if "ray" in path.name]


@pytest.mark.slow
def test_without_a_loopback_submit_ends_in_one_line(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    words = ["submit", str(tmp_path / "m.csv"), "-o", str(tmp_path / "job"), "--model", str(tiny_model)]
    done = without_network(sys.executable, "-m", "tinysd_batch", *words)
    assert done.returncode == 6
    assert len(done.stderr.splitlines()) == 1
    assert "--inline" in done.stderr


HANGING = """
    import time
    from tinysd_batch.errors import NoWorkerError
    from tinysd_batch.job.ray_workers import local_ray
    from tinysd_batch.job.ray_workers.cluster import start_ray

    local_ray.RAY_START_TIMEOUT_S = 6.0
    try:
        start_ray({})
    except NoWorkerError as error:
        print("REFUSED", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_start_that_hangs_is_bounded(tmp_path: Path, name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HANGING)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env=environment(),
    )  # fmt: skip
    stopped: list[psutil.Process] = []
    while not stopped and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        stopped = [child for child in children if child.name() == name]
        time.sleep(0.01)
    stopped[0].suspend()
    out, err = process.communicate(timeout=120)
    assert out.startswith("REFUSED Ray could not start: "), out + err
    assert "--inline" in out
    assert len((out + err).splitlines()) == 1, out + err
    assert not psutil.pid_exists(stopped[0].pid)


@pytest.mark.slow
def test_closed_standard_streams_are_no_fault(tmp_path: Path, tiny_model: Path) -> None:
    """Else a file that is opened later would get descriptor 2, and Ray's text."""
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    words = f"{sys.executable} -m tinysd_batch submit m.csv -o job --model {tiny_model} --workers 1 >&- 2>&-"
    done = subprocess.run(["sh", "-c", words], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 0
    check_whole(tmp_path / "job", 1)
