"""Thousands of runs of the real dispatcher, planner, driver and committer on a simulated farm, faults at every step.

One schedule in forty writes real files, tables and locks; the others keep them in memory. A failing seed is named;
`World` makes the same things happen again.
"""

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.in_memory_disk import MemoryWorld
from tests.chaos.simulator import World, random_world, rows_by_status, write_manifest

FILES_EVERY = 40


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of jobs are written."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def check(world: World, images: int) -> dict[str, set[int]]:
    """What must hold after any schedule of faults."""
    found = rows_by_status(world.rows(images))
    poison, raising = world.faults.poison, world.faults.raising - world.faults.poison
    all_small = all(worker.is_small or worker.is_broken for worker in world.workers)
    assert poison <= found["quarantined"]
    assert raising - found["quarantined"] <= found["failed"]
    assert all(world.losses[index] >= 3 for index in found["quarantined"])
    if not all_small:
        assert found["failed"] <= raising
    assert world.generations <= images + world.wasted
    return found


@pytest.mark.parametrize("schedules", [1000, pytest.param(10_000, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])])
def test_whatever_happens_every_image_is_there_once(memory: Path, schedules: int) -> None:
    delivered: Counter[str] = Counter()
    manifests = [write_manifest(memory / f"m{rows}.csv", rows, random.Random(rows)) for rows in (1, 2, 4)]
    sizes = [sum(int(line.split(",")[1]) for line in path.read_text().splitlines()[1:]) for path in manifests]
    for seed in range(schedules):
        kind = MemoryWorld if seed % FILES_EVERY else World
        world = random_world(kind, memory / "job", manifests[seed % 3], sizes[seed % 3], seed)
        try:
            with pytest.MonkeyPatch.context() as patch:
                world.patch(patch)
                world.run()
                check(world, sizes[seed % 3])
        except BaseException:
            print(f"seed {seed}, {sizes[seed % 3]} images, faults {world.faults}, so far {world.ends}")
            raise
        delivered += world.ends
        shutil.rmtree(world.folder, ignore_errors=True)
    print(f"{schedules} schedules, delivered: {dict(delivered)}")
    assert len(delivered) >= 12
    assert min(delivered.values()) >= schedules / 100
