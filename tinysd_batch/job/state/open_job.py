"""Open a job: start a new one in its folder, or resume the one that is there."""

import contextlib
import secrets
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinysd_batch.errors import JobMismatchError, ManifestError, StorageError, UsageError
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
from tinysd_batch.job.state.job_json import check_same_settings, read_job_json
from tinysd_batch.model.checkpoint.info import ModelInfo, read_model_info
from tinysd_batch.model.text.prompt_syntax import parse_prompt
from tinysd_batch.settings.limits import MAX_IMAGES_PER_ROW
from tinysd_batch.settings.schema import EMBEDDED_MODEL, SETTINGS, Settings
from tinysd_batch.settings.sources import SettingValues
from tinysd_batch.storage.lock import check_unlocked
from tinysd_batch.text import show_value


def default_job_folder(manifest: Path, name: str | None = None) -> Path:
    """Return the job folder if the user names none. Raises UsageError if `name` cannot be that of a folder."""
    name = get_manifest_stem(manifest) if name is None else name
    if name in ("", ".", "..") or name.startswith("-"):
        raise UsageError(f"{manifest}: no folder can be named after it; name one with -o")
    return Path("outputs") / name


def resolve_settings(values: SettingValues, model: ModelInfo) -> Settings:
    """Return complete settings: what the user did not give has the model's default or the program's.

    Raises:
        UsageError: A setting contradicts another one or the model.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        try:
            SETTINGS[name].value_type.for_model(model).parse(value)
        except ValueError as error:
            raise UsageError(f"{name} = {show_value(value)}: {error} ({model.name})") from None
    defaults = {name: getattr(model, each.model_default) for name, each in SETTINGS.items() if each.model_default}
    settings = Settings(**{**defaults, **given})
    check_setting_combinations(settings)
    return settings


def check_setting_combinations(settings: Settings) -> None:
    """Raise UsageError for settings that contradict each other."""
    if settings.inline and settings.address:
        raise UsageError(f"--inline and --address {settings.address}: give one of the two")
    images_per_row = settings.n_iter * settings.n_samples
    if images_per_row > MAX_IMAGES_PER_ROW:
        raise UsageError(f"n_iter x n_samples = {images_per_row}: at most {MAX_IMAGES_PER_ROW} images a row")
    try:
        parse_prompt(settings.negative_prompt, settings.prompt_syntax)
    except UsageError as error:
        raise UsageError(f"negative_prompt: {error}") from None


def open_job(manifest: Path, folder: Path, values: SettingValues, reuse: Path | None = None) -> Job:
    """Return the job in `folder`, new or to be resumed. Writes nothing: `save_job` does, after the manifest was read.

    Args:
        manifest: Path of the manifest.
        folder: The job folder, which need not exist.
        values: The settings from all sources, parsed.
        reuse: Folder of an earlier job, whose images a new job takes over where they would be the same.

    Raises:
        JobMismatchError: The folder has images of another manifest, or generated with other settings.
    """
    detect_format(manifest)
    stamp = read_manifest_stamp(manifest)
    check_job_folder(folder)
    digest = compute_fingerprint(manifest)
    model = read_model_info(values.get("model", EMBEDDED_MODEL))
    settings = resolve_settings(values, model)
    job = Job(
        folder,
        manifest,
        settings,
        model,
        run_id=uuid.uuid4().hex[:12],
        fingerprint=digest,
        manifest_stamp=stamp,
        seed=settings.seed if settings.seed is not None else secrets.randbelow(2**31),
    )
    saved = read_job_json(folder) if (folder / JOB_FILE).exists() else None
    job = inherit_seeds(job, reuse) if saved is None else resume_or_replace(job, saved, reuse)
    if read_manifest_stamp(manifest) != stamp:
        raise ManifestError(f"{manifest}: changed while it was read; try again")
    return job


def inherit_seeds(job: Job, reuse: Path | None) -> Job:
    """Return a new job with the seeds that the job `reuse` gave to the same rows."""
    if reuse is None:
        return job
    saved = read_reusable_job(reuse, job.folder)
    job = replace(job, reuse=reuse.resolve())
    if saved is not None:
        with contextlib.suppress(StorageError):  # if its rows or seeds cannot be read, use the results
            seeds = find_inherited_seeds(reuse / STATE_FOLDER, saved, job.read_rows_with_own_seeds())
            return replace(job, inherited_seeds=seeds)
    seeds = find_inherited_seeds_in_results(reuse, job.read_rows_with_own_seeds())
    return replace(job, inherited_seeds=seeds, seeds_from_table=True)


def resume_or_replace(job: Job, saved: dict[str, Any], reuse: Path | None) -> Job:
    """Resume the job that is saved, or replace it if it does not match and has no image yet."""
    try:
        return resume_job(job, saved, reuse)
    except JobMismatchError:
        if has_images(job.folder):
            raise
    seed = job.settings.seed if job.settings.seed is not None else saved["seed"]
    return replace(inherit_seeds(replace(job, seed=seed), reuse), replaces_unstarted_job=True)


def resume_job(job: Job, saved: dict[str, Any], reuse: Path | None) -> Job:
    """Return the job as it was saved. Raises JobMismatchError if settings or earlier rows have changed."""
    check_same_settings(saved, job.manifest, job.folder, job.settings, job.model)
    saved_reuse = Path(saved["reuse"]) if saved.get("reuse") is not None else None
    if reuse is not None and reuse.resolve() != saved_reuse:
        option = f"with --reuse {saved_reuse}" if saved_reuse else "without --reuse"
        raise JobMismatchError(f"{job.folder}: this job was started {option}; name a new folder with -o")
    job = replace(
        job,
        seed=saved["seed"],
        manifest_record=ManifestRecord.from_job_json(saved),
        is_new=False,
        reuse=saved_reuse,
        inherited_seeds=read_inherited_seeds(job.state_folder) if saved_reuse else {},
    )
    check_rows_only_appended(job)
    if job.settings.strict and job.manifest_record is not None and job.manifest_record.extra_columns:
        next(job.read_manifest(), None)  # raises ManifestError for unknown columns
    return job


def check_rows_only_appended(job: Job) -> None:
    """Raise JobMismatchError, with the difference, unless the manifest has the rows of the job followed by new ones."""
    record = job.manifest_record
    if record is None or record.fingerprint == job.fingerprint:
        return
    if can_append_rows(job.manifest) and starts_with_fingerprint(job.manifest, record.fingerprint, record.file_bytes):
        return
    diff = ManifestDiff.from_pairs(pair_rows(job.snapshot, job.read_manifest()))
    if not diff.is_append_only:
        raise JobMismatchError(
            f"{job.folder}: {job.manifest} is not the manifest that this job was started with: {diff}. Rows may only "
            f"be added at the end; for other changes start a new job that reuses equal images: "
            f"-o NEW_FOLDER --reuse {job.folder}"
        )


def has_images(folder: Path) -> bool:
    """Whether the folder has an image file or a row of an image, generated or failed."""
    if next(folder.glob("images/*/*"), None) is not None:
        return True
    return any(table["index"].null_count < len(table) for table in ResultsTable(folder).read(["index"]))


def check_job_unchanged(job: Job) -> None:
    """Raise JobMismatchError if another run changed the job between `open_job` and taking the lock."""
    if not (job.folder / JOB_FILE).exists():
        return
    saved = read_job_json(job.folder)
    if job.replaces_unstarted_job:
        if has_images(job.folder):
            raise concurrent_run_error(job)
        return
    check_same_settings(saved, job.manifest, job.folder, job.settings, job.model)
    fingerprints = {job.fingerprint} | ({job.manifest_record.fingerprint} if job.manifest_record else set())
    reuse = str(job.reuse) if job.reuse else None
    if saved["seed"] != job.seed or saved["manifest"]["fingerprint"] not in fingerprints or saved.get("reuse") != reuse:
        raise concurrent_run_error(job)


def concurrent_run_error(job: Job) -> JobMismatchError:
    return JobMismatchError(f"{job.folder}: another run started this job in the meantime; submit again to resume it")


def read_reusable_job(reuse: Path, folder: Path) -> dict[str, Any] | None:
    """Read the `job.json` of the job `reuse`.

    Returns:
        Its content; None if the file is lost and the results remain.

    Raises:
        UsageError: `reuse` is not a job, or is the folder of the new job.
        JobLockedError: The job is running.
    """
    is_lost = not (reuse / JOB_FILE).exists() and has_results(reuse)
    saved = None if is_lost else read_job_json(reuse)
    check_job_paths(reuse)
    if reuse.resolve() == folder.resolve():
        raise UsageError(f"--reuse {reuse}: is also the folder of the new job; name another folder for that with -o")
    check_unlocked(reuse / STATE_FOLDER / "lock")
    return saved


def check_job_folder(folder: Path) -> None:
    """Raise UsageError if no job can be started or resumed in this folder."""
    check_job_paths(folder)
    if not (folder / JOB_FILE).exists() and has_results(folder):
        raise JobMismatchError(
            f"{folder}: holds results but no {JOB_FILE}; name another folder with -o, and reuse equal images with "
            f"--reuse {folder}"
        )


def has_results(folder: Path) -> bool:
    """Whether the folder has any file of a results table."""
    results = ResultsTable(folder)
    return bool(results.sealed_files() or results.journal_parts())


def check_job_paths(folder: Path) -> None:
    """Raise UsageError for files and symbolic links in the place of job folders.

    The job folder itself may be a link, for example to a larger disk, but a folder in it may not lead elsewhere.
    """
    state, results = folder / STATE_FOLDER, ResultsTable(folder)
    for path in (folder, folder / "images", state, state / "tmp", results.journal, results.parts_folder):
        if path.is_symlink() and path != folder:
            raise UsageError(f"{path}: is a symbolic link; images are not written through links")
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file; name a folder for the job with -o")
