"""A job and its folder: open a new one or one to go on with, and save what it is."""

import contextlib
import secrets
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinysd_batch.config import MAX_IMAGES_PER_ROW, Settings
from tinysd_batch.errors import JobMismatchError, ManifestError, StorageError, UsageError
from tinysd_batch.job.manifest.cells import validate_prompt
from tinysd_batch.job.manifest.changes import ManifestDiff, pair_rows
from tinysd_batch.job.manifest.files import (
    compute_fingerprint,
    get_manifest_stem,
    read_manifest_stamp,
    starts_with_fingerprint,
)
from tinysd_batch.job.manifest.readers import can_append_rows, detect_format
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.inherited_seeds import (
    find_inherited_seeds,
    find_inherited_seeds_in_results,
    read_inherited_seeds,
)
from tinysd_batch.job.state.job import JOB_FILE, STATE_FOLDER, Job, ManifestRecord
from tinysd_batch.job.state.job_json import IMMUTABLE_SETTINGS, check_same_settings, read_job_json, save_job
from tinysd_batch.model.checkpoint.info import ModelInfo, read_model_info
from tinysd_batch.model.text.prompt_syntax import parse_prompt
from tinysd_batch.storage.lock import check_unlocked

__all__ = ["IMMUTABLE_SETTINGS", "JOB_FILE", "STATE_FOLDER", "Job", "open_job", "read_job_json", "save_job"]


def default_job_folder(manifest: Path, name: str | None = None) -> Path:
    """Where the job goes if nobody says. Raises UsageError for a name that is none, or looks like an option."""
    name = get_manifest_stem(manifest) if name is None else name
    if name in ("", ".", "..") or name.startswith("-"):
        raise UsageError(f"{manifest}: no folder can be named after it; name one with -o")
    return Path("outputs") / name


def fill_in_model_defaults(settings: Settings, model: ModelInfo) -> Settings:
    """The settings, with the model's own size, steps and scale where none were given; UsageError for a bad size."""
    check_setting_combinations(settings)
    own = {"height": model.native_px, "width": model.native_px, "steps": model.steps, "scale": model.scale}
    filled = settings.model_copy(update={name: value for name, value in own.items() if getattr(settings, name) is None})
    for name, asked, is_so in (("C", settings.C, model.latent_channels), ("f", settings.f, model.vae_scale_factor)):
        if asked not in (None, is_so):
            raise UsageError(f"{name} = {asked}: with the model {model.name} it is {is_so}, and cannot be chosen")
    for side in ("height", "width"):
        value = getattr(filled, side)
        if value % model.size_multiple_px:
            raise UsageError(
                f"{side} = {value}: must be a multiple of {model.size_multiple_px} with the model {model.name}"
            )
    return filled


def check_setting_combinations(settings: Settings) -> None:
    """What no bound of a single setting tells. Raises UsageError."""
    if settings.inline and settings.address:
        raise UsageError(f"--inline and --address {settings.address}: give one of the two")
    if settings.n_iter * settings.n_samples > MAX_IMAGES_PER_ROW:
        raise UsageError(f"n_iter x n_samples: at most {MAX_IMAGES_PER_ROW} images a row")
    try:
        validate_prompt(settings.negative_prompt)
        parse_prompt(settings.negative_prompt, settings.prompt_syntax)
    except (ValueError, UsageError) as error:
        raise UsageError(f"negative_prompt: {error}") from None


def open_job(manifest: Path, folder: Path, settings: Settings, reuse: Path | None = None) -> Job:
    """The job in `folder`, new or to be resumed. A new one may take images over from the job `reuse`.

    Raises JobMismatchError when images were generated there of another manifest, or with other settings. Writes
    nothing: `save_job` does, once the manifest has been read through.
    """
    detect_format(manifest)
    seen = read_manifest_stamp(manifest)
    check_job_folder(folder)
    digest = compute_fingerprint(manifest)
    model = read_model_info(settings.model)
    job = Job(
        folder, manifest, fill_in_model_defaults(settings, model), model, run_id=uuid.uuid4().hex[:12],
        fingerprint=digest, manifest_stamp=seen,
        seed=settings.seed if settings.seed is not None else secrets.randbelow(2**31),
    )  # fmt: skip
    saved = read_job_json(folder) if (folder / JOB_FILE).exists() else None
    job = inherit_seeds(job, reuse) if saved is None else resume_or_replace(job, saved, reuse)
    if read_manifest_stamp(manifest) != seen:
        raise ManifestError(f"{manifest}: changed while it was read; try again")
    return job


def inherit_seeds(job: Job, reuse: Path | None) -> Job:
    """A new job, with the seeds that the job `reuse` gave to the same rows."""
    if reuse is None:
        return job
    saved = read_reusable_job(reuse, job.folder)
    job = replace(job, reuse=reuse.resolve())
    if saved is not None:
        with contextlib.suppress(StorageError):  # where its rows or seeds cannot be read
            return replace(
                job, inherited_seeds=find_inherited_seeds(reuse / STATE_FOLDER, saved, job.read_rows_with_own_seeds())
            )
    return replace(
        job,
        inherited_seeds=find_inherited_seeds_in_results(reuse, job.read_rows_with_own_seeds()),
        seeds_from_table=True,
    )


def resume_or_replace(job: Job, saved: dict[str, Any], reuse: Path | None) -> Job:
    """Settings and rows bind a job from its first image on; before that another job may take the folder."""
    try:
        return resume_job(job, saved, reuse)
    except JobMismatchError:
        if has_images(job.folder):
            raise
    seed = job.settings.seed if job.settings.seed is not None else saved["seed"]
    return replace(inherit_seeds(replace(job, seed=seed), reuse), replaces_unstarted_job=True)


def resume_job(job: Job, saved: dict[str, Any], reuse: Path | None) -> Job:
    """The job as it was saved. Raises JobMismatchError for other settings, and for rows that are not what they were."""
    check_same_settings(saved, job.manifest, job.folder, job.settings, job.model)
    began_with = Path(saved["reuse"]) if saved.get("reuse") is not None else None
    if reuse is not None and reuse.resolve() != began_with:
        raise JobMismatchError(
            f"{job.folder}: this job was begun {f'with --reuse {began_with}' if began_with else 'without --reuse'}; "
            f"name a new folder with -o"
        )
    given = read_inherited_seeds(job.state_folder) if began_with else {}
    job = replace(
        job,
        seed=saved["seed"],
        manifest_record=ManifestRecord.from_job_json(saved),
        is_new=False,
        reuse=began_with,
        inherited_seeds=given,
    )
    check_rows_only_appended(job)
    if job.settings.strict and job.manifest_record is not None and job.manifest_record.extra_columns:
        next(job.read_manifest(), None)  # raises for a file with columns that are not known
    return job


def check_rows_only_appended(job: Job) -> None:
    """Raises JobMismatchError, with the difference, where the manifest's rows are not those of the job and new ones."""
    record = job.manifest_record
    if record is None or record.fingerprint == job.fingerprint:
        return
    if can_append_rows(job.manifest) and starts_with_fingerprint(job.manifest, record.fingerprint, record.file_bytes):
        return
    change = ManifestDiff.from_pairs(pair_rows(job.snapshot, job.read_manifest()))
    if not change.is_append_only:
        raise JobMismatchError(
            f"{job.folder}: {job.manifest} is not the manifest that this job was started with: {change}. Rows may be "
            f"added at the end only; for another change make a new job, and let it take over what is the same: "
            f"-o NEW_FOLDER --reuse {job.folder}"
        )


def has_images(folder: Path) -> bool:
    """Whether any image was generated in the folder, or failed, by its files or its table."""
    if next(folder.glob("images/*/*"), None) is not None:
        return True
    return any(table["index"].null_count < len(table) for table in ResultsTable(folder).read(["index"]))


def check_job_unchanged(job: Job) -> None:
    """Once the lock is held: nobody may have made or changed the job since `open_job` looked at it."""
    if not (job.folder / JOB_FILE).exists():
        return
    saved = read_job_json(job.folder)
    if job.replaces_unstarted_job:
        if has_images(job.folder):
            raise concurrent_run_error(job)
        return
    check_same_settings(saved, job.manifest, job.folder, job.settings, job.model)
    seen = {job.fingerprint} | ({job.manifest_record.fingerprint} if job.manifest_record else set())
    reuse = str(job.reuse) if job.reuse else None
    if saved["seed"] != job.seed or saved["manifest"]["fingerprint"] not in seen or saved.get("reuse") != reuse:
        raise concurrent_run_error(job)


def concurrent_run_error(job: Job) -> JobMismatchError:
    return JobMismatchError(f"{job.folder}: another run started this job meanwhile; submit again to go on with it")


def read_reusable_job(reuse: Path, folder: Path) -> dict[str, Any] | None:
    """The `job.json` of the job `reuse`; None where it has lost that and its results remain.

    Raises UsageError where `reuse` is no job, or the job itself, and JobLockedError while it runs.
    """
    results = ResultsTable(reuse)
    has_lost_it = not (reuse / JOB_FILE).exists() and bool(results.sealed_files() or results.journal_parts())
    saved = None if has_lost_it else read_job_json(reuse)
    check_job_paths(reuse)
    if reuse.resolve() == folder.resolve():
        raise UsageError(f"--reuse {reuse}: is the folder of the new job, too; name another for that with -o")
    check_unlocked(reuse / STATE_FOLDER / "lock")
    return saved


def check_job_folder(folder: Path) -> None:
    """Raise UsageError where no job can be in this folder, or go on there."""
    check_job_paths(folder)
    results = ResultsTable(folder)
    if not (folder / JOB_FILE).exists() and (results.sealed_files() or results.journal_parts()):
        raise JobMismatchError(
            f"{folder}: holds results but no {JOB_FILE}; choose another folder with -o, which takes over what is the "
            f"same with --reuse {folder}"
        )


def check_job_paths(folder: Path) -> None:
    """The folder itself may be a link, to a larger disk say; what is in it may not lead elsewhere."""
    state, results = folder / STATE_FOLDER, ResultsTable(folder)
    for path in (folder, folder / "images", state, state / "tmp", results.journal, results.parts_folder):
        if path.is_symlink() and path != folder:
            raise UsageError(f"{path}: is a symbolic link; pictures are not written through links")
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file; name a folder for the job with -o")
