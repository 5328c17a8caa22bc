"""The folder that a Ray of our own keeps its files in: short, closed to other users, and removed in the end.

Ray makes the folder it is given writable by everybody, so that one is a folder inside ours. Sockets in it have paths
of at most 107 bytes, hence TMPDIR is the last choice. The process that owns a folder holds a lock on a file in it.
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
LOCK_FILE_CONTENT = b"tinysd-batch\n"  # what that file holds
TOKEN_FILE_NAME = "auth_token"  # noqa: S105 - the name of the file
SHARED_FOLDERS = ("/tmp", "/var/tmp")  # noqa: S108 - with a folder of random name and our own in it
MAX_SOCKET_PATH_BYTES = 107
SOCKET_PATH_BYTES = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
RANDOM_NAME_BYTES = 9  # of the folder's own name, with a slash


@dataclass(frozen=True, slots=True)
class RayTempFolder:
    """A folder of our own, locked for as long as `owner` is open here or in a process that inherited it."""

    path: Path
    lock_file: IO[bytes]

    @property
    def ray_temp_dir(self) -> Path:
        return self.path / "r"

    @property
    def packages_folder(self) -> Path:
        """Holds this package and nothing else, for the workers' import path."""
        return self.path / "packages"

    @property
    def token_file(self) -> Path:
        return self.path / TOKEN_FILE_NAME

    def close(self) -> None:
        self.lock_file.close()
        shutil.rmtree(self.path, ignore_errors=True)


def create_temp_folder() -> RayTempFolder:
    """Make one, and remove those that were left behind. Raises NoWorkerError where no place is good."""
    problems = []
    for place in list_parent_folders():
        try:
            check_parent_folder(place)
            folder = create_in(place)
        except OSError as error:
            problems.append(f"{place}: {error.strerror.lower() if error.strerror else error}")
            continue
        remove_stale_folders(place)
        return folder
    raise NoWorkerError(
        f"Ray could not start, no folder for its files: {'; '.join(problems)}; RAY_TMPDIR names another one, and "
        f"`--inline` runs the job in this process, without Ray"
    )


def list_parent_folders() -> Iterator[Path]:
    """Where to make it: where the user says, or the first that is good."""
    if named := os.environ.get("RAY_TMPDIR"):
        yield Path(named)
        return
    yield from map(Path, SHARED_FOLDERS)
    yield from (Path(os.environ[name]) for name in ("XDG_RUNTIME_DIR", "HOME", "TMPDIR") if os.environ.get(name))


def check_parent_folder(place: Path) -> None:
    if not place.is_absolute():
        raise OSError("not an absolute path")
    longest = MAX_SOCKET_PATH_BYTES - SOCKET_PATH_BYTES - len(FOLDER_PREFIX) - RANDOM_NAME_BYTES
    if len(os.fsencode(place)) > longest:
        raise OSError(f"longer than {longest} bytes, which Ray's sockets need")


def create_in(place: Path) -> RayTempFolder:
    path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place))
    try:
        owner = (path / "new").open("xb")
        with contextlib.suppress(OSError):  # a file system without locks: then it is never taken for stale
            fcntl.flock(owner, fcntl.LOCK_EX)
        owner.write(LOCK_FILE_CONTENT)
        owner.flush()
        (path / "new").rename(path / LOCK_FILE_NAME)
        folder = RayTempFolder(path, owner)
        folder.packages_folder.mkdir()
        (folder.packages_folder / "tinysd_batch").symlink_to(Path(PACKAGE_ROOT) / "tinysd_batch")
        with os.fdopen(os.open(folder.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as token:
            token.write(secrets.token_hex(32))
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return folder


def remove_stale_folders(place: Path) -> None:
    """Remove our user's folders whose owner died, and the process that should have removed them, too."""
    with contextlib.suppress(OSError):
        for path in place.glob(f"{FOLDER_PREFIX}*"):
            with contextlib.suppress(OSError):
                if is_stale(path):
                    shutil.rmtree(path, ignore_errors=True)


def is_stale(path: Path) -> bool:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    with os.fdopen(os.open(path / LOCK_FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return owner.read(len(LOCK_FILE_CONTENT) + 1) == LOCK_FILE_CONTENT
