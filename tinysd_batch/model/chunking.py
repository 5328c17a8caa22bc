"""How large the parts are in which large tensors are worked on: matrices, feature maps, attention scores.

Smaller parts need less memory and a little more time; what comes out is the same up to rounding.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

DEFAULT_CHUNK_BYTES = 32 * 2**20
SMALL_CHUNK_BYTES, MIN_CHUNK_BYTES = 8 * 2**20, 4 * 2**20
CHUNK_BYTES: ContextVar[int] = ContextVar("part_bytes", default=DEFAULT_CHUNK_BYTES)  # each thread's own


def get_chunk_bytes() -> int:
    return CHUNK_BYTES.get()


@contextlib.contextmanager
def limit_chunk_bytes(nbytes: int) -> Iterator[None]:
    before = CHUNK_BYTES.set(nbytes)
    try:
        yield
    finally:
        CHUNK_BYTES.reset(before)


def items_per_chunk(total: int, each: int, nbytes: int | None = None) -> int:
    """How many of `total` things of `each` bytes make a part, in parts as equal as may be; at least one."""
    parts = max(1, -(-total * each // (nbytes or get_chunk_bytes())))
    return max(1, -(-total // parts))
