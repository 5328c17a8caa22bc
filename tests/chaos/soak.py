"""Kill workers and drivers at random until a number of kills is reached, and report the result.

    python -m tests.chaos.soak [--kills 200] [--seed 1]

Jobs run one after the other on four workers. About one kill in fifteen is the driver's. Each job is run until it is
finished and then checked: every image exists once, every hash is right, nothing is left over, and no more images were
generated again than the kills had interrupted.
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

from tests.chaos.test_injected_faults import make_prompts, write_manifest
from tests.support.jobs import check_whole
from tests.support.paths import ROOT
from tests.support.program import environment

IMAGES = 600
WORKERS = 4
IMAGE_S = 0.1
OPTIONS = (f"--workers={WORKERS}", f"--seconds={IMAGE_S}")


class Soak:
    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder = folder
        self.kills = kills
        self.rng = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.scripted_job", "m.csv", "job", *OPTIONS],
            cwd=self.folder,
            env=environment(PYTHONPATH=str(ROOT), SCRIPTED_JOB_COUNT=str(self.folder / "count")),
            text=True,
            stdout=(self.folder / "log").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run_job(self) -> None:
        """Run one job until it is finished, with as many drivers as that takes."""
        before = self.killed.copy()
        write_manifest(self.folder, make_prompts(IMAGES))
        code = None
        while code not in (0, 3):
            process = self.start()
            self.kill_at_random(process)
            code = process.wait()
            self.outcomes[str(code)] += 1
        self.check(self.killed - before)

    def kill_at_random(self, process: subprocess.Popen[str]) -> None:
        """Kill at random, with work between kills, until the job ends, its driver is killed or all kills are done."""
        while process.poll() is None and self.killed.total() < self.kills:
            self.wait_for_images(process, self.rng.randint(1, 2))
            time.sleep(self.rng.uniform(0.0, 0.3))
            descendants = list_descendants(process)
            workers = [child for child in descendants if is_worker(child)]
            if self.rng.random() < 0.07 and workers and process.poll() is None:
                process.kill()
                self.killed["driver"] += 1
                psutil.wait_procs([child for child in descendants if "Agent" not in get_name(child)], timeout=30)
            elif workers:
                victim = self.rng.choice(workers)
                victim.kill()
                self.killed["worker"] += 1

    def wait_for_images(self, process: subprocess.Popen[str], more: int) -> None:
        goal = self.count_images() + more
        while process.poll() is None and self.count_images() < goal:
            time.sleep(0.02)

    def count_images(self) -> int:
        return len(list((self.folder / "job").glob("images/*/seed_*")))

    def check(self, kills: Counter[str]) -> None:
        rows = check_whole(self.folder / "job", IMAGES)
        generated = (self.folder / "count").stat().st_size
        assert generated <= IMAGES + 2 * kills["worker"] + WORKERS * kills["driver"] + len(rows) // 100, generated
        self.outcomes["quarantined"] += sum(row["status"] == "quarantined" for row in rows)
        self.outcomes["generated again"] += generated - IMAGES
        for path in sorted(self.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def list_descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        children: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []
    return children


def get_name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def is_worker(process: psutil.Process) -> bool:
    try:
        return "ray::ScriptedProcess" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started_at, jobs = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.kills, options.seed)
        while soak.killed.total() < options.kills:
            soak.run_job()
            jobs += 1
            minutes = (time.monotonic() - started_at) / 60
            print(
                f"{minutes:.0f} min: {jobs} jobs finished, kills {dict(soak.killed)}, {dict(soak.outcomes)}", flush=True
            )
    print(
        f"{soak.killed.total()} kills ({dict(soak.killed)}) over {jobs} jobs of {IMAGES} images; "
        f"each job was finished: every image exists once, every hash is right, nothing is left over"
    )


if __name__ == "__main__":
    main()
