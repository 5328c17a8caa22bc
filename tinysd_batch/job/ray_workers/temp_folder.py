"""The folder for a local Ray's files: its path is short, other users cannot access it, and it is removed at the end.

Ray makes its temporary folder writable by all users, so it gets one inside ours. The paths of sockets in it have at
most 107 bytes, which is why TMPDIR is the last choice. The process that owns a folder holds a lock on a file in it.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tinysd_batch.errors import NoWorkerError
from tinysd_batch.import_path import PACKAGE_ROOT

FOLDER_PREFIX = "tsd-"
LOCK_FILE_NAME = "owner"
LOCK_FILE_CONTENT = b"tinysd-batch\n"
TOKEN_FILE_NAME = "auth_token"  # noqa: S105 - the name of a file
SHARED_FOLDERS = ("/tmp", "/var/tmp")  # noqa: S108 - our folder in it has a random name
MAX_SOCKET_PATH_BYTES = 107
SOCKET_PATH_BYTES = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
RANDOM_NAME_BYTES = 9  # in the folder's name, and a slash


@dataclass(frozen=True, slots=True)
class RayTempFolder:
    """Locked for as long as `lock_file` is open in this process or in one that inherited it."""

    path: Path
    lock_file: IO[bytes]

    @property
    def ray_temp_dir(self) -> Path:
        return self.path / "r"

    @property
    def packages_folder(self) -> Path:
        """Return the folder for the workers' import path, which has this package and nothing else."""
        return self.path / "packages"

    @property
    def token_file(self) -> Path:
        return self.path / TOKEN_FILE_NAME

    def close(self) -> None:
        self.lock_file.close()
        shutil.rmtree(self.path, ignore_errors=True)


def create_temp_folder() -> RayTempFolder:
    """Create a folder, and remove stale ones beside it. Raises NoWorkerError if no parent folder is usable."""
    problems = []
    for parent in list_parent_folders():
        try:
            check_parent_folder(parent)
            folder = create_in(parent)
        except OSError as error:
            problems.append(f"{parent}: {error.strerror.lower() if error.strerror else error}")
            continue
        remove_stale_folders(parent)
        return folder
    raise NoWorkerError(
        f"Ray could not start, no usable folder for its files: {'; '.join(problems)}; set RAY_TMPDIR to another one; "
        f"`--inline` runs the job in this process, without Ray"
    )


def list_parent_folders() -> Iterator[Path]:
    """Yield the user's choice alone, or the candidates in order of preference."""
    if chosen := os.environ.get("RAY_TMPDIR"):
        yield Path(chosen)
        return
    yield from map(Path, SHARED_FOLDERS)
    yield from (Path(os.environ[name]) for name in ("XDG_RUNTIME_DIR", "HOME", "TMPDIR") if os.environ.get(name))


def check_parent_folder(parent: Path) -> None:
    if not parent.is_absolute():
        raise OSError("not an absolute path")
    max_bytes = MAX_SOCKET_PATH_BYTES - SOCKET_PATH_BYTES - len(FOLDER_PREFIX) - RANDOM_NAME_BYTES
    if len(os.fsencode(parent)) > max_bytes:
        raise OSError(f"longer than the {max_bytes} bytes that Ray's sockets allow")


def create_in(parent: Path) -> RayTempFolder:
    path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    try:
        lock_file = (path / "new").open("xb")
        with contextlib.suppress(OSError):  # a file system without locks: the folder is never considered stale
            fcntl.flock(lock_file, fcntl.LOCK_EX)
        lock_file.write(LOCK_FILE_CONTENT)
        lock_file.flush()
        (path / "new").rename(path / LOCK_FILE_NAME)
        folder = RayTempFolder(path, lock_file)
        folder.packages_folder.mkdir()
        (folder.packages_folder / "tinysd_batch").symlink_to(Path(PACKAGE_ROOT) / "tinysd_batch")
        with os.fdopen(os.open(folder.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as token:
            token.write(secrets.token_hex(32))
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return folder


def remove_stale_folders(parent: Path) -> None:
    """Remove this user's folders whose driver and reaper have both died."""
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{FOLDER_PREFIX}*"):
            with contextlib.suppress(OSError):
                if is_stale(path):
                    shutil.rmtree(path, ignore_errors=True)


def is_stale(path: Path) -> bool:
    """Whether a folder is ours and not locked. Raises OSError if it is locked or cannot be read."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    with os.fdopen(os.open(path / LOCK_FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock_file.read(len(LOCK_FILE_CONTENT) + 1) == LOCK_FILE_CONTENT
