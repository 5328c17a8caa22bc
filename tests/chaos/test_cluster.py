"""A farm of several machines, all of them here: nodes of a real Ray cluster leave and join while a job runs."""

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.paths import ROOT
from tests.support.program import environment

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

PRELUDE = """
    import sys
    import time
    from dataclasses import replace
    from pathlib import Path

    from ray.cluster_utils import Cluster

    from tests.support.stub_model import Silent, TrivialPool
    from tinysd_batch.config import Settings
    from tinysd_batch.errors import NoWorkerError
    from tinysd_batch.job.driver import run_job
    from tinysd_batch.job.state.open_job import open_job
    from tinysd_batch.job.workers.inline_pool import WorkerReady
    from tinysd_batch.job.workers.worker import WorkerSetup

    class Told(Silent):
        def report_worker(self, event):
            told.append((time.monotonic(), event))
            print(event, flush=True)

        def report_image(self, request, result):
            made.append(request.index)
            meddle(len(made))

    def meddle(pictures):
        pass

    class Pool(TrivialPool):
        def wait_for_workers(self, timeout_s, now):
            super().wait_for_workers(timeout_s, now)
            if comes_late and now - self.had_workers_at > 5:
                cluster.add_node(**comes_late.pop())

    def pool(wait_s=60.0, **change):
        setup = WorkerSetup.of(
            job.settings, job.model, job_folder=job.folder.resolve(), scratch=job.scratch.resolve(),
            stop_file=job.stop_file.resolve(),
        )
        where = {"address": cluster.address, "object_store_memory": None, "include_dashboard": None}
        return Pool(replace(setup, **change), None, 0.1, ray_init=where, worker_wait_s=wait_s)

    def run(**options):
        return run_job(job, lambda _: pool(**options), Told(), lambda: False)

    made, told, added, comes_late = [], [], [], []
    job = open_job(Path("m.csv"), Path("job"), Settings(height=64, width=64, seed=1))
"""

# Nodes can be added in the main thread only, which is the driver's.
LEAVE_AND_JOIN = """
    def meddle(pictures):
        if pictures == 20:
            cluster.remove_node(first, allow_graceful=False)
            print("one node gone", flush=True)
        if pictures == 60:
            cluster.add_node(num_cpus=1, num_gpus=2)
            added.append(time.monotonic())

    if __name__ == "__main__":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        first = cluster.add_node(num_cpus=1, num_gpus=1)
        cluster.add_node(num_cpus=1, num_gpus=1)
        print(run().counts)
        joined = [at for at, event in told if isinstance(event, WorkerReady)][-1]
        print(f"JOINED after {joined - added[0]:.1f} s")
        cluster.shutdown()
"""

NOBODY = """
    if __name__ == "__main__":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        try:
            run(wait_s=6.0, device="cuda")
        except NoWorkerError as error:
            print(f"NOBODY: {error}")
        comes_late.append({"num_cpus": 1, "num_gpus": 1})
        print(run(wait_s=60.0, device="cuda").counts)
        cluster.shutdown()
"""


def on_cluster(folder: Path, script: str) -> str:
    (folder / "script.py").write_text(textwrap.dedent(PRELUDE) + textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=350, check=False,
        env=environment(PYTHONPATH=str(ROOT), RAY_AUTH_MODE="token"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_node_dies_another_joins_and_nobody_is_charged(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": f"p{number}"} for number in range(400)])
    out = on_cluster(tmp_path, LEAVE_AND_JOIN)
    rows = check_whole(tmp_path / "job", 400)
    assert {row["status"] for row in rows} == {"ok"}
    assert "fault=<Fault.NODE_LOST" in out
    assert "for_good=True" in out
    drawn_by = {row["worker"] for row in rows}  # None: the file was found after its worker was lost
    assert drawn_by - {None} == {f"{platform.node()}/cuda-{number}" for number in range(4)}
    print([line for line in out.splitlines() if line.startswith("JOINED")])


def test_without_cards_a_cluster_is_waited_for(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": f"p{number}"} for number in range(10)])
    out = on_cluster(tmp_path, NOBODY)
    assert "NOBODY: no worker is left for 6 s: the cluster has no GPU" in out
    assert {row["status"] for row in check_whole(tmp_path / "job", 10)} == {"ok"}
