"""Files are written atomically, images are published once, and untrusted files are read within limits."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tinysd_batch.errors import StorageError
from tinysd_batch.storage.atomic import (
    TEMPORARY_PREFIX,
    create_folder_atomically,
    publish,
    read_file,
    remove_temporaries,
    write_atomically,
)


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_publish_writes_the_whole_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    assert publish(b"new", tmp_path / "a" / "x", tmp_path / "tmp", lambda _: False) == b"new"
    assert list_names(tmp_path / "a") == ["x"]
    assert list_names(tmp_path / "tmp") == []


def test_the_first_writer_wins(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"same image, other bytes")
    assert (
        publish(b"late", path, tmp_path / "tmp", lambda existing: existing.startswith(b"same"))
        == b"same image, other bytes"
    )
    assert path.read_bytes() == b"same image, other bytes"
    assert list_names(tmp_path) == ["tmp", "x"]
    assert list_names(tmp_path / "tmp") == []


@pytest.mark.parametrize("existing", [None, b"same", b"other"])
def test_publish_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bytes | None) -> None:
    def fail_to_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", fail_to_link)
    path = tmp_path / "x"
    if existing is not None:
        path.write_bytes(existing)
    content = publish(b"new", path, tmp_path / "tmp", lambda existing: existing == b"same")
    assert content == path.read_bytes() == (b"same" if existing == b"same" else b"new")
    assert list_names(tmp_path / "tmp") == []


def test_publish_replaces_a_different_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"half an ima")
    assert publish(b"whole", path, tmp_path / "tmp", lambda _: False) == b"whole"
    assert path.read_bytes() == b"whole"


def test_publish_replaces_a_symbolic_link_and_not_its_target(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "x").symlink_to(victim)
    publish(b"image", tmp_path / "x", tmp_path / "tmp", lambda _: False)
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "x").read_bytes() == b"image"
    assert not (tmp_path / "x").is_symlink()


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; make room"):
        write_atomically(b"data", tmp_path / "x")
    assert list_names(tmp_path) == []


def test_publish_refuses_a_folder_that_is_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "00000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"):
        publish(b"image", tmp_path / "00000" / "x", tmp_path / "tmp", lambda _: False)
    assert list_names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(OSError, match=r"Is a directory|Not a regular file"):
        read_file(tmp_path / "x")


def test_files_over_the_size_limit_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234")
    assert read_file(tmp_path / "x", 4) == b"1234"
    with pytest.raises(OSError, match="Over 3 bytes"):
        read_file(tmp_path / "x", 3)


def test_creating_a_folder_removes_what_killed_processes_left(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}a-0" / "unet").mkdir(parents=True)
    (tmp_path / f"{TEMPORARY_PREFIX}ab-0").mkdir()
    with create_folder_atomically(tmp_path / "a") as first, create_folder_atomically(tmp_path / "a"):
        assert first.exists()  # its process lives
        assert not (tmp_path / f"{TEMPORARY_PREFIX}a-0").exists()
    assert list_names(tmp_path) == [f"{TEMPORARY_PREFIX}ab-0", "a"]


def test_only_temporary_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{TEMPORARY_PREFIX}1").touch()
    (tmp_path / "images" / "seed_1_00001.png").touch()
    remove_temporaries(tmp_path / "images", tmp_path / "nowhere")
    assert list_names(tmp_path / "images") == ["seed_1_00001.png"]
