"""Which workers a job gets: one in this process, or Ray's."""

from typing import TYPE_CHECKING

from tinysd_batch.job.ray_workers.pool import RayPool
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.pool import choose_cpu_workers
from tinysd_batch.job.workers.worker import WorkerSetup

if TYPE_CHECKING:
    from tinysd_batch.job.state.job import Job
    from tinysd_batch.job.workers.pool import PoolFactory


def make_pool_factory(job: "Job") -> "PoolFactory":
    """How to open the workers of a job, by its settings."""
    settings = job.settings

    def open_pool(images: int) -> InlinePool | RayPool:
        wanted = 1 if settings.inline else settings.workers
        count, threads = choose_cpu_workers(images, wanted, job.model.is_small)
        setup = WorkerSetup.from_settings(
            settings, job.model, threads=threads, job_folder=job.folder.resolve(), scratch=job.scratch.resolve(),
            stop_file=job.stop_file.resolve(), precision_file=job.precision_file.resolve(),
        )  # fmt: skip
        if settings.inline:
            return InlinePool(setup)
        ray_init = {"address": settings.address} if settings.address else {}
        return RayPool(setup, settings.workers, count, ray_init, settings.worker_wait)

    return open_pool
