"""Read and write `job.json`, which identifies a job: the same command resumes it, a different one is refused."""

import json
import os
import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinysd_batch.errors import JobMismatchError, UsageError
from tinysd_batch.job.manifest.readers import detect_format, is_json_manifest
from tinysd_batch.job.manifest.snapshot import READER_VERSION, SnapshotWriter
from tinysd_batch.job.state.inherited_seeds import save_inherited_seeds
from tinysd_batch.job.state.job import JOB_FILE, Job, ManifestRecord
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.settings.declaration import Effect
from tinysd_batch.settings.limits import MAX_SEED
from tinysd_batch.settings.schema import SETTINGS, Settings
from tinysd_batch.storage.atomic import read_file, write_atomically
from tinysd_batch.storage.filesystem import storage_errors
from tinysd_batch.text import normalize_if_text
from tinysd_batch.version import __version__

MAX_JOB_JSON_BYTES = 10_000_000
# Settings that must not change within a job. `model` is compared by its digest, and `seed` separately.
IMMUTABLE_SETTINGS = tuple(
    name
    for name, setting in SETTINGS.items()
    if setting.effect in (Effect.PIXELS, Effect.IMAGES, Effect.FILES) and name not in ("model", "seed")
)


def read_job_json(folder: Path) -> dict[str, Any]:
    """Read and check `job.json`. Raises UsageError if the folder is not a job, or the file is damaged or too new."""
    path = folder / JOB_FILE
    if not path.exists():
        raise UsageError(f"{folder}: not a job folder, it has no {JOB_FILE}; name the folder that submit printed")
    try:
        saved: dict[str, Any] = json.loads(read_file(path, MAX_JOB_JSON_BYTES).decode("utf-8"))
        check_job_json(saved)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: damaged: {type(error).__name__}: {error}; restore the file, or name another folder with -o"
        ) from None
    if saved.get("reader", 1) > READER_VERSION:
        raise UsageError(
            f"{path}: written by tinysd-batch {saved['version']}, which reads manifests by newer rules than "
            f"{__version__}; use that version, or name another folder with -o"
        )
    return saved


def check_job_json(saved: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError if the content of `job.json` is not what `save_job` writes."""
    manifest = saved["manifest"]
    columns = manifest.get("columns", [])
    texts = (
        saved["version"],
        saved["created_at"],
        saved["model"]["name"],
        saved["model"]["digest"],
        manifest["path"],
        manifest["fingerprint"],
    )
    numbers = (
        saved["seed"],
        saved["images"],
        saved["invalid_rows"],
        manifest["rows"],
        saved.get("reader", 1),
        manifest.get("lines", 0),
        manifest.get("out_of_order", 0),
        manifest.get("bytes") or 0,
    )
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise TypeError('"columns" must be a list of strings')
    if not isinstance(saved["settings"], dict) or not all(isinstance(text, str) for text in texts):
        raise TypeError('"settings" must be an object, and names, paths, times and digests must be strings')
    if not isinstance(manifest.get("columns_as_text", False), bool):
        raise TypeError('"columns_as_text" must be true or false')
    if not isinstance(saved.get("reuse"), str | None):
        raise TypeError('"reuse" must be a string or null')
    if not all(type(number) is int and 0 <= number <= MAX_SEED for number in numbers):
        raise ValueError(
            f'"seed", "reader", "images", "invalid_rows" and numbers in "manifest" must be integers in 0..{MAX_SEED}'
        )


def check_same_settings(
    saved: dict[str, Any], manifest: Path, folder: Path, settings: Settings, model: ModelInfo
) -> None:
    """Raise JobMismatchError, listing the differences, if these settings do not continue the job."""
    old_manifest = Path(saved["manifest"]["path"])
    if detect_format(old_manifest) != detect_format(manifest):
        raise JobMismatchError(
            f"{folder}: this job belongs to the manifest {old_manifest}, and {manifest} has another format; "
            f"name another folder with -o"
        )
    differences = [
        f"{name}: {old} in the job, {new} now"
        for name in (*IMMUTABLE_SETTINGS, *get_immutable_reader_settings(manifest))
        if (old := read_saved_setting(saved, name)) != (new := SETTINGS[name].to_json(settings))
    ]
    if saved["model"]["digest"] != model.digest:
        differences.append(f"model: {saved['model']['name']} in the job, {model.name} now (the weights differ)")
    if settings.seed is not None and settings.seed != saved["seed"]:
        differences.append(f"seed: {saved['seed']} in the job, {settings.seed} now")
    if differences:
        raise JobMismatchError(
            f"{folder}: the job was started with other settings: {'; '.join(differences)}. "
            f"Use the same settings to resume it, or name another folder with -o"
        )


def read_saved_setting(saved: dict[str, Any], name: str) -> Any:
    """Return a setting of `job.json`, normalized because 0.1.0 stored text as the user wrote it."""
    return normalize_if_text(saved["settings"].get(name, SETTINGS[name].default))


def get_immutable_reader_settings(manifest: Path) -> list[str]:
    """Return the names of settings that determine which rows a manifest of this format has, or which are valid."""
    if is_json_manifest(manifest):
        return ["strict"]
    return ["interpret_lines"] if detect_format(manifest) == ".txt" else []


def write_job_json(
    folder: Path,
    manifest: Path,
    record: ManifestRecord,
    settings: Settings,
    model: ModelInfo,
    *,
    seed: int,
    run_id: str,
    reuse: Path | None,
) -> None:
    """Write `job.json`, with the time of the first run. Raises StorageError."""
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
        "settings": {name: value for name, value in settings.to_json().items() if name != "seed"},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(text.encode("utf-8", "backslashreplace"), path)  # names that are not UTF-8 become JSON escapes


def save_job(job: Job, images: int, invalid_rows: int, columns: list[str], snapshot: SnapshotWriter | None) -> Job:
    """Write the snapshot, the inherited seeds and then `job.json`, and return the job as it is saved now.

    If the run is killed in between, the snapshot has more lines than `job.json` counts, and readers ignore those.

    Args:
        job: The job to save.
        images: Number of images in the job.
        invalid_rows: Number of invalid rows.
        columns: Names of extra columns of the manifest.
        snapshot: All rows of the job, if they have to be saved.
    """
    with storage_errors(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    if snapshot is not None:
        snapshot.save(job.state_folder)
    if job.is_new and job.reuse is not None:
        save_inherited_seeds(job.inherited_seeds, job.state_folder)
    old = job.manifest_record
    record = ManifestRecord(
        fingerprint=job.fingerprint,
        last_row_number=snapshot.highest_row_number if snapshot else old.last_row_number if old else 0,
        images=images,
        invalid_rows=invalid_rows,
        extra_columns=tuple(columns),
        snapshot_lines=snapshot.count if snapshot else old.snapshot_lines if old else 0,
        out_of_order=snapshot.out_of_order if snapshot else old.out_of_order if old else 0,
        file_bytes=job.manifest_stamp[0],
        columns_as_text=old.columns_as_text if old else False,
    )
    write_job_json(
        job.folder, job.manifest, record, job.settings, job.model, seed=job.seed, run_id=job.run_id, reuse=job.reuse
    )
    return replace(job, manifest_record=record, replaces_unstarted_job=False)
