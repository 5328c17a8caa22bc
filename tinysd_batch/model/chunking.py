"""The size of the chunks in which large tensors are processed: weight matrices, feature maps, attention scores.

Smaller chunks need less memory and a little more time; results are the same up to rounding.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

DEFAULT_CHUNK_BYTES = 32 * 2**20
SMALL_CHUNK_BYTES, MIN_CHUNK_BYTES = 8 * 2**20, 4 * 2**20
CHUNK_BYTES: ContextVar[int] = ContextVar("chunk_bytes", default=DEFAULT_CHUNK_BYTES)  # each thread has its own


def get_chunk_bytes() -> int:
    return CHUNK_BYTES.get()


@contextlib.contextmanager
def limit_chunk_bytes(nbytes: int) -> Iterator[None]:
    token = CHUNK_BYTES.set(nbytes)
    try:
        yield
    finally:
        CHUNK_BYTES.reset(token)


def items_per_chunk(total: int, item_bytes: int, nbytes: int | None = None) -> int:
    """Return how many of `total` items make a chunk of at most `nbytes`, in chunks as equal as possible; at least one.

    Without `nbytes` the current limit applies.
    """
    chunks = max(1, -(-total * item_bytes // (nbytes or get_chunk_bytes())))
    return max(1, -(-total // chunks))
