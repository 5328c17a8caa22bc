"""Choose the pool of a job: one worker in this process, or Ray workers."""

from typing import TYPE_CHECKING

from tinysd_batch.job.ray_workers.pool import RayPool
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.pool import choose_cpu_workers
from tinysd_batch.job.workers.worker import WorkerSetup

if TYPE_CHECKING:
    from tinysd_batch.job.state.job import Job
    from tinysd_batch.job.workers.pool import PoolFactory


def make_pool_factory(job: "Job") -> "PoolFactory":
    """Return a function that opens the pool that the job's settings ask for."""
    settings = job.settings

    def open_pool(images: int) -> InlinePool | RayPool:
        requested = 1 if settings.inline else settings.workers
        count, threads = choose_cpu_workers(images, requested, job.model.is_small)
        setup = WorkerSetup.from_settings(
            settings,
            job.model,
            threads=threads,
            job_folder=job.folder.resolve(),
            scratch=job.scratch.resolve(),
            stop_file=job.stop_file.resolve(),
            precision_file=job.precision_file.resolve(),
        )
        if settings.inline:
            return InlinePool(setup)
        ray_init = {"address": settings.address} if settings.address else {}
        return RayPool(setup, settings.workers, count, ray_init, settings.worker_wait)

    return open_pool
