"""Work out what a job would do, without loading the model."""

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
from tinysd_batch.report.formatting import count
from tinysd_batch.report.plan.memory_process import estimate_memory_in_subprocess
from tinysd_batch.report.plan.memory_table import MemoryEstimate, PlannedBatch
from tinysd_batch.report.plan.plan_summary import PlannedWork, PlanSummary, summarize_plan
from tinysd_batch.report.plan.token_counts import CountedRow, PromptTokenCounter
from tinysd_batch.report.reading_progress import ReadingProgress

OnRow = Callable[[CountedRow | InvalidRow], None]

MAX_FAULTS_IN_JSON = 1000  # kept for --json

# As the embedded model's drawings come out, lossy ones at quality 90: a guess for other models, and said with "some".
BYTES_PER_PIXEL = {"png": 1.8, "jpg": 0.6, "webp": 0.4}

BYTES_PER_ROW = 2500  # what is written into a picture, and its row of the table


@dataclass(slots=True)
class JobPlan:
    """What `plan` says."""

    rows: int = 0
    invalid_rows: int = 0
    images: int = 0
    batches: int = 0
    finished: int = 0  # images that an earlier run made
    redo: int = 0  # others that an earlier run made, whose files are missing or damaged
    redo_reason: str = ""
    reusable: int = 0  # others that the job named by --reuse has
    largest: PlannedBatch | None = None  # the most that is drawn at once
    memory: MemoryEstimate | None = None
    answers: PlanSummary | None = None
    work: PlannedWork = field(default_factory=PlannedWork.empty)  # what is left to be generated
    sizes: Counter[str] = field(default_factory=Counter)
    samplings: Counter[str] = field(default_factory=Counter)
    longest_prompt_tokens: int = 0
    token_limit: int = 0
    cut_rows: int = 0  # rows with a prompt or a negative prompt that the model does not see all of
    weighted_rows: int = 0
    disk_bytes: int = 0
    free_bytes: int = 0
    notes: list[str] = field(default_factory=list)  # on how the manifest was read
    carried_columns: list[str] = field(default_factory=list)
    near_misses: dict[str, str] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)  # row number -> what is wrong with it, the first 1000

    @property
    def fits_disk(self) -> bool:
        return self.disk_bytes <= self.free_bytes


def make_plan(
    job: Job, on_row: OnRow, limit: int | None = None, *, retry_failed: bool = False, progress: ReadingProgress
) -> JobPlan:
    """Read the whole manifest, and report each row. Raises ManifestError for faults of the whole file.

    `limit` and `retry_failed` as in `run_job`. No image is looked at: rows may have millions of them.
    """
    plan = JobPlan(token_limit=job.model.max_tokens - 2, free_bytes=free_bytes(job.folder))
    survey = PlanBuilder(plan, job, find_finished_images(plan, job, limit, retry_failed=retry_failed), limit)
    planned = plan_images(survey.rows(on_row, progress), job.shared_settings())
    wanted = Counter[str]()
    for run in plan_batch_ranges(survey.images(planned, wanted), job.settings.max_batch):
        plan.batches += (run if limit is None else run.up_to(limit)).batches
    plan.finished = len(survey.finished)
    plan.reusable = count_reusable_images(job, wanted)
    plan.disk_bytes = round(plan.disk_bytes * (1 - (plan.finished + plan.reusable) / max(plan.images, 1)))
    progress.stop()
    plan.memory = (
        estimate_memory_in_subprocess(job.settings, plan.largest, job.precision_file) if plan.largest else None
    )
    plan.near_misses = find_near_misses(plan.carried_columns)
    plan.answers = summarize_plan(job, plan.memory, plan.work, plan.reusable)
    return plan


def find_finished_images(plan: JobPlan, job: Job, limit: int | None, *, retry_failed: bool) -> set[int]:
    """Indexes of the images that an earlier run made, and that this one would not make again."""
    if job.replaces_unstarted_job or not (job.folder / JOB_FILE).exists():
        return set()
    found = read_finished_images(job)
    kept = found.images - found.failed if retry_failed else found.images
    finished = kept if limit is None else {index for index in kept if index <= limit}
    differences = find_differences(job.folder)
    plan.redo, plan.redo_reason = len(differences.indexes & finished), f"{differences}; {differences.advice}"
    return finished - differences.indexes


@dataclass(slots=True)
class PlanBuilder:
    """Adds up a plan while rows pass."""

    plan: JobPlan
    job: Job
    finished: set[int]
    limit: int | None
    extra_columns: dict[str, None] = field(default_factory=dict)
    sorted_finished: list[int] = field(init=False)
    reusable_ids: set[str] = field(init=False)  # of the job that --reuse names: only these are looked for

    def __post_init__(self) -> None:
        self.sorted_finished = sorted(self.finished)
        tables = ResultsTable(self.job.reuse).read(["image_id"]) if self.job.reuse is not None else ()
        self.reusable_ids = {image_id for table in tables for image_id in table["image_id"].to_pylist()}

    def rows(self, on_row: OnRow, progress: ReadingProgress) -> Iterator[Row]:
        """The rows that can be made, after they were counted and reported."""
        plan = self.plan
        notes = ReadingNotes()
        for planned in PromptTokenCounter(self.job).read(self.job.read_rows(notes)):
            plan.rows += 1
            progress.rows = plan.rows
            if isinstance(planned, InvalidRow):
                self.add_columns(planned.extra)
                plan.invalid_rows += 1
                if len(plan.faults) < MAX_FAULTS_IN_JSON:
                    plan.faults[planned.number] = format_invalid_reason(planned)
                on_row(planned)
            else:
                self.add_columns(planned.row.extra)
                self.add_prompts(planned)
                on_row(planned)
                yield planned.row
        plan.notes, plan.carried_columns = list(notes.lines()), list(self.extra_columns)

    def add_columns(self, extra: dict[str, Any]) -> None:
        """Raises ManifestError for more different keys than a job takes."""
        if extra.keys() <= self.extra_columns.keys():
            return
        self.extra_columns.update(dict.fromkeys(extra))
        if len(self.extra_columns) > MAX_EXTRA_COLUMNS and is_json_manifest(self.job.manifest):
            raise ManifestError(f"{self.job.manifest}: over {MAX_EXTRA_COLUMNS} different keys besides the known ones")

    def add_prompts(self, planned: CountedRow) -> None:
        plan = self.plan
        plan.longest_prompt_tokens = max(plan.longest_prompt_tokens, planned.prompt.n_tokens)
        plan.cut_rows += planned.is_truncated
        plan.weighted_rows += planned.prompt.has_weights

    def images(self, planned: Iterable[tuple[Row, RowImages]], wanted: Counter[str]) -> Iterator[tuple[Row, RowImages]]:
        """Each row with its images, after these were counted; `wanted` gets the ids that `--reuse` looks for."""
        for row, images in planned:
            number = len(images) if self.limit is None else max(0, min(len(images), self.limit - images.first + 1))
            if number:
                self.add_images(row, number)
                last = images.first + number
                if self.reusable_ids:
                    indexes = (index for index in range(images.first, last) if index not in self.finished)
                    ids = (images.image(index).image_id for index in indexes)
                    wanted.update(image_id for image_id in ids if image_id in self.reusable_ids)
                done = bisect_left(self.sorted_finished, last) - bisect_left(self.sorted_finished, images.first)
                self.plan.work.add(row, number - done)
            yield row, images

    def add_images(self, row: Row, images: int) -> None:
        plan, params, settings = self.plan, row.params, self.job.settings
        plan.images += images
        together = max(row.n_samples, settings.max_batch or 1)
        batch = PlannedBatch(together, params.width, params.height, row.scale != 1)
        if plan.largest is None or batch.unet_pixels > plan.largest.unet_pixels:
            plan.largest = batch
        plan.sizes[f"{params.width}x{params.height}"] += images
        plan.samplings[f"{params.sampler}, {count(params.steps, 'step')}"] += images
        pixels = 0 if settings.skip_save else params.width * params.height
        plan.disk_bytes += round(images * (pixels * BYTES_PER_PIXEL[settings.format] + BYTES_PER_ROW))


def free_bytes(folder: Path) -> int:
    """Room where the folder is, or will be."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free


NOT_IN_JSON = ("largest", "memory", "work", "answers")  # of a Plan, which JSON has in other words or not


def plan_as_dict(plan: JobPlan) -> dict[str, Any]:
    told = {each.name: getattr(plan, each.name) for each in fields(plan) if each.name not in NOT_IN_JSON}
    return {
        **told, **(plan.answers.as_dict() if plan.answers else {}), "fits_disk": plan.fits_disk,
        "memory": plan.memory.as_dict() if plan.memory else None,
    }  # fmt: skip
