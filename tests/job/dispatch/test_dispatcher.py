"""The dispatcher's decisions, on simulated workers: which images are quarantined, retried, or end the run."""

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.simulator import FaultPlan, SimPool, Simulation, SimWorker
from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.models.stub_model import SilentProgress
from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job import driver
from tinysd_batch.job.workers.faults import FaultType
from tinysd_batch.job.workers.pool import WorkerLost
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Status


class LossRecorder(SilentProgress):
    """Records the losses that are reported to the user."""

    def __init__(self) -> None:
        self.lost: list[WorkerLost] = []

    def report_worker(self, event: Any) -> None:
        if isinstance(event, WorkerLost):
            self.lost.append(event)


def make_simulation(tmp_path: Path, images: int, workers: list[SimWorker], **faults: Any) -> Simulation:
    rows = [{"prompt": f"p{number}", "width": 64} for number in range(images)]
    return Simulation(tmp_path / "job", write_csv(tmp_path / "m.csv", rows), 1, workers, FaultPlan(**faults))


def run_simulation(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, pool: type[SimPool] = SimPool
) -> LossRecorder:
    simulation.patch(monkeypatch)
    progress = LossRecorder()
    driver.run_job(simulation.job(), lambda _: pool(simulation), progress, lambda: False)
    return progress


def read_rows_by_index(simulation: Simulation, images: int) -> dict[int, dict[str, Any]]:
    return {row["index"]: row for row in check_whole(simulation.folder, images)}


@pytest.mark.parametrize("images", [1, 2, 12])
@pytest.mark.parametrize("worker_count", [1, 3])
def test_a_poison_row_is_quarantined_and_no_worker_retired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, worker_count: int
) -> None:
    """Even if it is the first row, the only row, or there is only one worker."""
    simulation = make_simulation(
        tmp_path, images, [SimWorker(f"w{number}", 0.5) for number in range(worker_count)], poison={1}
    )
    progress = run_simulation(simulation, monkeypatch)
    rows = read_rows_by_index(simulation, images)
    assert (rows[1]["status"], rows[1]["error_class"], rows[1]["attempts"]) == ("quarantined", "worker_died", 3)
    assert {row["status"] for index, row in rows.items() if index > 1} <= {"ok"}
    assert len(progress.lost) == 3
    assert not any(event.is_permanent for event in progress.lost)


def test_a_broken_worker_is_retired_and_no_image_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = make_simulation(tmp_path, 200, [SimWorker("good", 0.1), SimWorker("bad", 1.0, is_broken=True)])
    progress = run_simulation(simulation, monkeypatch)
    assert {row["status"] for row in read_rows_by_index(simulation, 200).values()} == {"ok"}
    (retired,) = (event for event in progress.lost if event.is_permanent)
    assert retired.worker == "bad"
    assert "also lost while generating images known to be good" in retired.reason


def test_if_every_worker_is_broken_no_image_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = make_simulation(tmp_path, 1, [SimWorker(f"w{number}", 1.0, is_broken=True) for number in range(4)])
    with pytest.raises(NoWorkerError):
        run_simulation(simulation, monkeypatch)
    assert not (simulation.folder / "results.parquet").exists()


def test_an_image_too_large_for_one_worker_is_generated_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"p{number}", "width": 128 if number % 3 == 0 else 64} for number in range(12)]
    workers = [SimWorker("small", 1.0, is_small=True), SimWorker("large", 0.5)]
    simulation = Simulation(tmp_path / "job", write_csv(tmp_path / "m.csv", rows), 1, workers, FaultPlan())
    tried: list[str] = []
    original = SimPool.generate_one

    def generate_one(self: SimPool, process: SimWorker, image: ImageRequest) -> ImageResult:
        tried.append(process.name if image.settings.width == 128 else "")
        return original(self, process, image)

    monkeypatch.setattr(SimPool, "generate_one", generate_one)
    run_simulation(simulation, monkeypatch)
    assert {row["status"] for row in read_rows_by_index(simulation, 12).values()} == {"ok"}
    assert tried.count("small") == 1
    assert tried.count("large") == 4


def test_an_image_too_large_for_all_workers_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "a", "width": 64}, {"prompt": "b", "width": 128}]
    simulation = Simulation(
        tmp_path / "job",
        write_csv(tmp_path / "m.csv", rows),
        1,
        [SimWorker(f"w{number}", 1.0, is_small=True) for number in range(3)],
        FaultPlan(),
    )
    run_simulation(simulation, monkeypatch)
    results = read_rows_by_index(simulation, 2)
    assert (results[2]["status"], results[2]["error_class"]) == ("failed", "out_of_memory")


class FailingPool(SimPool):
    """Every image fails, including the probe image of a trial."""

    trial_fails = True

    def generate(self, process: SimWorker, batch: MicroBatch) -> list[ImageResult]:
        if not batch.wanted and not self.trial_fails:
            return super().generate(process, batch)
        return [
            ImageResult(image.index, Status.FAILED, error_class="not_finite", error_message="not finite")
            for image in batch.images
        ]


class PassingTrialPool(FailingPool):
    trial_fails = False


def test_if_everything_fails_with_the_same_error_no_failures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken installation must not write ten million rows `failed`."""
    simulation = make_simulation(tmp_path, 100, [SimWorker("a", 1.0), SimWorker("b", 1.0)])
    with pytest.raises(NoWorkerError, match="all failed with the same error: not_finite: not finite"):
        run_simulation(simulation, monkeypatch, FailingPool)
    assert not (simulation.folder / "results.parquet").exists()
    run_simulation(simulation, monkeypatch)
    assert {row["status"] for row in read_rows_by_index(simulation, 100).values()} == {"ok"}


@pytest.mark.parametrize(("images", "pool"), [(3, FailingPool), (100, PassingTrialPool)])
def test_failures_of_a_few_images_or_with_a_good_probe_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, pool: type[SimPool]
) -> None:
    simulation = make_simulation(tmp_path, images, [SimWorker("a", 1.0), SimWorker("b", 1.0)])
    run_simulation(simulation, monkeypatch, pool)
    assert {row["status"] for row in read_rows_by_index(simulation, images).values()} == {"failed"}


def test_a_hung_worker_is_killed_after_its_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class HangingPool(SimPool):
        def deliver(self, process: SimWorker, batch: MicroBatch, fault_name: str) -> list[Any]:
            if batch.wanted == {5} and not simulation.outcomes["hung"]:
                process.hangs = True
                return []
            return super().deliver(process, batch, fault_name)

    simulation = make_simulation(tmp_path, 8, [SimWorker("a", 0.5)])
    progress = run_simulation(simulation, monkeypatch, HangingPool)
    assert [(event.worker, event.fault) for event in progress.lost] == [("a", FaultType.HUNG)]
    rows = read_rows_by_index(simulation, 8)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows[5]["attempts"] == 2


@pytest.mark.parametrize("fault", ["node_lost", "host_out_of_memory"])
def test_losses_not_caused_by_images_quarantine_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    losses = iter(range(4))

    class UnluckyPool(SimPool):
        def finish(self, process: SimWorker, batch: MicroBatch) -> list[Any]:
            if 1 in batch.wanted and next(losses, None) is not None:
                lost = self.lose(process, FaultType(fault))
                self.simulation.orphaned_batches.clear()  # an orphaned worker might publish it
                return [lost]
            return super().finish(process, batch)

    simulation = make_simulation(tmp_path, 2, [SimWorker("a", 0.5)])
    run_simulation(simulation, monkeypatch, UnluckyPool)
    rows = read_rows_by_index(simulation, 2)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows[1]["attempts"] == 5


def test_duplicate_results_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DuplicatingPool(SimPool):
        def wait_for_events(self, timeout_s: float) -> list[Any]:
            return [copy for event in super().wait_for_events(timeout_s) for copy in (event, event)]

    simulation = make_simulation(tmp_path, 6, [SimWorker("a", 0.5), SimWorker("b", 0.5)])
    run_simulation(simulation, monkeypatch, DuplicatingPool)
    assert simulation.generations == 6
    read_rows_by_index(simulation, 6)
