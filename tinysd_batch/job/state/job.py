"""A job: its folder, its settings and its manifest."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from tinysd_batch.job.manifest.columns import find_column
from tinysd_batch.job.manifest.merge import RowMerger
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.manifest.snapshot import READER_VERSION, Snapshot
from tinysd_batch.job.manifest.validate import RowDefaults, read_rows
from tinysd_batch.job.plan.batches import SharedSettings
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.precision_record import PRECISION_FILE
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.settings.schema import COLUMN_SETTINGS, Settings
from tinysd_batch.version import __version__

JOB_FILE = "job.json"
STATE_FOLDER = "_tinysd"


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """What an earlier run recorded in `job.json` about the manifest and the snapshot of its rows."""

    fingerprint: str
    last_row_number: int
    images: int
    invalid_rows: int
    extra_columns: tuple[str, ...] | None  # columns copied to the results; None if 0.1.0 did not record them
    reader_version: int = READER_VERSION  # version of the rules by which rows were read
    snapshot_lines: int = 0  # number of lines in the snapshot
    out_of_order: int = 0  # snapshot lines that follow a line with the same or a higher row number
    file_bytes: int | None = None  # size of the manifest file; None for jobs of 0.1.0
    columns_as_text: bool = False  # as in 0.1.0, extra columns without numbers are stored as text

    @classmethod
    def from_job_json(cls, saved: dict[str, Any]) -> Self:
        """Create the record from the content of `job.json`, whose 0.1.0 version lacks some entries."""
        manifest = saved["manifest"]
        columns = manifest.get("columns")
        return cls(
            fingerprint=manifest["fingerprint"],
            last_row_number=manifest["rows"],
            images=saved["images"],
            invalid_rows=saved["invalid_rows"],
            extra_columns=tuple(columns) if columns is not None else None,
            reader_version=saved.get("reader", 1),
            snapshot_lines=manifest.get("lines", manifest["rows"]),
            out_of_order=manifest.get("out_of_order", 0),
            file_bytes=manifest.get("bytes"),
            columns_as_text=manifest.get("columns_as_text", saved.get("reader", 1) == 1),
        )

    @property
    def is_complete(self) -> bool:
        """Whether the snapshot has everything that reading the same bytes again would give."""
        return self.extra_columns is not None and (self.reader_version == READER_VERSION or not self.invalid_rows)

    @property
    def is_from_0_1_0(self) -> bool:
        """Whether 0.1.0 read the first rows; `reader_version` is the version that read the latest ones."""
        return self.columns_as_text

    def snapshot(self, state_folder: Path) -> Snapshot:
        return Snapshot(state_folder, self.snapshot_lines, self.out_of_order)

    def as_dict(self, manifest: Path) -> dict[str, Any]:
        """Return the entry `manifest` of `job.json`."""
        return {
            "path": str(manifest),
            "fingerprint": self.fingerprint,
            "rows": self.last_row_number,
            "lines": self.snapshot_lines,
            "out_of_order": self.out_of_order,
            "bytes": self.file_bytes,
            "columns": list(self.extra_columns or ()),
            "columns_as_text": self.columns_as_text,
        }


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a run needs, except its workers."""

    folder: Path
    manifest: Path
    settings: Settings
    model: ModelInfo
    seed: int
    run_id: str
    fingerprint: str  # of the manifest
    manifest_stamp: tuple[int, int]  # size and modification time
    manifest_record: ManifestRecord | None = None  # of the previous run; None for a new job
    is_new: bool = True  # no earlier run has started it
    replaces_unstarted_job: bool = False  # the folder holds another job that has no image yet
    reuse: Path | None = None  # folder of the job whose images are reused
    inherited_seeds: dict[int, int] = field(default_factory=dict)  # row number -> seed of its first image in `reuse`
    seeds_from_table: bool = False  # the seeds come from the results, as `reuse` has lost its rows

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
        """Return the settings of a row that has no values of its own."""
        return RowDefaults(self.settings, self.model, self.find_own_columns())

    def shared_settings(self) -> SharedSettings:
        """Return the settings that all images of the job share."""
        return SharedSettings.from_settings(self.seed, self.model.digest, self.settings)

    @property
    def snapshot(self) -> Snapshot:
        """The rows that the previous run saved."""
        assert self.manifest_record is not None
        return self.manifest_record.snapshot(self.state_folder)

    @property
    def may_have_new_rows(self) -> bool:
        """Whether the manifest may hold rows or columns that the snapshot does not."""
        record = self.manifest_record
        return record is None or record.fingerprint != self.fingerprint or not record.is_complete

    @property
    def needs_snapshot(self) -> bool:
        """Whether the job folder lacks rows of the manifest, so that this run has to save them."""
        return self.may_have_new_rows or not self.snapshot.exists

    def read_rows(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """Read the job's rows in the order of their images, with the seeds that they inherit from another job.

        Args:
            notes: Collects remarks on the manifest, if it has to be read.
        """
        for row in self.read_rows_with_own_seeds(notes):
            seed = self.inherited_seeds.get(row.number)
            yield replace(row, seed=seed) if seed is not None and isinstance(row, Row) else row

    def read_rows_with_own_seeds(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """Read the same rows with the seeds that the manifest gives."""
        record = self.manifest_record
        if record is None:
            return self.read_manifest(notes)
        if self.may_have_new_rows:
            return self.create_merger().merge(self.read_manifest(notes))
        if not self.snapshot.exists and not record.is_from_0_1_0 and not record.out_of_order:
            return self.read_manifest(notes)  # the snapshot was deleted, and the manifest has the same rows
        return (row.to_row() for row in self.snapshot.rows())

    def create_merger(self) -> RowMerger:
        """Create the merger that appends new rows of the manifest to those of the job."""
        assert self.manifest_record is not None
        return RowMerger(self.snapshot, self.manifest_record.last_row_number)

    def read_manifest(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """Read the rows of the manifest file by the current rules; each has its row number in the job."""
        settings = self.settings
        return read_rows(
            self.manifest,
            self.row_defaults(),
            settings.strict,
            notes=notes,
            interpret_lines=settings.interpret_lines,
            compat_0_1_0=self.manifest_record is not None and self.manifest_record.is_from_0_1_0,
        )

    def find_own_columns(self) -> frozenset[str]:
        """Return the manifest's columns that have the name of a setting which is newer than the job.

        An extra column with another name of the prompt is none: a row has it where it also has a better one.
        """
        record = self.manifest_record
        if record is None:
            return frozenset()
        names = record.extra_columns
        if names is None:  # 0.1.0 did not record them
            names = ResultsTable(self.folder).list_manifest_columns()
        return frozenset(name for name in names if find_column(name) in COLUMN_SETTINGS)

    def run_columns(self) -> dict[str, Any]:
        """Return the results columns that are equal in all rows of a run."""
        return {
            "model": self.model.name,
            "model_digest": self.model.digest,
            "run_id": self.run_id,
            "version": __version__,
        }
