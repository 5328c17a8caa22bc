"""`job.json`: what a job is, so that the same command goes on with it and another one is refused."""

import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import tinysd_batch
from tinysd_batch.config import MAX_SEED, Settings
from tinysd_batch.errors import JobMismatchError, UsageError
from tinysd_batch.job.manifest.readers import format_of, is_jsonl
from tinysd_batch.job.manifest.snapshot import READER, Snapshot
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.storage.atomic import read_file, write_atomically
from tinysd_batch.text import normalize_text

JOB_FILE = "job.json"
MAX_JOB_BYTES = 10_000_000
# What decides pixels and files and must not change within a job. `model` is compared by digest, `seed` on its own.
DECIDING = (
    "negative_prompt", "prompt_syntax", "long_prompts", "height", "width", "steps", "scale", "sampler", "eta", "n_iter",
    "n_samples", "fixed_code", "rng", "precision", "format", "quality", "no_metadata", "skip_save",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """What `job.json` says of the manifest and of the snapshot of its rows."""

    fingerprint: str
    rows: int  # number of the last one
    images: int
    invalid_rows: int
    columns: tuple[str, ...] | None  # that nothing is made of; None where 0.1.0 did not note them
    reader: int = READER  # version of the rules by which the rows were read
    lines: int = 0  # of the snapshot
    out_of_order: int = 0  # lines in it that come after one of the same or a higher number
    bytes: int | None = None  # of the manifest's file; None for jobs of 0.1.0
    columns_as_text: bool = False  # carried columns that hold no numbers are text, as 0.1.0 had them

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Self:
        manifest = saved["manifest"]
        columns = manifest.get("columns")
        return cls(
            manifest["fingerprint"], manifest["rows"], saved["images"], saved["invalid_rows"],
            tuple(columns) if columns is not None else None, saved.get("reader", 1),
            manifest.get("lines", manifest["rows"]), manifest.get("out_of_order", 0), manifest.get("bytes"),
            manifest.get("columns_as_text", saved.get("reader", 1) == 1),
        )  # fmt: skip

    @property
    def is_complete(self) -> bool:
        """Whether a new reading of the same bytes would find nothing that the snapshot does not have."""
        return self.columns is not None and (self.reader == READER or not self.invalid_rows)

    @property
    def began_in_0_1_0(self) -> bool:
        """Whether rows were first read by the rules of 0.1.0, whatever `reader` read those that came later."""
        return self.columns_as_text

    def snapshot(self, state: Path) -> Snapshot:
        return Snapshot(state, self.lines, self.out_of_order)

    def as_dict(self, manifest: Path) -> dict[str, Any]:
        return {
            "path": str(manifest),
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "lines": self.lines,
            "out_of_order": self.out_of_order,
            "bytes": self.bytes,
            "columns": list(self.columns or ()),
            "columns_as_text": self.columns_as_text,
        }


def read_job_json(folder: Path) -> dict[str, Any]:
    """Raises UsageError when the folder is no job."""
    path = folder / JOB_FILE
    if not path.exists():
        raise UsageError(f"{folder}: not a job folder, it has no {JOB_FILE}; name the folder that submit printed")
    try:
        saved: dict[str, Any] = json.loads(read_file(path, MAX_JOB_BYTES).decode("utf-8"))
        check_saved(saved)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: damaged: {type(error).__name__}: {error}; put the right one back, or name another folder with -o"
        ) from None
    if saved.get("reader", 1) > READER:
        raise UsageError(
            f"{path}: made by tinysd-batch {saved['version']}, which reads manifests by newer rules than "
            f"{tinysd_batch.__version__}; use that version, or name another folder with -o"
        )
    return saved


def check_saved(saved: dict[str, Any]) -> None:
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
    if format_of(then) != format_of(manifest):
        raise JobMismatchError(
            f"{folder}: this job belongs to the manifest {then}, and {manifest} is read in another way; "
            f"give it a folder of its own with -o"
        )
    differences = [
        f"{name}: {was} in the job, {getattr(settings, name)} now"
        for name in (*DECIDING, *deciding_rows(manifest))
        if (was := in_normal_form(saved["settings"].get(name, Settings.model_fields[name].default)))
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


def in_normal_form(value: Any) -> Any:
    """A setting as it is read today: 0.1.0 kept text as it was written."""
    return normalize_text(value) if isinstance(value, str) else value


def deciding_rows(manifest: Path) -> list[str]:
    """Settings that decide which rows there are, or are good, in a manifest of this format."""
    if is_jsonl(manifest):
        return ["strict"]
    return ["interpret_lines"] if format_of(manifest) == ".txt" else []


def write_job_json(
    folder: Path, manifest: Path, record: ManifestRecord, settings: Settings, model: ModelInfo, *, seed: int,
    run_id: str, reuse: Path | None,
) -> None:  # fmt: skip
    """Keeps the time of the first run. Raises StorageError."""
    path = folder / JOB_FILE
    now = datetime.now(UTC).isoformat()
    content = {
        "version": tinysd_batch.__version__,
        "reader": record.reader,
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
