"""The job folder: `job.json` says what the job is, so that the same command goes on and another one is refused."""

import contextlib
import json
import os
import platform
import secrets
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tinysd_batch
from tinysd_batch.config import MAX_IMAGES_PER_ROW, MAX_SEED, Settings
from tinysd_batch.errors import JobMismatchError, ManifestError, UsageError
from tinysd_batch.job.formats import format_of, is_jsonl
from tinysd_batch.job.manifest import Defaults, check_prompt, fingerprint, read_rows
from tinysd_batch.job.manifest_file import bare_name
from tinysd_batch.job.plan import Common
from tinysd_batch.job.precision_record import RECORD_FILE
from tinysd_batch.job.rows import ROWS_FILE, Change, RowKeeper, as_line, read_kept_lines
from tinysd_batch.job.seeds import SEEDS_FILE, find_seeds, read_seeds, save_seeds
from tinysd_batch.job.tables import ResultsPaths
from tinysd_batch.model.info import ModelInfo, read_model_info
from tinysd_batch.model.prompts import parse_prompt
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.storage import check_unlocked, read_file, storage_errors, write_atomically

JOB_FILE = "job.json"
STATE_FOLDER = "_tinysd"
MAX_JOB_BYTES = 10_000_000
# What decides pixels and files and must not change within a job. `model` is compared by digest, `seed` on its own.
DECIDING = (
    "negative_prompt", "prompt_syntax", "long_prompts", "height", "width", "steps", "scale", "sampler", "eta", "n_iter",
    "n_samples", "fixed_code", "rng", "precision", "format", "quality", "no_metadata", "skip_save",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """What `job.json` says of the manifest."""

    fingerprint: str
    rows: int
    images: int
    invalid_rows: int
    columns: tuple[str, ...] | None  # that we do not know; None where another version of us read the manifest

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Known":
        manifest = saved["manifest"]
        columns = manifest.get("columns") if saved["version"] == tinysd_batch.__version__ else None
        return cls(
            manifest["fingerprint"], manifest["rows"], saved["images"], saved["invalid_rows"],
            tuple(columns) if columns is not None else None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a run needs besides its workers."""

    folder: Path
    manifest: Path
    settings: Settings  # resolved: no None among height, width, steps and scale
    model: ModelInfo
    seed: int
    run_id: str
    fingerprint: str  # of the manifest
    manifest_stamp: tuple[int, int]
    known: Known | None = None  # None: a new job
    appended_rows: int = 0  # since the last run
    reuse: Path | None = None  # the job that pictures are taken over from
    given_seeds: dict[int, int] = field(default_factory=dict)  # row -> its first image's seed, as `reuse` had it

    @property
    def state(self) -> Path:
        return self.folder / STATE_FOLDER

    @property
    def scratch(self) -> Path:
        return self.state / "tmp"

    @property
    def stop_file(self) -> Path:
        return self.state / "stop"

    @property
    def precision_file(self) -> Path:
        return self.state / RECORD_FILE

    def defaults(self) -> Defaults:
        """What a row that says nothing gets."""
        return defaults_of(self.settings, self.model)

    def common(self) -> Common:
        """What all images have in common."""
        return common_of(self.settings, self.model, self.seed)

    @property
    def rows_to_keep(self) -> bool:
        """Whether the manifest's rows are not all kept in the folder yet."""
        return self.known is None or self.known.fingerprint != self.fingerprint

    @property
    def is_surveyed(self) -> bool:
        """Whether a run of this version has read all of just this manifest, and would find nothing new in it."""
        known = self.known
        if known is None or known.columns is None or known.fingerprint != self.fingerprint:
            return False
        return not (self.settings.strict and known.columns)

    def read_rows(self) -> Iterator[Row | InvalidRow]:
        """The manifest's rows, with the seeds that another job gave them."""
        for row in self.read_own_rows():
            given = self.given_seeds.get(row.number)
            yield replace(row, seed=given) if given is not None and isinstance(row, Row) else row

    def read_own_rows(self) -> Iterator[Row | InvalidRow]:
        """The manifest's rows as they stand there."""
        return read_rows(self.manifest, self.defaults(), self.settings.strict)

    def run_columns(self) -> dict[str, Any]:
        """The results columns that are the same for all rows of a run."""
        return {
            "model": self.model.name,
            "model_digest": self.model.digest,
            "run_id": self.run_id,
            "version": tinysd_batch.__version__,
        }


def defaults_of(settings: Settings, model: ModelInfo) -> Defaults:
    """What a row gets that says nothing, from settings without gaps."""
    chosen = settings.model_dump(include={field.name for field in fields(Defaults)} - {"step_px"})
    return Defaults(step_px=model.step_px, **chosen)


def common_of(settings: Settings, model: ModelInfo, seed: int) -> Common:
    return Common(
        seed=seed, model_digest=model.digest, precision=settings.precision, long_prompts=settings.long_prompts,
        fixed_code=settings.fixed_code, suffix=settings.format, rng=settings.rng,
    )  # fmt: skip


def default_folder(manifest: Path, name: str | None = None) -> Path:
    """Where the job goes if nobody says. Raises UsageError for a name that is none, or looks like an option."""
    name = bare_name(manifest) if name is None else name
    if name in ("", ".", "..") or name.startswith("-"):
        raise UsageError(f"{manifest}: no folder can be named after it; name one with -o")
    return Path("outputs") / name


def fill_in_model_defaults(settings: Settings, model: ModelInfo) -> Settings:
    """The settings, with the model's own size, steps and scale where none were given; UsageError for a bad size."""
    check_settings(settings)
    own = {"height": model.native_px, "width": model.native_px, "steps": model.steps, "scale": model.scale}
    filled = settings.model_copy(update={name: value for name, value in own.items() if getattr(settings, name) is None})
    for name, asked, is_so in (("C", settings.C, model.channels), ("f", settings.f, model.factor)):
        if asked not in (None, is_so):
            raise UsageError(f"{name} = {asked}: with the model {model.name} it is {is_so}, and cannot be chosen")
    for side in ("height", "width"):
        value = getattr(filled, side)
        if value % model.step_px:
            raise UsageError(f"{side} = {value}: must be a multiple of {model.step_px} with the model {model.name}")
    return filled


def check_settings(settings: Settings) -> None:
    """What no bound of a single setting tells. Raises UsageError."""
    if settings.inline and settings.address:
        raise UsageError(f"--inline and --address {settings.address}: give one of the two")
    if settings.n_iter * settings.n_samples > MAX_IMAGES_PER_ROW:
        raise UsageError(f"n_iter x n_samples: at most {MAX_IMAGES_PER_ROW} images a row")
    try:
        check_prompt(settings.negative_prompt)
        parse_prompt(settings.negative_prompt, settings.prompt_syntax)
    except (ValueError, UsageError) as error:
        raise UsageError(f"negative_prompt: {error}") from None


def open_job(manifest: Path, folder: Path, settings: Settings, reuse: Path | None = None) -> Job:
    """The job in `folder`, new or to be resumed. A new one may take pictures over from the job `reuse`.

    Raises JobMismatchError when the folder holds another manifest's job, or one whose pixels other settings decided.
    Writes nothing: `save_job` does, once the manifest has been read through.
    """
    format_of(manifest)
    seen = stamp(manifest)
    check_folder(folder)
    found = fingerprint(manifest)
    model = read_model_info(settings.model)
    filled = fill_in_model_defaults(settings, model)
    saved = read_job_json(folder) if (folder / JOB_FILE).exists() else None
    if saved is not None:
        check_same_settings(saved, manifest, folder, filled, model)
    job = Job(
        folder, manifest, filled, model, run_id=uuid.uuid4().hex[:12], fingerprint=found, manifest_stamp=seen,
        seed=settings.seed if settings.seed is not None else secrets.randbelow(2**31),
    )  # fmt: skip
    job = start_from(job, reuse) if saved is None else go_on_with(job, saved, reuse)
    if stamp(manifest) != seen:
        raise ManifestError(f"{manifest}: changed while it was read; try again")
    return job


def start_from(job: Job, reuse: Path | None) -> Job:
    """A new job, with the seeds that the job `reuse` gave to the same rows."""
    if reuse is None:
        return job
    check_reusable(reuse, job.folder)
    given = find_seeds(reuse / STATE_FOLDER, read_job_json(reuse), job.read_own_rows())
    return replace(job, reuse=reuse.resolve(), given_seeds=given)


def go_on_with(job: Job, saved: dict[str, Any], reuse: Path | None) -> Job:
    """The job as it was saved, and grown if rows were appended. Raises JobMismatchError for any other change."""
    began_with = Path(saved["reuse"]) if saved.get("reuse") is not None else None
    if reuse is not None and reuse.resolve() != began_with:
        raise JobMismatchError(
            f"{job.folder}: this job was begun {f'with --reuse {began_with}' if began_with else 'without --reuse'}; "
            f"name a new folder with -o"
        )
    known = Known.of(saved)
    given = read_seeds(job.state) if began_with else {}
    job = replace(job, seed=saved["seed"], known=known, reuse=began_with, given_seeds=given)
    return replace(job, appended_rows=count_appended(job, known)) if job.rows_to_keep else job


def count_appended(job: Job, known: Known) -> int:
    """How many rows the manifest has grown by. Raises JobMismatchError, with the difference, where rows changed."""
    rows_now = (as_line(row) for row in job.read_own_rows())
    change = Change.between(read_kept_lines(job.state, known.rows), rows_now)
    if change.appended is None:
        raise JobMismatchError(
            f"{job.folder}: {job.manifest} is not the manifest that this job was started with: {change}. Rows may be "
            f"added at the end only; for another change make a new job, and let it take over what is the same: "
            f"-o NEW_FOLDER --reuse {job.folder}"
        )
    return change.appended


def stamp(manifest: Path) -> tuple[int, int]:
    """Size and time of the last change: what tells quickly that a file was touched."""
    try:
        status = manifest.stat()
    except FileNotFoundError:
        raise ManifestError(f"{manifest}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{manifest}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    return status.st_size, status.st_mtime_ns


def check_still_same_job(job: Job) -> None:
    """Once the lock is held: nobody may have made or changed the job since `open_job` looked at it."""
    if not (job.folder / JOB_FILE).exists():
        return
    saved = read_job_json(job.folder)
    check_same_settings(saved, job.manifest, job.folder, job.settings, job.model)
    seen = {job.fingerprint} | ({job.known.fingerprint} if job.known else set())
    reuse = str(job.reuse) if job.reuse else None
    if saved["seed"] != job.seed or saved["manifest"]["fingerprint"] not in seen or saved.get("reuse") != reuse:
        raise JobMismatchError(f"{job.folder}: another run started this job meanwhile; submit again to go on with it")


def check_reusable(reuse: Path, folder: Path) -> None:
    """Raises UsageError where `reuse` is no job, or the job itself, and JobLockedError while it runs."""
    read_job_json(reuse)
    check_folder(reuse)
    if reuse.resolve() == folder.resolve():
        raise UsageError(f"--reuse {reuse}: is the folder of the new job, too; name another for that with -o")
    check_unlocked(reuse / STATE_FOLDER / "lock")


def check_folder(folder: Path) -> None:
    """The folder itself may be a link, to a larger disk say; what is in it may not lead elsewhere."""
    state, results = folder / STATE_FOLDER, ResultsPaths(folder)
    for path in (folder, folder / "images", state, state / "tmp", results.journal, results.parts_folder):
        if path.is_symlink() and path != folder:
            raise UsageError(f"{path}: is a symbolic link; pictures are not written through links")
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file; name a folder for the job with -o")
    if not (folder / JOB_FILE).exists() and (results.sealed_files() or results.journal_parts()):
        raise JobMismatchError(f"{folder}: holds results but no {JOB_FILE}; choose another folder with -o")


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
    return saved


def check_saved(saved: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where `job.json` is not as `save_job` writes it."""
    columns = saved["manifest"].get("columns", [])
    texts = (
        saved["version"], saved["created_at"], saved["model"]["name"], saved["model"]["digest"],
        saved["manifest"]["path"], saved["manifest"]["fingerprint"],
    )  # fmt: skip
    numbers = saved["seed"], saved["images"], saved["invalid_rows"], saved["manifest"]["rows"]
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise TypeError("columns are no names")
    if not isinstance(saved["settings"], dict) or not all(isinstance(text, str) for text in texts):
        raise TypeError("an entry is of another type than was written")
    if not isinstance(saved.get("reuse"), str | None):
        raise TypeError("reuse is no text")
    if not all(type(number) is int and 0 <= number <= MAX_SEED for number in numbers):
        raise ValueError("seed, images, invalid_rows or rows is no number of theirs")


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
        for name in (*DECIDING, *(["strict"] if is_jsonl(manifest) else []))  # there it decides which rows are good
        if (was := saved["settings"].get(name, Settings.model_fields[name].default)) != getattr(settings, name)
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


def save_job(job: Job, images: int, invalid_rows: int, columns: Sequence[str], kept: RowKeeper | None) -> None:
    """Write `job.json`, keeping the time of the first run; before it the rows and seeds that it speaks of.

    A run that is killed in between leaves more rows than `job.json` counts, and those are not looked at.
    """
    path = job.folder / JOB_FILE
    with storage_errors(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    if kept is not None:
        kept.save(job.state)
    if job.known is None and job.reuse is not None:
        save_seeds(job.given_seeds, job.state)
    created = read_job_json(job.folder)["created_at"] if path.exists() else datetime.now(UTC).isoformat()
    content = {
        "version": tinysd_batch.__version__,
        "created_at": created,
        "last_run": {
            "run_id": job.run_id,
            "started_at": datetime.now(UTC).isoformat(),
            "host": platform.node(),
            "pid": os.getpid(),
        },
        "seed": job.seed,
        "images": images,
        "invalid_rows": invalid_rows,
        "model": {"name": job.model.name, "digest": job.model.digest, "path": str(job.model.path)},
        "manifest": {
            "path": str(job.manifest.resolve()),
            "fingerprint": job.fingerprint,
            "rows": kept.count if kept is not None else job.known.rows if job.known else 0,
            "columns": list(columns),
        },
        "reuse": str(job.reuse) if job.reuse else None,
        "settings": job.settings.model_dump(exclude={"seed"}),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(text.encode("utf-8", "backslashreplace"), path)  # names that are no UTF-8 become JSON's escapes


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those around it that are not there yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def take_back(job: Job, new_folders: list[Path]) -> None:
    """Remove what a run wrote that ended before its first picture, so that it may start with other settings."""
    paths = ResultsPaths(job.folder)
    state = [job.state / name for name in (ROWS_FILE, SEEDS_FILE, RECORD_FILE, "lock")]
    for file in (*paths.sealed_files(), *paths.journal_parts(), job.folder / JOB_FILE, *state):
        file.unlink(missing_ok=True)
    for folder in (paths.parts_folder, paths.journal, job.scratch, job.state, *new_folders):
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()
