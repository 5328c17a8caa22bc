"""A job: its folder, its settings and the manifest it was made from."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from tinysd_batch.config import Settings
from tinysd_batch.job.manifest.merge import RowMerger
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.manifest.snapshot import READER_VERSION, Snapshot
from tinysd_batch.job.manifest.validate import RowDefaults, read_rows
from tinysd_batch.job.plan.batches import SharedSettings
from tinysd_batch.job.state.precision_record import PRECISION_FILE
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.version import __version__

JOB_FILE = "job.json"


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """What `job.json` says of the manifest and of the snapshot of its rows."""

    fingerprint: str
    rows: int  # number of the last one
    images: int
    invalid_rows: int
    extra_columns: tuple[str, ...] | None  # that nothing is made of; None where 0.1.0 did not note them
    reader_version: int = READER_VERSION  # version of the rules by which the rows were read
    snapshot_lines: int = 0  # of the snapshot
    out_of_order: int = 0  # lines in it that come after one of the same or a higher number
    file_bytes: int | None = None  # of the manifest's file; None for jobs of 0.1.0
    columns_as_text: bool = False  # carried columns that hold no numbers are text, as 0.1.0 had them

    @classmethod
    def from_job_json(cls, saved: dict[str, Any]) -> Self:
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
        return self.extra_columns is not None and (self.reader_version == READER_VERSION or not self.invalid_rows)

    @property
    def is_from_0_1_0(self) -> bool:
        """Whether rows were first read by the rules of 0.1.0, whatever `reader` read those that came later."""
        return self.columns_as_text

    def snapshot(self, state: Path) -> Snapshot:
        return Snapshot(state, self.snapshot_lines, self.out_of_order)

    def as_dict(self, manifest: Path) -> dict[str, Any]:
        return {
            "path": str(manifest),
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "lines": self.snapshot_lines,
            "out_of_order": self.out_of_order,
            "bytes": self.file_bytes,
            "columns": list(self.extra_columns or ()),
            "columns_as_text": self.columns_as_text,
        }


STATE_FOLDER = "_tinysd"


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
    manifest_record: ManifestRecord | None = None  # of the run before; None: a new job
    is_new: bool = True  # no run before has begun it
    replaces_unstarted_job: bool = False  # in a folder whose job generated nothing and had other settings or rows
    reuse: Path | None = None  # the job that images are taken over from
    inherited_seeds: dict[int, int] = field(default_factory=dict)  # row -> its first image's seed, as `reuse` had it
    seeds_from_table: bool = False  # since `reuse` has lost what it knew of its rows

    @property
    def state_folder(self) -> Path:
        return self.folder / STATE_FOLDER

    @property
    def scratch(self) -> Path:
        return self.state_folder / "tmp"

    @property
    def stop_file(self) -> Path:
        return self.state_folder / "stop"

    @property
    def precision_file(self) -> Path:
        return self.state_folder / PRECISION_FILE

    def row_defaults(self) -> RowDefaults:
        """What a row that says nothing gets."""
        return derive_row_defaults(self.settings, self.model)

    def shared_settings(self) -> SharedSettings:
        """What all images have in common."""
        return derive_shared_settings(self.settings, self.model, self.seed)

    @property
    def snapshot(self) -> Snapshot:
        """The rows of the run before."""
        assert self.manifest_record is not None
        return self.manifest_record.snapshot(self.state_folder)

    @property
    def may_have_new_rows(self) -> bool:
        """Whether the manifest may say something that the snapshot of its rows does not."""
        return (
            self.manifest_record is None
            or self.manifest_record.fingerprint != self.fingerprint
            or not self.manifest_record.is_complete
        )

    @property
    def needs_snapshot(self) -> bool:
        """Whether the manifest's rows are not all kept in the folder yet."""
        return self.may_have_new_rows or not self.snapshot.exists

    def read_rows(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """The job's rows in the order of their images, with the seeds that another job gave them.

        `notes` is filled with what was noticed about the manifest, where it has to be read.
        """
        for row in self.read_rows_with_own_seeds(notes):
            given = self.inherited_seeds.get(row.number)
            yield replace(row, seed=given) if given is not None and isinstance(row, Row) else row

    def read_rows_with_own_seeds(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """The same, with the seeds that the manifest gives."""
        if self.manifest_record is None:
            return self.read_manifest(notes)
        if self.may_have_new_rows:
            return self.create_merger().merge(self.read_manifest(notes))
        if (
            not self.snapshot.exists
            and not self.manifest_record.is_from_0_1_0
            and not self.manifest_record.out_of_order
        ):
            return self.read_manifest(notes)  # somebody removed it, and the manifest says the same
        return (row.to_row() for row in self.snapshot.rows())

    def create_merger(self) -> RowMerger:
        """What puts the manifest's new rows behind those of the job."""
        assert self.manifest_record is not None
        return RowMerger(self.snapshot, self.manifest_record.rows)

    def read_manifest(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """The manifest's rows as they stand there, read by today's rules; each has the number it has in the job."""
        settings = self.settings
        return read_rows(
            self.manifest, self.row_defaults(), settings.strict, notes=notes, interpret_lines=settings.interpret_lines,
            compat_0_1_0=self.manifest_record is not None and self.manifest_record.is_from_0_1_0,
        )  # fmt: skip

    def run_columns(self) -> dict[str, Any]:
        """The results columns that are the same for all rows of a run."""
        return {
            "model": self.model.name,
            "model_digest": self.model.digest,
            "run_id": self.run_id,
            "version": __version__,
        }


def derive_row_defaults(settings: Settings, model: ModelInfo) -> RowDefaults:
    """What a row gets that says nothing, from settings without gaps."""
    chosen = settings.model_dump(include={field.name for field in fields(RowDefaults)} - {"step_px"})
    return RowDefaults(size_multiple_px=model.size_multiple_px, **chosen)


def derive_shared_settings(settings: Settings, model: ModelInfo, seed: int) -> SharedSettings:
    return SharedSettings(
        seed=seed, model_digest=model.digest, precision=settings.precision, long_prompts=settings.long_prompts,
        fixed_code=settings.fixed_code, suffix=settings.format, rng=settings.rng,
    )  # fmt: skip
