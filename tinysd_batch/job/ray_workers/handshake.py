"""What driver and worker tell each other before any work: the same program, the same model, the same storage.

The driver leaves a file in the job's scratch folder; the worker must find it there and leave another, which the driver
must find. A path that is local to each machine of a cluster fails this in the first second, not in the fifth hour.
"""

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinysd_batch.errors import NoWorkerError, StorageError
from tinysd_batch.storage.atomic import TEMPORARY_PREFIX, read_file, write_atomically
from tinysd_batch.version import __version__

MAX_HANDSHAKE_BYTES = 2000


def write_driver_file(scratch: Path) -> str:
    """The driver's part: leave a file; return the word that names and fills it. Raises StorageError."""
    word = secrets.token_hex(8)
    write_atomically(word.encode(), get_handshake_file(scratch, word))
    return word


def answer_driver_file(scratch: Path, word: str, worker: str) -> bool:
    """The worker's part: whether it found the driver's file, and could leave its own."""
    try:
        found = read_file(get_handshake_file(scratch, word), MAX_HANDSHAKE_BYTES) == word.encode()
        if found:
            write_atomically(worker.encode(), get_handshake_file(scratch, word, worker))
    except (OSError, StorageError):
        return False
    return found


def check_worker(description: Mapping[str, Any], scratch: Path, word: str, worker: str, digest: str) -> None:
    """Raises NoWorkerError for a worker that cannot take part, and says what to do on its machine."""
    node = description["node"]
    if description["version"] != __version__:
        raise NoWorkerError(
            f"{node} runs tinysd-batch {description['version']}, and this machine {__version__}; "
            f"install the same on both"
        )
    if description["model_digest"] != digest:
        raise NoWorkerError(f"the model on {node} has other weights than the one here; copy it there under its path")
    if not description["shares_storage"] or not has_worker_file(scratch, word, worker):
        raise NoWorkerError(
            f"{node} does not see the job's folder as this machine does ({scratch}); "
            f"put the job on storage that all machines share, under the same path"
        )


def has_worker_file(scratch: Path, word: str, worker: str) -> bool:
    try:
        return read_file(get_handshake_file(scratch, word, worker), MAX_HANDSHAKE_BYTES) == worker.encode()
    except OSError:
        return False


def get_handshake_file(scratch: Path, word: str, worker: str = "driver") -> Path:
    """Named as a temporary file, so that it is swept away with them. A worker's name may hold any character."""
    name = hashlib.blake2b(worker.encode(), digest_size=8).hexdigest()
    return scratch / f"{TEMPORARY_PREFIX}hello-{word}-{name}"
