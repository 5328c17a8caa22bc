"""Check before any work that driver and worker have the same program, the same model and the same storage.

The driver writes a file to the job's scratch folder. The worker must find it there and write another one, which the
driver must find. A path that is local to each machine of a cluster is thus noticed in the first second, not in the
fifth hour.
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
    """Write the driver's file. Return the token that is its content and part of its name. Raises StorageError."""
    token = secrets.token_hex(8)
    write_atomically(token.encode(), get_handshake_file(scratch, token))
    return token


def answer_driver_file(scratch: Path, token: str, worker: str) -> bool:
    """Write the worker's file. Return False if the driver's file is not there or the worker's cannot be written."""
    try:
        is_shared = read_file(get_handshake_file(scratch, token), MAX_HANDSHAKE_BYTES) == token.encode()
        if is_shared:
            write_atomically(worker.encode(), get_handshake_file(scratch, token, worker))
    except (OSError, StorageError):
        return False
    return is_shared


def check_worker(description: Mapping[str, Any], scratch: Path, token: str, worker: str, digest: str) -> None:
    """Raise NoWorkerError if the worker cannot take part. The message says what to change on its machine."""
    node = description["node"]
    if description["version"] != __version__:
        raise NoWorkerError(
            f"{node} runs tinysd-batch {description['version']}, and this machine {__version__}; "
            f"install the same version on both"
        )
    if description["model_digest"] != digest:
        raise NoWorkerError(
            f"the model on {node} has other weights than the one on this machine; copy the model to the same path there"
        )
    if not description["shares_storage"] or not has_worker_file(scratch, token, worker):
        raise NoWorkerError(
            f"{node} does not see the job's folder as this machine does ({scratch}); "
            f"put the job on storage that all machines share, under the same path"
        )


def has_worker_file(scratch: Path, token: str, worker: str) -> bool:
    try:
        return read_file(get_handshake_file(scratch, token, worker), MAX_HANDSHAKE_BYTES) == worker.encode()
    except OSError:
        return False


def get_handshake_file(scratch: Path, token: str, worker: str = "driver") -> Path:
    """Return the path of a handshake file. It is named as a temporary file, and so removed with those."""
    name = hashlib.blake2b(worker.encode(), digest_size=8).hexdigest()  # a worker's name may hold any character
    return scratch / f"{TEMPORARY_PREFIX}hello-{token}-{name}"
