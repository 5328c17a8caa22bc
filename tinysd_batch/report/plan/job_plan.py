"""Plan what a job would do, without loading the model: rows, images, tokens, disk, memory, time."""

import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.driver import MAX_EXTRA_COLUMNS, read_finished_images
from tinysd_batch.job.manifest.columns import find_near_misses
from tinysd_batch.job.manifest.readers import is_json_manifest
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.plan.batches import RowImages, plan_batch_ranges, plan_images
from tinysd_batch.job.results.compare import find_differences
from tinysd_batch.job.results.rows import format_invalid_reason
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.reuse import count_reusable_images
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.report.formatting import format_count
from tinysd_batch.report.plan.memory_process import estimate_memory_in_subprocess
from tinysd_batch.report.plan.memory_table import MemoryEstimate, PlannedBatch
from tinysd_batch.report.plan.plan_summary import PlannedWork, PlanSummary, summarize_plan
from tinysd_batch.report.plan.token_counts import CountedRow, PromptTokenCounter
from tinysd_batch.report.reading_progress import ReadingProgress

OnRow = Callable[[CountedRow | InvalidRow], None]

MAX_FAULTS_IN_JSON = 1000

# Measured on images of the embedded model, jpg and webp at quality 90. For other models this is only a rough guess.
BYTES_PER_PIXEL = {"png": 1.8, "jpg": 0.6, "webp": 0.4}
BYTES_PER_IMAGE = 2500  # metadata in the file, and a row of the results table


@dataclass(slots=True)
class JobPlan:
    """The plan of a job. Most field names are keys of `plan --json`."""

    rows: int = 0
    invalid_rows: int = 0
    images: int = 0
    batches: int = 0
    finished: int = 0  # images that an earlier run generated
    redo: int = 0  # images that an earlier run generated, but whose files are missing or damaged
    redo_reason: str = ""
    reusable: int = 0  # images that the job of --reuse has
    largest: PlannedBatch | None = None
    memory: MemoryEstimate | None = None
    summary: PlanSummary | None = None
    work: PlannedWork = field(default_factory=PlannedWork.empty)  # images that are left to generate
    sizes: Counter[str] = field(default_factory=Counter)
    samplings: Counter[str] = field(default_factory=Counter)
    longest_prompt_tokens: int = 0
    token_limit: int = 0
    cut_rows: int = 0  # rows whose prompt or negative prompt exceeds the token limit
    weighted_rows: int = 0
    disk_bytes: int = 0
    free_bytes: int = 0
    notes: list[str] = field(default_factory=list)  # about reading the manifest
    carried_columns: list[str] = field(default_factory=list)  # unknown columns that are copied to the results
    near_misses: dict[str, str] = field(default_factory=dict)  # carried column -> known column with a similar name
    faults: dict[int, str] = field(default_factory=dict)  # row number -> why it is invalid; the first 1000

    @property
    def fits_disk(self) -> bool:
        return self.disk_bytes <= self.free_bytes


def make_plan(
    job: Job, on_row: OnRow, limit: int | None = None, *, retry_failed: bool = False, progress: ReadingProgress
) -> JobPlan:
    """Read the whole manifest and plan the job.

    It never enumerates images, because a row may have millions of them.

    Args:
        job: The job.
        on_row: Called for each row.
        limit: As in `run_job`.
        retry_failed: As in `run_job`.
        progress: Receives the number of rows read, and is stopped after the last.

    Raises:
        ManifestError: The manifest as a whole cannot be used.
    """
    plan = JobPlan(token_limit=job.model.max_tokens - 2, free_bytes=measure_free_bytes(job.folder))
    builder = PlanBuilder(plan, job, find_finished_images(plan, job, limit, retry_failed=retry_failed), limit)
    planned_rows = plan_images(builder.read_rows(on_row, progress), job.shared_settings())
    reusable_ids = Counter[str]()
    for batches in plan_batch_ranges(builder.count_images(planned_rows, reusable_ids), job.settings.max_batch):
        plan.batches += (batches if limit is None else batches.up_to(limit)).batches
    plan.finished = len(builder.finished)
    plan.reusable = count_reusable_images(job, reusable_ids)
    plan.disk_bytes = round(plan.disk_bytes * (1 - (plan.finished + plan.reusable) / max(plan.images, 1)))
    progress.stop()
    if plan.largest is not None:
        plan.memory = estimate_memory_in_subprocess(job.settings, plan.largest, job.precision_file)
    plan.near_misses = find_near_misses(plan.carried_columns)
    plan.summary = summarize_plan(job, plan.memory, plan.work, plan.reusable)
    return plan


def find_finished_images(plan: JobPlan, job: Job, limit: int | None, *, retry_failed: bool) -> set[int]:
    """Return the indexes of images that are already generated, and note in `plan` those to generate again."""
    if job.replaces_unstarted_job or not (job.folder / JOB_FILE).exists():
        return set()
    recorded = read_finished_images(job)
    finished = recorded.images - recorded.failed if retry_failed else recorded.images
    if limit is not None:
        finished = {index for index in finished if index <= limit}
    differences = find_differences(job.folder)
    plan.redo, plan.redo_reason = len(differences.indexes & finished), f"{differences}; {differences.advice}"
    return finished - differences.indexes


@dataclass(slots=True)
class PlanBuilder:
    """Accumulates a plan while the rows stream through its generators."""

    plan: JobPlan
    job: Job
    finished: set[int]
    limit: int | None
    extra_columns: dict[str, None] = field(default_factory=dict)
    sorted_finished: list[int] = field(init=False)
    earlier_ids: set[str] = field(init=False)  # of the job of --reuse; without them no id is computed

    def __post_init__(self) -> None:
        self.sorted_finished = sorted(self.finished)
        tables = ResultsTable(self.job.reuse).read(["image_id"]) if self.job.reuse is not None else ()
        self.earlier_ids = {image_id for table in tables for image_id in table["image_id"].to_pylist()}

    def read_rows(self, on_row: OnRow, progress: ReadingProgress) -> Iterator[Row]:
        """Yield the valid rows, after all rows were counted and reported."""
        plan = self.plan
        notes = ReadingNotes()
        for counted in PromptTokenCounter(self.job).count_rows(self.job.read_rows(notes)):
            plan.rows += 1
            progress.rows = plan.rows
            if isinstance(counted, InvalidRow):
                self.add_columns(counted.extra)
                plan.invalid_rows += 1
                if len(plan.faults) < MAX_FAULTS_IN_JSON:
                    plan.faults[counted.number] = format_invalid_reason(counted)
                on_row(counted)
            else:
                self.add_columns(counted.row.extra)
                self.add_prompts(counted)
                on_row(counted)
                yield counted.row
        plan.notes, plan.carried_columns = list(notes.lines()), list(self.extra_columns)

    def add_columns(self, extra: dict[str, Any]) -> None:
        """Raises ManifestError for more different keys than a job accepts."""
        if extra.keys() <= self.extra_columns.keys():
            return
        self.extra_columns.update(dict.fromkeys(extra))
        if len(self.extra_columns) > MAX_EXTRA_COLUMNS and is_json_manifest(self.job.manifest):
            raise ManifestError(f"{self.job.manifest}: over {MAX_EXTRA_COLUMNS} different keys besides the known ones")

    def add_prompts(self, counted: CountedRow) -> None:
        plan = self.plan
        plan.longest_prompt_tokens = max(plan.longest_prompt_tokens, counted.prompt.n_tokens)
        plan.cut_rows += counted.is_truncated
        plan.weighted_rows += counted.prompt.has_weights

    def count_images(
        self, planned_rows: Iterable[tuple[Row, RowImages]], reusable_ids: Counter[str]
    ) -> Iterator[tuple[Row, RowImages]]:
        """Yield each row with its images, after counting them; add ids that --reuse has to `reusable_ids`."""
        for row, images in planned_rows:
            n_images = len(images) if self.limit is None else max(0, min(len(images), self.limit - images.first + 1))
            if n_images:
                self.add_images(row, n_images)
                stop = images.first + n_images
                if self.earlier_ids:
                    indexes = (index for index in range(images.first, stop) if index not in self.finished)
                    ids = (images.image(index).image_id for index in indexes)
                    reusable_ids.update(image_id for image_id in ids if image_id in self.earlier_ids)
                n_finished = bisect_left(self.sorted_finished, stop) - bisect_left(self.sorted_finished, images.first)
                self.plan.work.add(row, n_images - n_finished)
            yield row, images

    def add_images(self, row: Row, n_images: int) -> None:
        plan, of_image, settings = self.plan, row.settings, self.job.settings
        plan.images += n_images
        batch = PlannedBatch.of_row(row, settings.max_batch)
        if plan.largest is None or batch.unet_pixels > plan.largest.unet_pixels:
            plan.largest = batch
        plan.sizes[f"{of_image.width}x{of_image.height}"] += n_images
        plan.samplings[f"{of_image.sampler}, {format_count(of_image.steps, 'step')}"] += n_images
        pixels = 0 if settings.skip_save else of_image.width * of_image.height
        plan.disk_bytes += round(n_images * (pixels * BYTES_PER_PIXEL[settings.format] + BYTES_PER_IMAGE))


def measure_free_bytes(folder: Path) -> int:
    """Return the free disk space where the folder is, or will be created."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free


FIELDS_NOT_IN_JSON = ("largest", "memory", "work", "summary")  # JSON has other keys for some of them


def plan_as_dict(plan: JobPlan) -> dict[str, Any]:
    """Return the JSON of `plan --json`."""
    values = {item.name: getattr(plan, item.name) for item in fields(plan) if item.name not in FIELDS_NOT_IN_JSON}
    return {
        **values,
        **(plan.summary.as_dict() if plan.summary else {}),
        "fits_disk": plan.fits_disk,
        "memory": plan.memory.as_dict() if plan.memory else None,
    }
