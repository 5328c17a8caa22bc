"""`job.json`: what a job is, so that the same command goes on with it and another one is refused."""

import json
import os
import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinysd_batch.config import MAX_SEED, Settings
from tinysd_batch.errors import JobMismatchError, UsageError
from tinysd_batch.job.manifest.readers import detect_format, is_json_manifest
from tinysd_batch.job.manifest.snapshot import READER_VERSION, SnapshotWriter
from tinysd_batch.job.state.inherited_seeds import save_inherited_seeds
from tinysd_batch.job.state.job import JOB_FILE, Job, ManifestRecord
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.storage.atomic import read_file, storage_errors, write_atomically
from tinysd_batch.text import normalize_text
from tinysd_batch.version import __version__

MAX_JOB_JSON_BYTES = 10_000_000
# What decides pixels and files and must not change within a job. `model` is compared by digest, `seed` on its own.
IMMUTABLE_SETTINGS = (
    "negative_prompt", "prompt_syntax", "long_prompts", "height", "width", "steps", "scale", "sampler", "eta", "n_iter",
    "n_samples", "fixed_code", "rng", "precision", "format", "quality", "no_metadata", "skip_save",
)  # fmt: skip


def read_job_json(folder: Path) -> dict[str, Any]:
    """Raises UsageError when the folder is no job."""
    path = folder / JOB_FILE
    if not path.exists():
        raise UsageError(f"{folder}: not a job folder, it has no {JOB_FILE}; name the folder that submit printed")
    try:
        saved: dict[str, Any] = json.loads(read_file(path, MAX_JOB_JSON_BYTES).decode("utf-8"))
        check_job_json(saved)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: damaged: {type(error).__name__}: {error}; put the right one back, or name another folder with -o"
        ) from None
    if saved.get("reader", 1) > READER_VERSION:
        raise UsageError(
            f"{path}: made by tinysd-batch {saved['version']}, which reads manifests by newer rules than "
            f"{__version__}; use that version, or name another folder with -o"
        )
    return saved


def check_job_json(saved: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where `job.json` is not as `save_job` writes it."""
    manifest = saved["manifest"]
    columns = manifest.get("columns", [])
    texts = (
        saved["version"], saved["created_at"], saved["model"]["name"], saved["model"]["digest"], manifest["path"],
        manifest["fingerprint"],
    )  # fmt: skip
    numbers = (
        saved["seed"], saved["images"], saved["invalid_rows"], manifest["rows"], saved.get("reader", 1),
        manifest.get("lines", 0), manifest.get("out_of_order", 0), manifest.get("bytes") or 0,
    )  # fmt: skip
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise TypeError("columns are no names")
    if not isinstance(saved["settings"], dict) or not all(isinstance(text, str) for text in texts):
        raise TypeError("an entry is of another type than was written")
    if not isinstance(manifest.get("columns_as_text", False), bool):
        raise TypeError("columns_as_text is neither true nor false")
    if not isinstance(saved.get("reuse"), str | None):
        raise TypeError("reuse is no text")
    if not all(type(number) is int and 0 <= number <= MAX_SEED for number in numbers):
        raise ValueError("seed, reader, images, invalid_rows or a number of manifest is not what was written")


def check_same_settings(
    saved: dict[str, Any], manifest: Path, folder: Path, settings: Settings, model: ModelInfo
) -> None:
    then = Path(saved["manifest"]["path"])
    if detect_format(then) != detect_format(manifest):
        raise JobMismatchError(
            f"{folder}: this job belongs to the manifest {then}, and {manifest} is read in another way; "
            f"give it a folder of its own with -o"
        )
    differences = [
        f"{name}: {was} in the job, {getattr(settings, name)} now"
        for name in (*IMMUTABLE_SETTINGS, *get_immutable_reader_settings(manifest))
        if (was := normalize_saved_value(saved["settings"].get(name, Settings.model_fields[name].default)))
        != getattr(settings, name)
    ]
    if saved["model"]["digest"] != model.digest:
        differences.append(f"model: {saved['model']['name']} in the job, {model.name} now (the weights differ)")
    if settings.seed is not None and settings.seed != saved["seed"]:
        differences.append(f"seed: {saved['seed']} in the job, {settings.seed} now")
    if differences:
        raise JobMismatchError(
            f"{folder}: the job was started with other settings: {'; '.join(differences)}. "
            f"Use the same settings to go on, or another folder with -o"
        )


def normalize_saved_value(value: Any) -> Any:
    """A setting as it is read today: 0.1.0 kept text as it was written."""
    return normalize_text(value) if isinstance(value, str) else value


def get_immutable_reader_settings(manifest: Path) -> list[str]:
    """Settings that decide which rows there are, or are good, in a manifest of this format."""
    if is_json_manifest(manifest):
        return ["strict"]
    return ["interpret_lines"] if detect_format(manifest) == ".txt" else []


def write_job_json(
    folder: Path, manifest: Path, record: ManifestRecord, settings: Settings, model: ModelInfo, *, seed: int,
    run_id: str, reuse: Path | None,
) -> None:  # fmt: skip
    """Keeps the time of the first run. Raises StorageError."""
    path = folder / JOB_FILE
    now = datetime.now(UTC).isoformat()
    content = {
        "version": __version__,
        "reader": record.reader_version,
        "created_at": read_job_json(folder)["created_at"] if path.exists() else now,
        "last_run": {"run_id": run_id, "started_at": now, "host": platform.node(), "pid": os.getpid()},
        "seed": seed,
        "images": record.images,
        "invalid_rows": record.invalid_rows,
        "model": {"name": model.name, "digest": model.digest, "path": str(model.path.resolve())},
        "manifest": record.as_dict(manifest.resolve()),
        "reuse": str(reuse) if reuse else None,
        "settings": settings.model_dump(exclude={"seed"}),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(text.encode("utf-8", "backslashreplace"), path)  # names that are no UTF-8 become JSON's escapes


def save_job(job: Job, images: int, invalid_rows: int, columns: list[str], kept: SnapshotWriter | None) -> Job:
    """Write `job.json`, and before it the rows and seeds that it speaks of; return the job as it stands there now.

    A run that is killed in between leaves more rows than `job.json` counts, and those are not looked at.
    """
    with storage_errors(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    if kept is not None:
        kept.save(job.state_folder)
    if job.is_new and job.reuse is not None:
        save_inherited_seeds(job.inherited_seeds, job.state_folder)
    before = job.manifest_record
    record = ManifestRecord(
        fingerprint=job.fingerprint, rows=kept.highest_row_number if kept else before.rows if before else 0, images=images,
        invalid_rows=invalid_rows, extra_columns=tuple(columns), snapshot_lines=kept.count if kept else before.snapshot_lines if before else 0,
        out_of_order=kept.out_of_order if kept else before.out_of_order if before else 0, file_bytes=job.manifest_stamp[0],
        columns_as_text=before.columns_as_text if before else False,
    )  # fmt: skip
    write_job_json(
        job.folder, job.manifest, record, job.settings, job.model, seed=job.seed, run_id=job.run_id, reuse=job.reuse
    )
    return replace(job, manifest_record=record, replaces_unstarted_job=False)
