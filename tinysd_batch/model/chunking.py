"""How large the parts are in which large tensors are worked on: matrices, feature maps, attention scores.

Smaller parts need less memory and a little more time; what comes out is the same up to rounding.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

USUAL_BYTES = 32 * 2**20
SMALL_BYTES, SMALLEST_BYTES = 8 * 2**20, 4 * 2**20
CURRENT: ContextVar[int] = ContextVar("part_bytes", default=USUAL_BYTES)  # each thread's own


def part_bytes() -> int:
    return CURRENT.get()


@contextlib.contextmanager
def in_parts_of(nbytes: int) -> Iterator[None]:
    before = CURRENT.set(nbytes)
    try:
        yield
    finally:
        CURRENT.reset(before)


def at_once(total: int, each: int, nbytes: int | None = None) -> int:
    """How many of `total` things of `each` bytes make a part, in parts as equal as may be; at least one."""
    parts = max(1, -(-total * each // (nbytes or part_bytes())))
    return max(1, -(-total // parts))
