"""The lock of a job: one process at a time writes to it, and another may take it over between two writes."""

import os
from pathlib import Path
from typing import Any

import pytest

from tinysd_batch.errors import JobLockedError, StorageError
from tinysd_batch.storage import lock
from tinysd_batch.storage.lock import hold_lock


def test_an_error_raised_inside_the_lock_passes_through_unchanged(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), hold_lock(tmp_path / "_tinysd" / "lock"):
        raise BlockingIOError


def test_a_lock_file_that_is_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="symbolic links"), hold_lock(tmp_path / "lock"):
        pytest.fail("locked through a link")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_lock_file_deleted_while_it_is_opened_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that undoes its start deletes the lock file; a process that has just opened it holds nothing."""
    path = tmp_path / "_tinysd" / "lock"
    original = os.open

    def open_and_delete(*arguments: Any, **options: Any) -> int:
        handle = original(*arguments, **options)
        path.unlink()
        return handle

    monkeypatch.setattr(os, "open", open_and_delete)
    with pytest.raises(JobLockedError, match="just released this job"), hold_lock(path):
        pytest.fail("locked a deleted file")


def test_a_lock_is_exclusive_and_released_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "_tinysd" / "lock"
    with hold_lock(path), pytest.raises(JobLockedError, match=f"process {os.getpid()}"), hold_lock(path):
        pytest.fail("locked twice")
    with hold_lock(path):
        pass


def test_a_job_is_taken_over_only_between_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_tinysd" / "lock"
    monkeypatch.setattr(lock, "TAKE_OVER_WAIT_S", 0.3)
    with hold_lock(path) as first:
        with (
            first.guard(),
            pytest.raises(JobLockedError, match="in the middle of a write"),
            hold_lock(path, take_over=True),
        ):
            pytest.fail("took over in the middle of a write")
        with first.guard(), first.guard():
            pass
        with hold_lock(path, take_over=True) as second:
            with second.guard():
                pass
            with pytest.raises(JobLockedError, match=rf"\(process {os.getpid()} on .* has taken this"), first.guard():
                pytest.fail("wrote to a job that another process has taken over")
            with pytest.raises(JobLockedError, match="take the job from it with --take-over"), hold_lock(path):
                pytest.fail("locked twice")


def test_waiting_for_a_process_suspended_during_a_write_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "_tinysd" / "lock"
    monkeypatch.setattr(lock, "GUARD_WAIT_S", 0.3)
    with hold_lock(path) as first, first.guard():
        path.unlink()
        message = "a process that had this job before is in the middle of a write; end it with kill -9"
        with hold_lock(path) as second, pytest.raises(JobLockedError, match=message), second.guard():
            pytest.fail("wrote during the write of another process")
