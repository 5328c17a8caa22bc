"""A job: its folder, its settings and the manifest it was made from."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from tinysd_batch.config import Settings
from tinysd_batch.job.manifest.merge import Merger
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.manifest.snapshot import READER, Snapshot
from tinysd_batch.job.manifest.validate import Defaults, read_rows
from tinysd_batch.job.plan.batches import Common
from tinysd_batch.job.state.precision_record import RECORD_FILE
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
    record: ManifestRecord | None = None  # of the run before; None: a new job
    is_new: bool = True  # no run before has begun it
    begins_anew: bool = False  # in a folder whose job generated nothing and had other settings or rows
    reuse: Path | None = None  # the job that images are taken over from
    given_seeds: dict[int, int] = field(default_factory=dict)  # row -> its first image's seed, as `reuse` had it
    seeds_from_table: bool = False  # since `reuse` has lost what it knew of its rows

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
    def snapshot(self) -> Snapshot:
        """The rows of the run before."""
        assert self.record is not None
        return self.record.snapshot(self.state)

    @property
    def has_new_rows(self) -> bool:
        """Whether the manifest may say something that the snapshot of its rows does not."""
        return self.record is None or self.record.fingerprint != self.fingerprint or not self.record.is_complete

    @property
    def needs_snapshot(self) -> bool:
        """Whether the manifest's rows are not all kept in the folder yet."""
        return self.has_new_rows or not self.snapshot.is_there

    def read_rows(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """The job's rows in the order of their images, with the seeds that another job gave them.

        `notes` is filled with what was noticed about the manifest, where it has to be read.
        """
        for row in self.read_own_rows(notes):
            given = self.given_seeds.get(row.number)
            yield replace(row, seed=given) if given is not None and isinstance(row, Row) else row

    def read_own_rows(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """The same, with the seeds that the manifest gives."""
        if self.record is None:
            return self.read_manifest(notes)
        if self.has_new_rows:
            return self.merger().merge(self.read_manifest(notes))
        if not self.snapshot.is_there and not self.record.began_in_0_1_0 and not self.record.out_of_order:
            return self.read_manifest(notes)  # somebody removed it, and the manifest says the same
        return (row.read() for row in self.snapshot.rows())

    def merger(self) -> Merger:
        """What puts the manifest's new rows behind those of the job."""
        assert self.record is not None
        return Merger(self.snapshot, self.record.rows)

    def read_manifest(self, notes: ReadingNotes | None = None) -> Iterator[Row | InvalidRow]:
        """The manifest's rows as they stand there, read by today's rules; each has the number it has in the job."""
        settings = self.settings
        return read_rows(
            self.manifest, self.defaults(), settings.strict, notes=notes, interpret_lines=settings.interpret_lines,
            as_0_1_0=self.record is not None and self.record.began_in_0_1_0,
        )  # fmt: skip

    def run_columns(self) -> dict[str, Any]:
        """The results columns that are the same for all rows of a run."""
        return {
            "model": self.model.name,
            "model_digest": self.model.digest,
            "run_id": self.run_id,
            "version": __version__,
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
