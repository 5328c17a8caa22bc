"""A local Ray: where its files are, how long it may take to start, and where its output goes."""

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
def parent_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short path, for Ray's files."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def test_the_folder_is_short_private_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_folders_whose_owner_died_are_removed_and_nothing_else(parent_folder: Path) -> None:
    stale, active = create_temp_folder(), create_temp_folder()
    stale.lock_file.close()  # as the end of a process does
    others = [parent_folder / f"{FOLDER_PREFIX}mine", parent_folder / f"{FOLDER_PREFIX}data"]
    others[0].mkdir()
    others[1].symlink_to(others[0])
    (others[0] / "owner").write_text("another program")
    remove_stale_folders(parent_folder)
    assert not stale.path.exists()
    assert active.path.exists()
    assert all(other.exists() for other in others)
    active.close()


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/x" * 40, "Ray's sockets allow"), ("here", "not an absolute path"), ("/nonexistent", "no such")],
)
def test_an_unusable_folder_is_named(monkeypatch: pytest.MonkeyPatch, folder: str, reason: str) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(NoWorkerError, match=f"{folder}: .*{reason}.*--inline"):
        create_temp_folder()


def run_without_network(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces cannot be created by this user")
    return subprocess.run(
        ["unshare", "-n", *command], capture_output=True, text=True, check=False, env=environment(**more)
    )


def test_without_a_loopback_interface_ray_is_not_started() -> None:
    script = "from tinysd_batch.job.ray_workers.local_ray import check_loopback; check_loopback()"
    done = run_without_network(sys.executable, "-c", script)
    assert "NoWorkerError: Ray could not start: 127.0.0.1 cannot be reached on this machine" in done.stderr
    assert "--inline" in done.stderr


def test_the_reaper_kills_a_start_that_takes_too_long(tmp_path: Path) -> None:
    (tmp_path / "session").mkdir()
    reaper_process = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, "mark", str(tmp_path / "session"), "0.2"], stdin=subprocess.PIPE
    )
    marked = subprocess.Popen(["sleep", "60"], env=environment(**{reaper.MARK_VARIABLE: "mark"}))
    assert marked.wait(timeout=30) == -signal.SIGKILL
    assert reaper_process.poll() is None, "it continues to wait for the driver's end"
    reaper_process.communicate()
    assert not (tmp_path / "session").exists()


def test_a_call_that_hangs_times_out_and_the_next_one_works() -> None:
    call = BoundedCaller()
    with pytest.raises(RayLostError, match="did not answer"):
        call(lambda: time.sleep(30), 0.05)
    assert call(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 // 0)


def test_exit_codes_are_described() -> None:
    assert describe_exit_code(-9) == "was ended by SIGKILL"
    assert describe_exit_code(1) == "ended with code 1"


OUTPUT = """
    import logging, os, sys
    from pathlib import Path
    from tinysd_batch.job import job_log
    from tinysd_batch.job.ray_workers import ray_log
    import ray._private.worker as worker

    job_log.MAX_LOG_BYTES = ray_log.MAX_LOG_BYTES = 1000
    log = ray_log.RayLog(Path(sys.argv[1]))
    log.open()
    os.write(2, b"native\\n")
    worker.print_to_stdstream({"lines": ["state dump"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    logging.getLogger("ray.x").warning("Python code")
    print("for the user", file=sys.stderr)
    os.write(2, b"x" * 2000)
    log.rotate_if_large()
    os.write(2, b"new")
    log.close()
    print("after", file=sys.stderr)
    os.write(2, b"at last\\n")
"""


def test_rays_output_goes_to_the_log_and_ours_to_the_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OUTPUT), tmp_path / "job.log"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "for the user\nafter\nat last\n")
    old = (tmp_path / "job.log.1").read_text()
    assert old.startswith("native\nstate dump\n")
    assert "WARNING ray.x: Python code" in old
    assert (tmp_path / "job.log").read_text() == "new"


def read_default_folder_times() -> dict[str, float]:
    """Return the folders in which any Ray leaves files by default, with their modification times."""
    folders = [*Path("/tmp").glob("ray*"), Path.home() / ".ray"]
    return {str(path): path.stat().st_mtime for path in folders if path.exists()}


@pytest.mark.slow
def test_a_job_leaves_nothing_outside_its_folder(tmp_path: Path, tiny_model: Path) -> None:
    """Neither in shared folders nor at home, even if TMPDIR is as long as on a Slurm cluster."""
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    long_folder = tmp_path / ("x" * 100)
    home = tmp_path / "home"
    for folder in (long_folder, home):
        folder.mkdir()
    before = read_default_folder_times()
    done = run(
        "submit",
        "m.csv",
        "--model",
        tiny_model,
        "-o",
        "job",
        "--workers",
        1,
        cwd=tmp_path,
        TMPDIR=str(long_folder),
        HOME=str(home),
    )
    assert done.returncode == 0, done.stderr
    assert read_default_folder_times() == before
    assert not (home / ".ray").exists()
    assert not [path for path in long_folder.iterdir() if "ray" in path.name]


@pytest.mark.slow
def test_without_a_loopback_interface_submit_prints_one_line(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    arguments = ["submit", str(tmp_path / "m.csv"), "-o", str(tmp_path / "job"), "--model", str(tiny_model)]
    done = run_without_network(sys.executable, "-m", "tinysd_batch", *arguments)
    assert done.returncode == 6
    assert len(done.stderr.splitlines()) == 1
    assert "--inline" in done.stderr


HANGING_START = """
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
def test_a_start_that_hangs_times_out(tmp_path: Path, name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HANGING_START)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    suspended: list[psutil.Process] = []
    while not suspended and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        suspended = [child for child in children if child.name() == name]
        time.sleep(0.01)
    suspended[0].suspend()
    out, err = process.communicate(timeout=120)
    assert out.startswith("REFUSED Ray could not start: "), out + err
    assert "--inline" in out
    assert len((out + err).splitlines()) == 1, out + err
    assert not psutil.pid_exists(suspended[0].pid)


@pytest.mark.slow
def test_standard_streams_may_be_closed(tmp_path: Path, tiny_model: Path) -> None:
    """Otherwise a file that is opened later would get descriptor 2, and with it Ray's output."""
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    shell_command = f"{sys.executable} -m tinysd_batch submit m.csv -o job --model {tiny_model} --workers 1 >&- 2>&-"
    done = subprocess.run(["sh", "-c", shell_command], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 0
    check_whole(tmp_path / "job", 1)
