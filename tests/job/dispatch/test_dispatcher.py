"""The dispatcher's decisions, on simulated workers: who is blamed, what is tried again, when all is stopped."""

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.simulator import Faults, SimPool, SimWorker, World
from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.stub_model import SilentProgress
from tinysd_batch.errors import NoWorkerError
from tinysd_batch.job import driver
from tinysd_batch.job.workers.faults import FaultType
from tinysd_batch.job.workers.pool import WorkerLost
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Status


class Told(SilentProgress):
    """What the user is told of workers."""

    def __init__(self) -> None:
        self.lost: list[WorkerLost] = []

    def report_worker(self, event: Any) -> None:
        if isinstance(event, WorkerLost):
            self.lost.append(event)


def farm(tmp_path: Path, images: int, workers: list[SimWorker], **faults: Any) -> World:
    rows = [{"prompt": f"p{number}", "width": 64} for number in range(images)]
    return World(tmp_path / "job", write_csv(tmp_path / "m.csv", rows), 1, workers, Faults(**faults))


def run(world: World, monkeypatch: pytest.MonkeyPatch, pool: type[SimPool] = SimPool) -> Told:
    world.patch(monkeypatch)
    told = Told()
    driver.run_job(world.job(), lambda _: pool(world), told, lambda: False)
    return told


def by_index(world: World, images: int) -> dict[int, dict[str, Any]]:
    return {row["index"]: row for row in check_whole(world.folder, images)}


@pytest.mark.parametrize("images", [1, 2, 12])
@pytest.mark.parametrize("cards", [1, 3])
def test_a_poison_row_costs_itself_and_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, cards: int
) -> None:
    """Even where it is the first row, the only row, or there is but one card."""
    world = farm(tmp_path, images, [SimWorker(f"w{number}", 0.5) for number in range(cards)], poison={1})
    told = run(world, monkeypatch)
    rows = by_index(world, images)
    assert (rows[1]["status"], rows[1]["error_class"], rows[1]["attempts"]) == ("quarantined", "worker_died", 3)
    assert {row["status"] for index, row in rows.items() if index > 1} <= {"ok"}
    assert len(told.lost) == 3
    assert not any(event.is_permanent for event in told.lost)


def test_a_broken_card_is_retired_by_name_and_no_image_suffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = farm(tmp_path, 200, [SimWorker("good", 0.1), SimWorker("bad", 1.0, is_broken=True)])
    told = run(world, monkeypatch)
    assert {row["status"] for row in by_index(world, 200).values()} == {"ok"}
    (retired,) = (event for event in told.lost if event.is_permanent)
    assert retired.worker == "bad"
    assert "lost on good images too" in retired.reason


def test_where_every_card_is_broken_no_image_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = farm(tmp_path, 1, [SimWorker(f"w{number}", 1.0, is_broken=True) for number in range(4)])
    with pytest.raises(NoWorkerError):
        run(world, monkeypatch)
    assert not (world.folder / "results.parquet").exists()


def test_what_is_too_large_for_one_card_is_made_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{number}", "width": 128 if number % 3 == 0 else 64} for number in range(12)]
    cards = [SimWorker("small", 1.0, is_small=True), SimWorker("large", 0.5)]
    world = World(tmp_path / "job", write_csv(tmp_path / "m.csv", rows), 1, cards, Faults())
    tried: list[str] = []
    original = SimPool.make_one

    def make_one(self: SimPool, process: SimWorker, image: ImageRequest) -> ImageResult:
        tried.append(process.name if image.params.width == 128 else "")
        return original(self, process, image)

    monkeypatch.setattr(SimPool, "make_one", make_one)
    run(world, monkeypatch)
    assert {row["status"] for row in by_index(world, 12).values()} == {"ok"}
    assert tried.count("small") == 1
    assert tried.count("large") == 4


def test_what_is_too_large_for_all_fails_after_each_has_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "a", "width": 64}, {"prompt": "b", "width": 128}]
    world = World(
        tmp_path / "job", write_csv(tmp_path / "m.csv", rows), 1,
        [SimWorker(f"w{number}", 1.0, is_small=True) for number in range(3)], Faults(),
    )  # fmt: skip
    run(world, monkeypatch)
    rows_made = by_index(world, 2)
    assert (rows_made[2]["status"], rows_made[2]["error_class"]) == ("failed", "out_of_memory")


class AllFail(SimPool):
    """Every image fails, the plain one of a trial too."""

    trial_fails = True

    def make(self, process: SimWorker, batch: MicroBatch) -> list[ImageResult]:
        if not batch.wanted and not self.trial_fails:
            return super().make(process, batch)
        return [
            ImageResult(image.index, Status.FAILED, error_class="not_finite", error_message="not finite")
            for image in batch.images
        ]


class OnlyImagesFail(AllFail):
    trial_fails = False


def test_if_everything_fails_alike_the_job_stops_and_writes_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than ten million rows `failed` by a broken installation."""
    world = farm(tmp_path, 100, [SimWorker("a", 1.0), SimWorker("b", 1.0)])
    with pytest.raises(NoWorkerError, match="all failed alike, and so did a plain one: not_finite: not finite"):
        run(world, monkeypatch, AllFail)
    assert not (world.folder / "results.parquet").exists()
    run(world, monkeypatch)
    assert {row["status"] for row in by_index(world, 100).values()} == {"ok"}


@pytest.mark.parametrize(("images", "pool"), [(3, AllFail), (100, OnlyImagesFail)])
def test_failures_of_a_few_images_or_not_of_plain_ones_are_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, pool: type[SimPool]
) -> None:
    world = farm(tmp_path, images, [SimWorker("a", 1.0), SimWorker("b", 1.0)])
    run(world, monkeypatch, pool)
    assert {row["status"] for row in by_index(world, images).values()} == {"failed"}


def test_a_card_that_hangs_is_ended_after_ten_times_what_it_should_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(SimPool):
        def deliver(self, process: SimWorker, batch: MicroBatch, what: str) -> list[Any]:
            if batch.wanted == {5} and not world.ends["hung"]:
                process.hangs = True
                return []
            return super().deliver(process, batch, what)

    world = farm(tmp_path, 8, [SimWorker("a", 0.5)])
    told = run(world, monkeypatch, Hanging)
    assert [(event.worker, event.fault) for event in told.lost] == [("a", FaultType.HUNG)]
    rows = by_index(world, 8)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows[5]["attempts"] == 2


@pytest.mark.parametrize("fault", ["node_lost", "host_out_of_memory"])
def test_what_is_no_images_fault_quarantines_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    losses = iter(range(4))

    class Unlucky(SimPool):
        def finish(self, process: SimWorker, batch: MicroBatch) -> list[Any]:
            if 1 in batch.wanted and next(losses, None) is not None:
                lost = self.lose(process, FaultType(fault))
                self.world.zombies.clear()  # or one of them may publish it
                return [lost]
            return super().finish(process, batch)

    world = farm(tmp_path, 2, [SimWorker("a", 0.5)])
    run(world, monkeypatch, Unlucky)
    rows = by_index(world, 2)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows[1]["attempts"] == 5


def test_results_that_come_twice_or_too_late_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Echo(SimPool):
        def wait_for_events(self, timeout_s: float) -> list[Any]:
            return [again for event in super().wait_for_events(timeout_s) for again in (event, event)]

    world = farm(tmp_path, 6, [SimWorker("a", 0.5), SimWorker("b", 0.5)])
    run(world, monkeypatch, Echo)
    assert world.generations == 6
    by_index(world, 6)
