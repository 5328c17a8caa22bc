"""Run the real planner, driver, dispatcher and results writer on simulated workers, with thousands of fault schedules.

One schedule in forty writes real files, tables and locks. The others keep them in memory. The seed of a failing
schedule is printed; `Simulation` repeats it exactly.
"""

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.in_memory_disk import InMemorySimulation
from tests.chaos.simulator import Simulation, group_indexes_by_status, make_random_simulation, write_manifest

FILES_EVERY = 40


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder in memory where the system has one, because hundreds of jobs are written."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def check(simulation: Simulation, images: int) -> dict[str, set[int]]:
    """Check what must hold after any schedule of faults."""
    indexes = group_indexes_by_status(simulation.rows(images))
    poison, raising = simulation.faults.poison, simulation.faults.raising - simulation.faults.poison
    all_small = all(worker.is_small or worker.is_broken for worker in simulation.workers)
    assert poison <= indexes["quarantined"]
    assert raising - indexes["quarantined"] <= indexes["failed"]
    assert all(simulation.losses[index] >= 3 for index in indexes["quarantined"])
    if not all_small:
        assert indexes["failed"] <= raising
    assert simulation.generations <= images + simulation.wasted
    return indexes


@pytest.mark.parametrize("schedules", [1000, pytest.param(10_000, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])])
def test_after_any_faults_every_image_exists_once(memory_folder: Path, schedules: int) -> None:
    injected: Counter[str] = Counter()
    manifests = [write_manifest(memory_folder / f"m{rows}.csv", rows, random.Random(rows)) for rows in (1, 2, 4)]
    sizes = [sum(int(line.split(",")[1]) for line in path.read_text().splitlines()[1:]) for path in manifests]
    for seed in range(schedules):
        simulation_type = InMemorySimulation if seed % FILES_EVERY else Simulation
        simulation = make_random_simulation(
            simulation_type, memory_folder / "job", manifests[seed % 3], sizes[seed % 3], seed
        )
        try:
            with pytest.MonkeyPatch.context() as patch:
                simulation.patch(patch)
                simulation.run()
                check(simulation, sizes[seed % 3])
        except BaseException:
            print(f"seed {seed}, {sizes[seed % 3]} images, faults {simulation.faults}, so far {simulation.outcomes}")
            raise
        injected += simulation.outcomes
        shutil.rmtree(simulation.folder, ignore_errors=True)
    print(f"{schedules} schedules, injected: {dict(injected)}")
    assert len(injected) >= 12
    assert min(injected.values()) >= schedules / 100
