"""A cluster of several real `ray start` nodes on this machine, started by the script that users get."""

import os
import platform
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.paths import ROOT
from tests.support.processes import is_worker, wait_for_images
from tests.support.program import command, environment, run, run_here
from tinysd_batch.job.ray_workers import reaper

pytestmark = pytest.mark.timeout(600)
BOXES = ("one", "two", "three")
# Replaces ssh: every box is this machine, with a home folder of its own.
FAKE_SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
export HOME="$HOMES/$1"
cd "$HOME" && exec sh -c "$2"
"""


def find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


class Cluster:
    """Three boxes with one logical GPU each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = find_free_port()
        tools = folder / "tools"
        for name in (*(f"homes/{box}" for box in BOXES), "tools"):
            (folder / name).mkdir(parents=True)
        (tools / "ssh").write_text(FAKE_SSH)
        (tools / "ssh").chmod(0o755)

    def environment(self, box: str = BOXES[0]) -> dict[str, str]:
        clean = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
        return {
            **clean,
            "PATH": f"{self.folder / 'tools'}:{os.environ['PATH']}",
            "HOMES": str(self.folder / "homes"),
            "HOME": str(self.folder / "homes" / box),
            "FOLDER": str(self.folder),
            "BIN": str(Path(sys.executable).parent),
            "PORT": str(self.port),
            "PORTS": "",
            "RAY_OPTIONS": "--num-gpus=1 --num-cpus=1",
        }

    def run_script(self, action: str) -> subprocess.CompletedProcess[str]:
        boxes = ["127.0.0.1", *BOXES[1:]]
        return subprocess.run(
            [ROOT / "configs" / "clusters" / "ssh.sh", action, *boxes],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    def start(self) -> None:
        (self.folder / "homes" / "127.0.0.1").symlink_to(self.folder / "homes" / BOXES[0])
        done = self.run_script("start")
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self) -> list[psutil.Process]:
        processes = []
        for process in psutil.process_iter():
            try:
                command_line = " ".join(process.cmdline())
                files = [file.path for file in process.open_files()]
            except psutil.Error:
                continue
            if any(file.startswith(f"{self.folder}/ray") for file in files) or f"{self.folder}/ray" in command_line:
                processes.append(process)
        return processes

    def stop(self) -> None:
        """Kill the processes by ID. `ray stop` would end every Ray on the machine."""
        for process in self.processes():
            process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="c") as folder:  # short, for the paths of Ray's sockets
        running = Cluster(Path(folder))
        try:
            running.start()
            yield running
        finally:
            running.stop()


def submit(cluster: Cluster, cwd: Path, *more: object, box: str = BOXES[0], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("submit", "m.csv", "-o", "job", "--seed", 1, "--address", f"127.0.0.1:{cluster.port}", *more),
        cwd=cwd,
        env=cluster.environment(box) | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_each_box_has_a_worker_of_its_own(cluster: Cluster, tmp_path: Path, tiny_model: Path, device: str) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": f"p{number}", "steps": 40} for number in range(24)])
    for module in ("diffusers", "torch", "ray", "numpy"):  # the current folder must not be on any import path
        (tmp_path / f"{module}.py").write_text("raise SystemExit('executed')")
    process = submit(cluster, tmp_path, "--model", tiny_model, "--device", device)
    parents: dict[str, int] = {}
    while process.poll() is None:
        for candidate in cluster.processes():
            if is_worker(candidate):
                parents[str(candidate.pid)] = candidate.ppid()
        time.sleep(1)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert len({row["worker"] for row in check_whole(tmp_path / "job", 24)}) == 3
    assert len(set(parents.values())) == 3, "a worker below each of the three raylets"
    assert cluster.processes(), "the cluster runs on after the job"


@pytest.mark.alone
@pytest.mark.slow
def test_joining_requires_the_token(cluster: Cluster, tmp_path: Path, tiny_model: Path) -> None:
    for box in BOXES:
        token = cluster.folder / "homes" / box / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert token.read_text() == (cluster.folder / "homes" / BOXES[0] / ".ray" / "auth_token").read_text()
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    process = submit(cluster, tmp_path, "--model", tiny_model, RAY_AUTH_TOKEN="0" * 64)
    out, _ = process.communicate()
    assert process.returncode == 6
    assert "the driver needs the cluster's token" in out.splitlines()[-1]
    assert not [line for line in out.splitlines() if "gcs_client" in line]


@pytest.mark.alone
@pytest.mark.slow
def test_no_dashboard_listens(cluster: Cluster) -> None:
    ports = {
        connection.laddr.port
        for process in cluster.processes()
        for connection in process.net_connections()
        if connection.status == "LISTEN"
    }
    assert cluster.port in ports
    assert 8265 not in ports


@pytest.mark.slow
def test_a_lost_machine_is_reported_in_one_line(cluster: Cluster, tmp_path: Path, tiny_model: Path) -> None:
    """After `kill -9` of a raylet, Ray's dump of its state goes to the job's log."""
    write_csv(tmp_path / "m.csv", [{"prompt": f"p{number}", "steps": 300} for number in range(40)])
    driver = submit(cluster, tmp_path, "--model", tiny_model, "--device", "cpu")
    wait_for_images(tmp_path / "job", 4, driver)
    raylets = [process for process in cluster.processes() if process.name() == "raylet"]
    victim = next(raylet for raylet in raylets if "--head" not in raylet.cmdline())
    victim.kill()
    out, _ = driver.communicate()
    assert driver.returncode == 0, out
    name = re.escape(platform.node())
    lost = [line for line in out.splitlines() if "lost" in line]
    assert len(lost) == 1, out
    assert re.fullmatch(rf"machine {name} is lost(; its \d+ images? goe?s? to other workers)?", lost[0])
    assert all(len(line) < 200 for line in out.splitlines()), out
    rows = check_whole(tmp_path / "job", 40)
    assert {row["status"] for row in rows} == {"ok"}
    assert all(re.fullmatch(rf"{name}/cpu-\d", row["worker"]) for row in rows if row["worker"])


@pytest.mark.alone
@pytest.mark.slow
def test_joining_a_cluster_whose_head_hangs_times_out(cluster: Cluster, tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    head = [process for process in cluster.processes() if process.name() == "gcs_server"]
    assert head
    for process in head:
        process.suspend()
    try:
        out, _ = submit(cluster, tmp_path, "--model", tiny_model).communicate(timeout=150)
    finally:
        for process in head:
            process.resume()
    address = f"127.0.0.1:{cluster.port}"
    assert out.splitlines()[2:] == [
        f"tinysd-batch: --address {address}: the cluster could not be joined: Ray did not answer for 60 s"
    ]


@pytest.mark.slow
def test_stop_ends_this_cluster_and_no_other_ray(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copy(shutil.which("sleep") or "", tmp_path / "raylet")
    others = [
        subprocess.Popen([tmp_path / "raylet", "600"], env=environment(**mark))
        for mark in ({}, {reaper.MARK_VARIABLE: "ssh-1"})
    ]
    try:
        done = cluster.run_script("stop")
        assert done.returncode == 0, done.stderr
        assert not cluster.processes()
        assert not (cluster.folder / "ray").exists()
        assert [other.poll() for other in others] == [None, None]
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    (tmp_path / "homes" / "127.0.0.1").mkdir()
    with socket.create_server(("127.0.0.1", cluster.port)):
        done = cluster.run_script("start")
    assert done.returncode == 1
    message, location = done.stderr.splitlines()
    assert message.startswith(f"port {cluster.port} is taken")
    assert location == "ssh.sh: 127.0.0.1: not ready, nothing was started on any box"
    assert not cluster.processes()
    assert not list((tmp_path / "homes").rglob("auth_token"))


def test_an_address_where_nothing_answers(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    done = run("submit", "m.csv", "--model", tiny_model, "--address", f"127.0.0.1:{find_free_port()}", cwd=tmp_path)
    assert done.returncode == 6
    assert "no cluster answers there: connection refused" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--address", "box"], "auto, local or HOST:PORT was expected"),
        (["--address", "box:99999"], "auto, local or HOST:PORT was expected"),
        (["--address", "ray://box:10001"], "without ray:// before it"),
        (["--address", "box:6379", "--inline"], "--inline and --address box:6379: give one of the two"),
    ],
)
def test_an_invalid_address(tmp_path: Path, tiny_model: Path, options: list[str], message: str) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    done = run_here("submit", "m.csv", "-o", "job", "--model", tiny_model, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "job").exists()


def test_the_reaper_kills_marked_processes_and_no_others() -> None:
    reaper_process = subprocess.Popen([sys.executable, reaper.__file__, "mark"], stdin=subprocess.PIPE)
    marks: tuple[dict[str, str], ...] = ({reaper.MARK_VARIABLE: "mark"}, {reaper.MARK_VARIABLE: "marking"}, {})
    marked, other, unmarked = (subprocess.Popen(["sleep", "60"], env=environment(**mark)) for mark in marks)
    try:
        assert reaper_process.stdin is not None
        reaper_process.stdin.close()  # as the end of the driver does
        assert marked.wait(timeout=30) == -signal.SIGKILL
        assert reaper_process.wait(timeout=30) == 0
        assert (other.poll(), unmarked.poll()) == (None, None)
    finally:
        for process in (reaper_process, marked, other, unmarked):
            process.kill()
            process.wait()


def test_the_script_prints_its_usage() -> None:
    done = subprocess.run([ROOT / "configs/clusters/ssh.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "start miner1 miner2" in done.stdout
