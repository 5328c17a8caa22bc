"""Snapshots of a manifest that changes repeatedly, checked against a simple model: images never change positions."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.support.settings import make_image_settings
from tinysd_batch.job.manifest.changes import ManifestDiff, pair_rows
from tinysd_batch.job.manifest.merge import RowMerger
from tinysd_batch.job.manifest.snapshot import ROWS_FILE, Snapshot, SnapshotWriter
from tinysd_batch.records import InvalidRow, Row

SETTINGS = make_image_settings()
VALID, INVALID, BLANK = "valid", "invalid", "blank"
States = list[str]  # of the manifest's rows
ROW_STATES = st.sampled_from([VALID, INVALID, BLANK])


@st.composite
def histories(draw: st.DrawFn) -> list[States]:
    """Draw manifests, each derived from the last by correcting, clearing, filling in, breaking or appending rows."""
    history: list[States] = [[]]
    for _ in range(draw(st.integers(2, 5))):
        kept = [state if state == VALID else draw(ROW_STATES) for state in history[-1]]
        history.append(kept + draw(st.lists(ROW_STATES, max_size=4)))
    return history[1:]


def read(states: States, version: int = 0) -> list[Row | InvalidRow]:
    """Return the rows as a reader yields them; a newer version may read a valid row differently."""
    return [
        Row(number, f"prompt {number} of {version}", SETTINGS)
        if state == VALID
        else InvalidRow(number, f"an error of {version}")
        for number, state in enumerate(states, start=1)
        if state != BLANK
    ]


def save(writer: SnapshotWriter, folder: Path) -> None:
    writer.close()
    (folder / ROWS_FILE).write_bytes(writer.file.read())


@given(histories(), st.data())
def test_each_row_is_added_once_and_the_order_stays(history: list[States], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(SnapshotWriter(), folder)
        snapshot, last = Snapshot(folder, 0), 0
        prompts: dict[int, str] = {}  # of valid rows, in the order of their images
        invalid_numbers: set[int] = set()
        for version, states in enumerate(history):
            merger, writer = RowMerger(snapshot, last), SnapshotWriter()
            rows = list(merger.merge(read(states, version), writer))
            valid = {row.number: row.prompt for row in rows if isinstance(row, Row)}
            assert len(valid) == sum(isinstance(row, Row) for row in rows) == states.count(VALID)
            assert list(valid.items())[: len(prompts)] == list(prompts.items())
            new = [number for number in valid if number not in prompts]
            assert new == sorted(number for number in new if number <= last) + sorted(n for n in new if n > last)
            invalid = [row.number for row in rows if isinstance(row, InvalidRow)]
            invalid_numbers |= {number for number, state in enumerate(states, start=1) if state == INVALID}
            invalid_numbers -= valid.keys()
            assert sorted(invalid) == sorted(invalid_numbers)
            save(writer, folder)
            # Killed before job.json was written: the old snapshot still has only the old rows.
            assert [row.number for row in snapshot.rows() if not row.is_invalid] == list(prompts)
            if data.draw(st.booleans()):
                invalid_numbers = {row.number for row in snapshot.rows() if row.is_invalid}
                continue
            snapshot, last = Snapshot(folder, writer.count, writer.out_of_order), writer.highest_row_number
            assert [row.to_row() for row in snapshot.rows()] == rows
            prompts = valid


@given(histories(), st.data())
def test_manifest_is_append_only_while_no_valid_row_changes(history: list[States], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(SnapshotWriter(), folder)
        snapshot, last = Snapshot(folder, 0), 0
        for states in history:
            assert ManifestDiff.from_pairs(pair_rows(snapshot, read(states))).is_append_only
            valid_numbers = [row.number for row in snapshot.rows() if not row.is_invalid]
            if valid_numbers:
                position = data.draw(st.sampled_from(valid_numbers)) - 1
                broken = [*states[:position], data.draw(st.sampled_from([INVALID, BLANK])), *states[position + 1 :]]
                assert not ManifestDiff.from_pairs(pair_rows(snapshot, read(broken))).is_append_only
            writer = SnapshotWriter()
            list(RowMerger(snapshot, last).merge(read(states), writer))
            save(writer, folder)
            snapshot, last = Snapshot(folder, writer.count, writer.out_of_order), writer.highest_row_number
