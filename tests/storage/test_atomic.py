import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinysd_batch.errors import JobLockedError, StorageError
from tinysd_batch.storage import lock as lock_module
from tinysd_batch.storage.atomic import (
    TEMPORARY_PREFIX,
    create_folder_atomically,
    publish,
    read_file,
    remove_temporaries,
    write_atomically,
)
from tinysd_batch.storage.lock import hold_lock


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_publishing_writes_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    assert publish(b"new", tmp_path / "a" / "x", tmp_path / "tmp", lambda _: False) == b"new"
    assert names(tmp_path / "a") == ["x"]
    assert names(tmp_path / "tmp") == []


def test_the_first_writer_wins(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"same picture, other bytes")
    assert (
        publish(b"late", path, tmp_path / "tmp", lambda found: found.startswith(b"same"))
        == b"same picture, other bytes"
    )
    assert path.read_bytes() == b"same picture, other bytes"
    assert names(tmp_path) == ["tmp", "x"]
    assert names(tmp_path / "tmp") == []


@pytest.mark.parametrize("there", [None, b"same", b"other"])
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bytes | None) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)
    path = tmp_path / "x"
    if there is not None:
        path.write_bytes(there)
    kept = publish(b"new", path, tmp_path / "tmp", lambda found: found == b"same")
    assert kept == path.read_bytes() == (b"same" if there == b"same" else b"new")
    assert names(tmp_path / "tmp") == []


def test_something_else_under_the_name_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"half a pict")
    assert publish(b"whole", path, tmp_path / "tmp", lambda _: False) == b"whole"
    assert path.read_bytes() == b"whole"


def test_no_link_is_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "x").symlink_to(victim)
    publish(b"picture", tmp_path / "x", tmp_path / "tmp", lambda _: False)
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "x").read_bytes() == b"picture"
    assert not (tmp_path / "x").is_symlink()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; make room"):
        write_atomically(b"data", tmp_path / "x")
    assert names(tmp_path) == []


def test_pictures_are_not_written_through_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "00000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"):
        publish(b"picture", tmp_path / "00000" / "x", tmp_path / "tmp", lambda _: False)
    assert names(tmp_path / "elsewhere") == []


def test_a_fault_of_what_runs_under_the_lock_is_not_a_lock_fault(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), hold_lock(tmp_path / "_tinysd" / "lock"):
        raise BlockingIOError


def test_a_lock_is_no_way_to_another_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="symbolic links"), hold_lock(tmp_path / "lock"):
        pytest.fail("locked through a link")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_lock_that_was_given_up_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that takes its job back removes the lock; who opened it before holds nothing."""
    path = tmp_path / "_tinysd" / "lock"
    original = os.open

    def open_late(*arguments: Any, **options: Any) -> int:
        handle = original(*arguments, **options)
        path.unlink()
        return handle

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(JobLockedError, match="just released this job"), hold_lock(path):
        pytest.fail("locked what is gone")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(OSError, match=r"Is a directory|Not a regular file"):
        read_file(tmp_path / "x")


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234")
    assert read_file(tmp_path / "x", 4) == b"1234"
    with pytest.raises(OSError, match="Over 3 bytes"):
        read_file(tmp_path / "x", 3)


def test_a_lock_is_held_once_and_freed(tmp_path: Path) -> None:
    path = tmp_path / "_tinysd" / "lock"
    with hold_lock(path), pytest.raises(JobLockedError, match=f"process {os.getpid()}"), hold_lock(path):
        pytest.fail("locked twice")
    with hold_lock(path):
        pass


def test_a_job_is_taken_over_between_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_tinysd" / "lock"
    monkeypatch.setattr(lock_module, "TAKE_OVER_WAIT_S", 0.3)
    with hold_lock(path) as old:
        with (
            old.guard(),
            pytest.raises(JobLockedError, match="in the middle of a write"),
            hold_lock(path, take_over=True),
        ):
            pytest.fail("took over in the middle of a write")
        with old.guard(), old.guard():
            pass
        with hold_lock(path, take_over=True) as new:
            with new.guard():
                pass
            with pytest.raises(JobLockedError, match=rf"\(process {os.getpid()} on .* has taken this"), old.guard():
                pytest.fail("wrote into another's job")
            with pytest.raises(JobLockedError, match="take the job from it with --take-over"), hold_lock(path):
                pytest.fail("locked twice")


def test_nobody_waits_for_ever_for_one_that_stands_still_in_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "_tinysd" / "lock"
    monkeypatch.setattr(lock_module, "GUARD_WAIT_S", 0.3)
    with hold_lock(path) as old, old.guard():
        path.unlink()
        message = "a process that had this job before is in the middle of a write; end it with kill -9"
        with hold_lock(path) as new, pytest.raises(JobLockedError, match=message), new.guard():
            pytest.fail("wrote between the parts of another's write")


def test_a_new_folder_clears_away_what_a_killed_process_left_of_it(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}a-0" / "unet").mkdir(parents=True)
    (tmp_path / f"{TEMPORARY_PREFIX}ab-0").mkdir()
    with create_folder_atomically(tmp_path / "a") as first, create_folder_atomically(tmp_path / "a"):
        assert first.exists()  # its process lives
        assert not (tmp_path / f"{TEMPORARY_PREFIX}a-0").exists()
    assert names(tmp_path) == [f"{TEMPORARY_PREFIX}ab-0", "a"]


def test_sweeping_removes_only_temporaries(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{TEMPORARY_PREFIX}1").touch()
    (tmp_path / "images" / "seed_1_00001.png").touch()
    remove_temporaries(tmp_path / "images", tmp_path / "nowhere")
    assert names(tmp_path / "images") == ["seed_1_00001.png"]
