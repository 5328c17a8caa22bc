"""Nodes of a real Ray cluster leave and join while a job runs. All of them are on this machine."""

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

    from tests.support.models.stub_model import SilentProgress, StubRayPool
    from tinysd_batch.settings.schema import Settings
    from tinysd_batch.errors import NoWorkerError
    from tinysd_batch.job.driver import run_job
    from tinysd_batch.job.state.open_job import open_job
    from tinysd_batch.job.workers.pool import WorkerReady
    from tinysd_batch.job.workers.worker import WorkerSetup

    class EventRecorder(SilentProgress):
        def report_worker(self, event):
            events.append((time.monotonic(), event))
            print(event, flush=True)

        def report_image(self, request, result):
            generated.append(request.index)
            on_image(len(generated))

    def on_image(count):
        pass

    class Pool(StubRayPool):
        def wait_for_workers(self, timeout_s, now):
            super().wait_for_workers(timeout_s, now)
            if late_nodes and now - self.had_workers_at > 5:
                cluster.add_node(**late_nodes.pop())

    def make_pool(wait_s=60.0, **change):
        setup = WorkerSetup.from_settings(
            replace(job.settings, **change), job.model, job_folder=job.folder.resolve(), scratch=job.scratch.resolve(),
            stop_file=job.stop_file.resolve(),
        )
        ray_init = {"address": cluster.address, "object_store_memory": None, "include_dashboard": None}
        return Pool(setup, None, 0.1, ray_init=ray_init, worker_wait_s=wait_s)

    def run(**options):
        return run_job(job, lambda _: make_pool(**options), EventRecorder(), lambda: False)

    generated, events, added_at, late_nodes = [], [], [], []
    job = open_job(Path("m.csv"), Path("job"), {"height": 64, "width": 64, "seed": 1})
"""

# Nodes can only be added in the main thread, which is the driver's.
LEAVE_AND_JOIN = """
    def on_image(count):
        if count == 20:
            cluster.remove_node(first, allow_graceful=False)
            print("one node gone", flush=True)
        if count == 60:
            cluster.add_node(num_cpus=1, num_gpus=2)
            added_at.append(time.monotonic())

    if __name__ == "__main__":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        first = cluster.add_node(num_cpus=1, num_gpus=1)
        cluster.add_node(num_cpus=1, num_gpus=1)
        print(run().counts)
        last_ready_at = [at for at, event in events if isinstance(event, WorkerReady)][-1]
        print(f"JOINED after {last_ready_at - added_at[0]:.1f} s")
        cluster.shutdown()
"""

NO_GPU = """
    if __name__ == "__main__":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        try:
            run(wait_s=6.0, device="cuda")
        except NoWorkerError as error:
            print(f"REFUSED: {error}")
        late_nodes.append({"num_cpus": 1, "num_gpus": 1})
        print(run(wait_s=60.0, device="cuda").counts)
        cluster.shutdown()
"""


def run_on_cluster(folder: Path, script: str) -> str:
    (folder / "script.py").write_text(textwrap.dedent(PRELUDE) + textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=350,
        check=False,
        env=environment(PYTHONPATH=str(ROOT), RAY_AUTH_MODE="token"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_node_dies_and_another_joins(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": f"p{number}"} for number in range(400)])
    out = run_on_cluster(tmp_path, LEAVE_AND_JOIN)
    rows = check_whole(tmp_path / "job", 400)
    assert {row["status"] for row in rows} == {"ok"}
    assert "fault=<FaultType.NODE_LOST" in out
    assert "is_permanent=True" in out
    workers = {row["worker"] for row in rows}  # None: the file was adopted after its worker was lost
    assert workers - {None} == {f"{platform.node()}/cuda-{number}" for number in range(4)}
    print([line for line in out.splitlines() if line.startswith("JOINED")])


def test_a_cluster_without_gpus_is_waited_for(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": f"p{number}"} for number in range(10)])
    out = run_on_cluster(tmp_path, NO_GPU)
    assert "REFUSED: no worker is left for 6 s: the cluster has no GPU" in out
    assert {row["status"] for row in check_whole(tmp_path / "job", 10)} == {"ok"}
