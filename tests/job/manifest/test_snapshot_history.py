"""Snapshots of a manifest that changes again and again, against a model: whatever happens, no image moves."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.job.manifest.changes import ManifestDiff, pair_rows
from tinysd_batch.job.manifest.merge import RowMerger
from tinysd_batch.job.manifest.snapshot import ROWS_FILE, Snapshot, SnapshotWriter
from tinysd_batch.records import InvalidRow, Row, SamplingParams

PARAMS = SamplingParams(width=64, height=64, steps=20, sampler="plms", eta=0.0)
GOOD, FAULTY, BLANK = "good", "faulty", "blank"
States = list[str]  # of the manifest's rows
KINDS = st.sampled_from([GOOD, FAULTY, BLANK])


@st.composite
def histories(draw: st.DrawFn) -> list[States]:
    """Manifests of which each is the one before with rows corrected, emptied, filled in, spoilt or appended."""
    history: list[States] = [[]]
    for _ in range(draw(st.integers(2, 5))):
        kept = [state if state == GOOD else draw(KINDS) for state in history[-1]]
        history.append(kept + draw(st.lists(KINDS, max_size=4)))
    return history[1:]


def read(states: States, version: int = 0) -> list[Row | InvalidRow]:
    """What a reader makes of it; a row that could be generated before may be read otherwise by a newer version."""
    return [
        Row(number, f"prompt {number} of {version}", "", None, 7.5, 1, 1, PARAMS)
        if state == GOOD
        else InvalidRow(number, f"a fault of {version}")
        for number, state in enumerate(states, start=1)
        if state != BLANK
    ]


def save(kept: SnapshotWriter, folder: Path) -> None:
    kept.close()
    (folder / ROWS_FILE).write_bytes(kept.file.read())


@given(histories(), st.data())
def test_a_job_learns_each_row_once_and_keeps_its_order(history: list[States], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(SnapshotWriter(), folder)
        snapshot, last = Snapshot(folder, 0), 0
        prompts: dict[int, str] = {}  # of rows that could be generated, in the order of their images
        faulty: set[int] = set()
        for version, states in enumerate(history):
            merger, kept = RowMerger(snapshot, last), SnapshotWriter()
            rows = list(merger.merge(read(states, version), kept))
            good = {row.number: row.prompt for row in rows if isinstance(row, Row)}
            assert len(good) == sum(isinstance(row, Row) for row in rows) == states.count(GOOD)
            assert list(good.items())[: len(prompts)] == list(prompts.items())
            new = [number for number in good if number not in prompts]
            assert new == sorted(number for number in new if number <= last) + sorted(n for n in new if n > last)
            bad = [row.number for row in rows if isinstance(row, InvalidRow)]
            faulty |= {number for number, state in enumerate(states, start=1) if state == FAULTY}
            faulty -= good.keys()
            assert sorted(bad) == sorted(faulty)
            save(kept, folder)
            # Killed before job.json was written: what the job knew before is still all that it knows.
            assert [row.number for row in snapshot.rows() if not row.is_invalid] == list(prompts)
            if data.draw(st.booleans()):
                faulty = {row.number for row in snapshot.rows() if row.is_invalid}
                continue
            snapshot, last = Snapshot(folder, kept.count, kept.out_of_order), kept.highest_row_number
            assert [row.to_row() for row in snapshot.rows()] == rows
            prompts = good


@given(histories(), st.data())
def test_growth_is_what_moves_no_image(history: list[States], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(SnapshotWriter(), folder)
        snapshot, last = Snapshot(folder, 0), 0
        for states in history:
            assert ManifestDiff.from_pairs(pair_rows(snapshot, read(states))).is_append_only
            known = [row.number for row in snapshot.rows() if not row.is_invalid]
            if known:
                place = data.draw(st.sampled_from(known)) - 1
                spoilt = [*states[:place], data.draw(st.sampled_from([FAULTY, BLANK])), *states[place + 1 :]]
                assert not ManifestDiff.from_pairs(pair_rows(snapshot, read(spoilt))).is_append_only
            kept = SnapshotWriter()
            list(RowMerger(snapshot, last).merge(read(states), kept))
            save(kept, folder)
            snapshot, last = Snapshot(folder, kept.count, kept.out_of_order), kept.highest_row_number
