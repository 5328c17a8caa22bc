"""The three questions that a plan answers first: does it fit, how long does it take, how good is the model."""

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

from tinysd_batch.config import Settings
from tinysd_batch.errors import TinySDError
from tinysd_batch.job.results.table import ResultsTable, read_table
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.job_json import read_job_json
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.model.checkpoint.json_file import MAX_JSON_BYTES, read_json_object
from tinysd_batch.records import Row, Status
from tinysd_batch.report.formatting import count, format_bytes, format_seconds, to_one_line
from tinysd_batch.report.plan.memory_table import MemoryEstimate
from tinysd_batch.report.quality_text import describe_quality
from tinysd_batch.storage.atomic import read_file

MAX_SIBLING_JOBS = 20  # beside this one that are looked at for speed, the newest first
MAX_TIMED_IMAGES = 500
TIMED_COLUMNS = [
    "row", "index", "status", "width", "height", "steps", "sampler", "model_digest", "device_name", "worker", "node",
    "text_s", "denoise_s", "decode_s", "run_id", "reused",
]  # fmt: skip

TimingKey = tuple[int, int, str]  # width, height, sampler


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a plan says first; None where it is not known."""

    memory: MemoryEstimate | None
    images: int  # that are left to be generated
    seconds: float | None
    speed: "MeasuredSpeed | None"
    quality: "ModelQuality"

    def lines(self) -> dict[str, str]:
        lines = {}
        if self.memory is not None:
            lines["Fits"] = format_memory_fit(self.memory)
            if not self.memory.is_device_absent:
                lines["  another GPU"] = "plan with --device cuda --vram-budget 4GB; it need not be here"
        return {
            **lines,
            "Takes": format_time_estimate(self.images, self.seconds, self.speed),
            "Quality": str(self.quality),
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "fits_memory": self.memory.fits if self.memory else None, "seconds": self.seconds,
            "psnr_db": self.quality.psnr_db,
        }  # fmt: skip


def summarize_plan(job: Job, memory: MemoryEstimate | None, work: "PlannedWork", reusable: int = 0) -> PlanSummary:
    """`reusable`: how many of the images need not be generated; each counts as much as the others."""
    images = sum(work.images.values())
    left = max(0, images - reusable)
    seconds, speed = estimate_job_time(job, work) or (None, None)
    if seconds is not None and images:
        seconds *= left / images
    return PlanSummary(memory, left, seconds, speed, read_model_quality(job.model))


# Does it fit?


def format_memory_fit(memory: MemoryEstimate) -> str:
    """`yes: 62 MB at most, 8.3 GB available (float32 on cpu)`"""
    how = f"{memory.precision} on {memory.device}{', estimated without a GPU' if memory.is_device_absent else ''}"
    need = f"{format_bytes(memory.peak_bytes)} at most"
    if memory.budget:
        return f"yes: {need}, within --vram-budget {memory.budget} ({how})"
    if memory.available_bytes is None:
        return f"not known: {need} ({how}); add --vram-budget 4GB for a GPU of 4 GB"
    there = f"{format_bytes(memory.available_bytes)} available"
    return f"yes: {need}, {there} ({how})" if memory.fits else f"no: {need}, {there} ({how}); --vram-budget uses less"


# How long does it take?


@dataclass(slots=True)
class PlannedWork:
    """The images to be generated, by what decides their time."""

    images: Counter[TimingKey]
    unet_calls: Counter[TimingKey]  # of the UNet, over all images

    @classmethod
    def empty(cls) -> "PlannedWork":
        return cls(Counter(), Counter())

    def add(self, row: Row, images: int) -> None:
        kind = row.params.width, row.params.height, row.params.sampler
        self.images[kind] += images
        self.unet_calls[kind] += images * count_unet_calls(row.params.steps)


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """Seconds that one worker took in an earlier run."""

    unet_call_s: dict[TimingKey, float]
    other_s: dict[TimingKey, float]  # of an image: its text and decoding
    workers: int
    folder: Path

    def seconds(self, work: PlannedWork) -> float | None:
        """For all of it by as many workers; None where a kind of image is in it that was not generated yet."""
        if not set(work.images) <= set(self.unet_call_s):
            return None
        alone = sum(
            work.unet_calls[kind] * self.unet_call_s[kind] + number * self.other_s[kind]
            for kind, number in work.images.items()
        )
        return alone / self.workers


def estimate_job_time(job: Job, work: PlannedWork) -> tuple[float, MeasuredSpeed] | None:
    """By this machine's newest results with this model: of this job, else of the jobs beside it."""
    for folder in (job.folder, *find_sibling_jobs(job.folder)):
        try:
            speed = read_measured_speed(folder, job.model, job.settings)
        except (TinySDError, OSError):
            continue  # a damaged job says nothing of speed
        if speed is not None and (seconds := speed.seconds(work)) is not None:
            return seconds, speed
    return None


def find_sibling_jobs(folder: Path) -> Iterator[Path]:
    try:
        found = [file for file in folder.parent.glob(f"*/{JOB_FILE}") if file.parent.name != folder.name]
        found.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    except OSError:
        return
    yield from (file.parent for file in found[:MAX_SIBLING_JOBS])


def read_measured_speed(folder: Path, model: ModelInfo, settings: Settings) -> MeasuredSpeed | None:
    """Of the job's last images with this model, on this machine and kind of device; None where there are none."""
    if not (folder / JOB_FILE).exists() or read_job_json(folder)["model"]["digest"] != model.digest:
        return None
    rows = list(islice(read_timed_rows(folder, model.digest, settings.device), MAX_TIMED_IMAGES))
    if not rows:
        return None
    last = [row for row in rows if row["run_id"] == rows[0]["run_id"]]
    call_s, other_s = {}, {}
    for kind in {get_timing_key(row) for row in last}:
        alike = [row for row in last if get_timing_key(row) == kind]
        call_s[kind] = median(read_seconds(row, "denoise_s") / count_unet_calls(row["steps"]) for row in alike)
        other_s[kind] = median(read_seconds(row, "text_s") + read_seconds(row, "decode_s") for row in alike)
    return MeasuredSpeed(call_s, other_s, len({row["worker"] for row in last}), folder)


def read_timed_rows(folder: Path, digest: str, device: str) -> Iterator[dict[str, Any]]:
    """The newest first, of the last file only: a table may have millions of rows."""
    paths = ResultsTable(folder)
    files = paths.table_files()
    if not files:
        return
    for row in reversed(read_last_rows(files[-1])):
        if is_timed(row) and row["model_digest"] == digest and row["node"] == platform.node():
            on_cpu = (row["device_name"] or "").startswith("cpu")
            if device in ("auto", "cpu" if on_cpu else "cuda"):
                yield row


def is_timed(row: dict[str, Any]) -> bool:
    return bool(row["status"] == Status.OK and row["steps"] and read_seconds(row, "denoise_s") and not row["reused"])


def read_last_rows(file: Path) -> list[dict[str, Any]]:
    table = read_table(file, TIMED_COLUMNS)
    rows: list[dict[str, Any]] = table.slice(max(0, len(table) - 2 * MAX_TIMED_IMAGES)).to_pylist()
    return rows


def read_seconds(row: dict[str, Any], name: str) -> float:
    """0 for what is no time: tables may come from elsewhere."""
    value = row[name]
    return float(value) if value is not None and math.isfinite(value) and value > 0 else 0.0


def get_timing_key(row: dict[str, Any]) -> TimingKey:
    return row["width"], row["height"], row["sampler"]


def count_unet_calls(steps: int) -> int:
    """How often the UNet is called, up to a factor of the sampler's: plms does so once more than it has steps."""
    return steps + 1


def format_time_estimate(images: int, seconds: float | None, speed: MeasuredSpeed | None) -> str:
    """`about 12 min 5 s for 360 images with 2 workers, by the speed of outputs/fruit`"""
    if not images:
        return "no time: nothing is left to generate"
    if seconds is None or speed is None:
        return "not known on this machine yet: submit with --limit 4, then plan again"
    how = f"{count(images, 'image')} with {count(speed.workers, 'worker')}"
    return f"about {format_seconds(seconds)} for {how}, by the speed of {speed.folder}"


# How good is the model?


@dataclass(frozen=True, slots=True)
class ModelQuality:
    """What is known of a model's quantization error."""

    is_packed: bool
    psnr_db: float | None = None  # of the median image, against the float model's
    quantized_as: str = ""  # level and size

    def __str__(self) -> str:
        if not self.is_packed:
            return "float weights, nothing is lost to quantization"
        if self.psnr_db is None:
            return "not measured: no report is in the model folder; quantize writes one"
        return f"{describe_quality(self.psnr_db)} (PSNR {self.psnr_db:.1f} dB, {self.quantized_as})"


def read_model_quality(model: ModelInfo) -> ModelQuality:
    """By the model folder's report."""
    if "quantization_config" not in read_json_object(model.path / "unet" / "config.json"):
        return ModelQuality(is_packed=False)
    report = read_quantization_report(model.path)
    psnr = report.get("median_picture_psnr_db")
    if not isinstance(psnr, int | float) or isinstance(psnr, bool) or not math.isfinite(psnr):
        return ModelQuality(is_packed=True)
    made = f"level {report.get('level')}, {report.get('size')}"
    return ModelQuality(True, float(psnr), to_one_line(made))


def read_quantization_report(folder: Path) -> dict[str, Any]:
    """A model's report; empty where it has none."""
    try:
        found = json.loads(read_file(folder / "report" / "report.json", MAX_JSON_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
