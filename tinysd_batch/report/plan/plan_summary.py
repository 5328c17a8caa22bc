"""Answer the three questions that a plan starts with: does it fit, how long does it take, how good is the model."""

import json
import math
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from tinysd_batch.errors import TinySDError
from tinysd_batch.job.results.table import ResultsTable, read_table
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.job_json import read_job_json
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.model.checkpoint.json_file import MAX_JSON_BYTES, read_json_object
from tinysd_batch.records import Row, Status
from tinysd_batch.report.formatting import format_bytes, format_count, format_seconds, to_one_line
from tinysd_batch.report.plan.memory_table import MemoryEstimate
from tinysd_batch.report.quality_text import describe_quality
from tinysd_batch.settings.schema import SHARED_IN_BATCH, Settings
from tinysd_batch.storage.atomic import read_file

MAX_SIBLING_JOBS = 20  # the newest jobs beside this one, whose results are searched for a measured speed
MAX_TIMED_IMAGES = 500
TIMED_COLUMNS = [
    "row", "index", "status", *SHARED_IN_BATCH, "model_digest", "device_name", "worker", "node", "text_s",
    "denoise_s", "decode_s", "run_id", "reused",
]  # fmt: skip

TimingKey = tuple[int, int, str]  # width, height, sampler


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """The first lines of a plan. None stands for unknown."""

    memory: MemoryEstimate | None
    images: int  # that are left to generate
    seconds: float | None
    speed: "MeasuredSpeed | None"
    quality: "ModelQuality"

    def lines(self) -> dict[str, str]:
        lines = {}
        if self.memory is not None:
            lines["Fits"] = format_memory_fit(self.memory)
            if not self.memory.is_device_absent:
                lines["  another GPU"] = "plan with --device cuda --vram-budget 4GB, with or without that GPU"
        return {
            **lines,
            "Takes": format_time_estimate(self.images, self.seconds, self.speed),
            "Quality": str(self.quality),
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "fits_memory": self.memory.fits if self.memory else None,
            "seconds": self.seconds,
            "psnr_db": self.quality.psnr_db,
        }


def summarize_plan(job: Job, memory: MemoryEstimate | None, work: "PlannedWork", reusable: int = 0) -> PlanSummary:
    """Summarize a plan.

    Args:
        job: The job.
        memory: Its memory estimate.
        work: The images to generate.
        reusable: How many of them can be reused from another job. Each is assumed to take the average time.
    """
    images = sum(work.images.values())
    left = max(0, images - reusable)
    seconds, speed = estimate_job_time(job, work) or (None, None)
    if seconds is not None and images:
        seconds *= left / images
    return PlanSummary(memory, left, seconds, speed, read_model_quality(job.model))


# Does it fit?


def format_memory_fit(memory: MemoryEstimate) -> str:
    """Return `yes: 62 MB at most, 8.3 GB available (float32 on cpu)`."""
    setup = f"{memory.precision} on {memory.device}{', estimated without a GPU' if memory.is_device_absent else ''}"
    peak = f"{format_bytes(memory.peak_bytes)} at most"
    if memory.budget:
        return f"yes: {peak}, within --vram-budget {memory.budget} ({setup})"
    if memory.available_bytes is None:
        return f"unknown: {peak} ({setup}); add --vram-budget 4GB for a GPU of 4 GB"
    available = f"{format_bytes(memory.available_bytes)} available"
    if memory.fits:
        return f"yes: {peak}, {available} ({setup})"
    return f"no: {peak}, {available} ({setup}); limit it with --vram-budget"


# How long does it take?


@dataclass(slots=True)
class PlannedWork:
    """The images to generate, counted by what determines their time."""

    images: Counter[TimingKey]
    unet_calls: Counter[TimingKey]

    @classmethod
    def empty(cls) -> "PlannedWork":
        return cls(Counter(), Counter())

    def add(self, row: Row, n_images: int) -> None:
        key = row.settings.width, row.settings.height, row.settings.sampler
        self.images[key] += n_images
        self.unet_calls[key] += n_images * count_unet_calls(row.settings.steps)


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """How fast the workers of an earlier run were."""

    unet_call_s: dict[TimingKey, float]
    other_s: dict[TimingKey, float]  # text encoding and decoding, per image
    workers: int
    folder: Path

    def estimate_s(self, work: PlannedWork) -> float | None:
        """Estimate the time with as many workers; None if the run has no images of one of the sizes and samplers."""
        if not set(work.images) <= set(self.unet_call_s):
            return None
        single_worker_s = sum(
            work.unet_calls[key] * self.unet_call_s[key] + n_images * self.other_s[key]
            for key, n_images in work.images.items()
        )
        return single_worker_s / self.workers


def estimate_job_time(job: Job, work: PlannedWork) -> tuple[float, MeasuredSpeed] | None:
    """Estimate seconds from the newest results of this machine with this model: of this job, or of its siblings."""
    for folder in (job.folder, *find_sibling_jobs(job.folder)):
        try:
            speed = read_measured_speed(folder, job.model, job.settings)
        except (TinySDError, OSError):
            continue  # damaged job
        if speed is not None and (seconds := speed.estimate_s(work)) is not None:
            return seconds, speed
    return None


def find_sibling_jobs(folder: Path) -> Iterator[Path]:
    """Yield the jobs beside this one, newest first."""
    try:
        files = [file for file in folder.parent.glob(f"*/{JOB_FILE}") if file.parent.name != folder.name]
        files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    except OSError:
        return
    yield from (file.parent for file in files[:MAX_SIBLING_JOBS])


def read_measured_speed(folder: Path, model: ModelInfo, settings: Settings) -> MeasuredSpeed | None:
    """Measure the speed of a job's last run with this model, machine and type of device; None if there is none."""
    if not (folder / JOB_FILE).exists() or read_job_json(folder)["model"]["digest"] != model.digest:
        return None
    rows = list(islice(read_timed_rows(folder, model.digest, settings.device), MAX_TIMED_IMAGES))
    if not rows:
        return None
    last_run = [row for row in rows if row["run_id"] == rows[0]["run_id"]]
    unet_call_s, other_s = {}, {}
    for key in {get_timing_key(row) for row in last_run}:
        same_key = [row for row in last_run if get_timing_key(row) == key]
        unet_call_s[key] = median(read_seconds(row, "denoise_s") / count_unet_calls(row["steps"]) for row in same_key)
        other_s[key] = median(read_seconds(row, "text_s") + read_seconds(row, "decode_s") for row in same_key)
    return MeasuredSpeed(unet_call_s, other_s, len({row["worker"] for row in last_run}), folder)


def read_timed_rows(folder: Path, digest: str, device: str) -> Iterator[dict[str, Any]]:
    """Yield rows that have times, newest first, of the last file only: a table may have millions of rows."""
    files = ResultsTable(folder).table_files()
    if not files:
        return
    for row in reversed(read_last_rows(files[-1])):
        if is_timed(row) and row["model_digest"] == digest and row["node"] == platform.node():
            is_on_cpu = (row["device_name"] or "").startswith("cpu")
            if device in ("auto", "cpu" if is_on_cpu else "cuda"):
                yield row


def is_timed(row: dict[str, Any]) -> bool:
    return bool(row["status"] == Status.OK and row["steps"] and read_seconds(row, "denoise_s") and not row["reused"])


def read_last_rows(file: Path) -> list[dict[str, Any]]:
    table = read_table(file, TIMED_COLUMNS)
    rows: list[dict[str, Any]] = table.slice(max(0, len(table) - 2 * MAX_TIMED_IMAGES)).to_pylist()
    return rows


def read_seconds(row: dict[str, Any], column: str) -> float:
    """Return a time, or 0 for an invalid one: the table may have been written by another program."""
    value = row[column]
    return float(value) if value is not None and math.isfinite(value) and value > 0 else 0.0


def get_timing_key(row: dict[str, Any]) -> TimingKey:
    return row["width"], row["height"], row["sampler"]


def count_unet_calls(steps: int) -> int:
    """Count the UNet calls of an image, up to a constant factor of the sampler. plms needs one more than steps."""
    return steps + 1


def format_time_estimate(images: int, seconds: float | None, speed: MeasuredSpeed | None) -> str:
    """Return `about 12 min 5 s for 360 images with 2 workers, at the speed of outputs/fruit`."""
    if not images:
        return "no time: nothing is left to generate"
    if seconds is None or speed is None:
        return "not measured on this machine yet: submit with --limit 4, then plan again"
    work = f"{format_count(images, 'image')} with {format_count(speed.workers, 'worker')}"
    return f"about {format_seconds(seconds)} for {work}, at the speed of {speed.folder}"


# How good is the model?


@dataclass(frozen=True, slots=True)
class ModelQuality:
    """The quantization error of a model."""

    is_packed: bool
    psnr_db: float | None = None  # of the median image, compared with the float model
    quantized_as: str = ""  # level and size

    def __str__(self) -> str:
        if not self.is_packed:
            return "float weights, no quantization error"
        if self.psnr_db is None:
            return "not measured: the model folder has no report; quantize writes one"
        return f"{describe_quality(self.psnr_db)} (PSNR {self.psnr_db:.1f} dB, {self.quantized_as})"


def read_model_quality(model: ModelInfo) -> ModelQuality:
    """Read the quality from the report in the model folder."""
    if "quantization_config" not in read_json_object(model.path / "unet" / "config.json"):
        return ModelQuality(is_packed=False)
    report = read_quantization_report(model.path)
    psnr_db = report.get("median_picture_psnr_db")
    if not isinstance(psnr_db, int | float) or isinstance(psnr_db, bool) or not math.isfinite(psnr_db):
        return ModelQuality(is_packed=True)
    quantized_as = f"level {report.get('level')}, {report.get('size')}"
    return ModelQuality(True, float(psnr_db), to_one_line(quantized_as))


def read_quantization_report(folder: Path) -> dict[str, Any]:
    """Read a model's report; return an empty dictionary if it has none."""
    try:
        report = json.loads(read_file(folder / "report" / "report.json", MAX_JSON_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}
