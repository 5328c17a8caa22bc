"""Kill workers and drivers at random for as long as it takes, and say how many kills were delivered.

    python -m tests.chaos.soak [--kills 200] [--seed 1]

Jobs run one after the other on four workers; one kill in fifteen or so is the driver's. Each job is run to its end and
checked: every image there once, every hash right, nothing left over, nothing drawn again but what kills had cost.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.chaos.test_injected_faults import manifest, plain
from tests.support.jobs import check_whole
from tests.support.paths import ROOT
from tests.support.program import environment

IMAGES = 600
WORKERS = 4
IMAGE_S = 0.1


class Soak:
    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder = folder
        self.kills = kills
        self.chance = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable, "-m", "tests.chaos.scripted_job", "m.csv", "job", f"--workers={WORKERS}",
                f"--seconds={IMAGE_S}",
            ], cwd=self.folder, env=environment(PYTHONPATH=str(ROOT), FARM_COUNT=str(self.folder / "count")), text=True,
            stdout=(self.folder / "log").open("a"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run_job(self) -> None:
        """One job to its end, however often it takes."""
        before = self.killed.copy()
        manifest(self.folder, plain(IMAGES))
        code = None
        while code not in (0, 3):
            process = self.start()
            self.kill_at_random(process)
            code = process.wait()
            self.ends[str(code)] += 1
        self.check(self.killed - before)

    def kill_at_random(self, process: subprocess.Popen[str]) -> None:
        """Until the job ends, all kills are delivered or the driver is killed itself, with some work between kills."""
        while process.poll() is None and self.killed.total() < self.kills:
            self.wait_for_pictures(process, self.chance.randint(1, 2))
            time.sleep(self.chance.uniform(0.0, 0.3))
            family = relatives(process)
            workers = [one for one in family if is_worker(one)]
            if self.chance.random() < 0.07 and workers and process.poll() is None:
                process.kill()
                self.killed["driver"] += 1
                psutil.wait_procs([one for one in family if "Agent" not in name_of(one)], timeout=30)
            elif workers:
                victim = self.chance.choice(workers)
                victim.kill()
                self.killed["worker"] += 1

    def wait_for_pictures(self, process: subprocess.Popen[str], more: int) -> None:
        goal = self.pictures() + more
        while process.poll() is None and self.pictures() < goal:
            time.sleep(0.02)

    def pictures(self) -> int:
        return len(list((self.folder / "job").glob("images/*/seed_*")))

    def check(self, kills: Counter[str]) -> None:
        rows = check_whole(self.folder / "job", IMAGES)
        drawn = (self.folder / "count").stat().st_size
        assert drawn <= IMAGES + 2 * kills["worker"] + WORKERS * kills["driver"] + len(rows) // 100, drawn
        self.ends["quarantined"] += sum(row["status"] == "quarantined" for row in rows)
        self.ends["drawn again"] += drawn - IMAGES
        for path in sorted(self.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def relatives(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        children: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []
    return children


def name_of(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def is_worker(process: psutil.Process) -> bool:
    try:
        return "ray::CursedProcess" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    started, jobs = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), given.kills, given.seed)
        while soak.killed.total() < given.kills:
            soak.run_job()
            jobs += 1
            minutes = (time.monotonic() - started) / 60
            print(f"{minutes:.0f} min: {jobs} jobs whole, kills {dict(soak.killed)}, {dict(soak.ends)}", flush=True)
    print(
        f"{soak.killed.total()} kills delivered ({dict(soak.killed)}) over {jobs} jobs of {IMAGES} images; "
        f"each job whole in the end: every image there once, every hash right, nothing left over"
    )


if __name__ == "__main__":
    main()
