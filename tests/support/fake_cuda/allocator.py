"""Memory of the fake GPU, allocated as torch's caching allocator does (c10/cuda/CUDACachingAllocator).

Segments come from the driver and are split into blocks. Free neighbours are merged again. Each stream and each graph
has its own segments. A block keeps the record of its accesses, also when it is allocated again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tests.support.fake_cuda.race_detector import MemoryAccesses, StreamTimeline

UNIT = 512  # all sizes are multiples of it
SMALL = 2**20  # blocks up to this size come from small segments
SMALL_SEGMENT, LARGE_SEGMENT, LARGE, SEGMENT_UNIT = 2 * 2**20, 20 * 2**20, 10 * 2**20, 2 * 2**20
Pool = tuple[int, int]
DEFAULT_POOL: Pool = (0, 0)  # of everything that is not captured


@dataclass(eq=False, slots=True)
class Segment:
    nbytes: int
    is_small: bool
    stream: int
    pool: Pool
    blocks: "list[Block]" = field(default_factory=list)  # by address

    @property
    def is_free(self) -> bool:
        return all(block.is_free for block in self.blocks)


@dataclass(eq=False, slots=True)
class Block:
    segment: Segment
    nbytes: int
    is_free: bool = True
    accesses: MemoryAccesses = field(default_factory=MemoryAccesses)


@dataclass(slots=True)
class FakeCachingAllocator:
    """The memory of one GPU; all sizes are in bytes."""

    total: int
    non_torch_bytes: int  # in use, but not by torch
    limit: int  # of what torch may reserve
    segments: list[Segment] = field(default_factory=list)
    allocated: int = 0
    max_allocated: int = 0
    max_reserved: int = 0
    max_in_use: int = 0  # by torch and others together
    capturing_pools: list[Pool] = field(default_factory=list)  # of graphs that are being captured
    graphs_of: dict[Pool, int] = field(default_factory=dict)  # how many graphs use a pool

    @property
    def reserved(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    def allocate(self, nbytes: int, timeline: StreamTimeline, pool: Pool) -> Block:
        """Allocate a block. Raises OutOfMemoryError as torch does, after returning free segments to the driver."""
        size = max(UNIT, round_up(nbytes, UNIT))
        block = self.find(size, timeline.number, pool) or self.new_segment(size, timeline.number, pool)
        if block is None and not self.capturing_pools:
            self.release()
            block = self.new_segment(size, timeline.number, pool)
        if block is None:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes; {self.reserved} of {self.limit} are reserved."
            )
        self.split(block, size)
        block.accesses.check(timeline, "allocated again", writes=True)
        block.is_free = False
        self.allocated += block.nbytes
        self.max_allocated = max(self.max_allocated, self.allocated)
        return block

    def find(self, size: int, stream: int, pool: Pool) -> Block | None:
        """Return the smallest free block that is large enough."""
        key = (stream, pool, size <= SMALL)
        fitting = [
            block
            for segment in self.segments
            if (segment.stream, segment.pool, segment.is_small) == key
            for block in segment.blocks
            if block.is_free and block.nbytes >= size
        ]
        return min(fitting, key=lambda block: block.nbytes, default=None)

    def new_segment(self, size: int, stream: int, pool: Pool) -> Block | None:
        is_small = size <= SMALL
        nbytes = SMALL_SEGMENT if is_small else LARGE_SEGMENT if size < LARGE else round_up(size, SEGMENT_UNIT)
        if self.reserved + nbytes > min(self.limit, self.total - self.non_torch_bytes):
            return None
        segment = Segment(nbytes, is_small, stream, pool)
        segment.blocks.append(Block(segment, nbytes))
        self.segments.append(segment)
        self.max_reserved = max(self.max_reserved, self.reserved)
        self.max_in_use = max(self.max_in_use, self.reserved + self.non_torch_bytes)
        return segment.blocks[0]

    def split(self, block: Block, size: int) -> None:
        remaining = block.nbytes - size
        if remaining < UNIT or (not block.segment.is_small and remaining <= SMALL):
            return
        block.nbytes = size
        index = block.segment.blocks.index(block)
        block.segment.blocks.insert(index + 1, Block(block.segment, remaining, accesses=block.accesses.copy()))

    def free(self, block: Block) -> None:
        self.allocated -= block.nbytes
        block.is_free = True
        blocks = block.segment.blocks
        index = blocks.index(block)
        for first in (index, index - 1):  # merge with the next block, then with the previous one
            if 0 <= first < len(blocks) - 1 and blocks[first].is_free and blocks[first + 1].is_free:
                other = blocks.pop(first + 1)
                blocks[first].nbytes += other.nbytes
                blocks[first].accesses.include(other.accesses)

    def release(self) -> None:
        """Return free segments to the driver; those of graphs only when no graph uses them."""
        if not self.capturing_pools:
            used = (
                segment for segment in self.segments if not segment.is_free or self.graphs_of.get(segment.pool, 0) > 0
            )
            self.segments = list(used)

    def add_non_torch_bytes(self, nbytes: int) -> None:
        """Let others, such as the driver, take memory or (negative) return it."""
        self.non_torch_bytes += nbytes
        self.max_in_use = max(self.max_in_use, self.reserved + self.non_torch_bytes)

    def pool_blocks(self, pool: Pool) -> Iterator[Block]:
        return (block for segment in self.segments if segment.pool == pool for block in segment.blocks)

    def begin(self, pool: Pool) -> None:
        """Begin to capture a graph into this pool."""
        self.capturing_pools.append(pool)
        self.graphs_of[pool] = self.graphs_of.get(pool, 0) + 1

    def end(self, pool: Pool) -> None:
        if pool not in self.capturing_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing_pools.remove(pool)

    def release_pool(self, pool: Pool) -> None:
        assert self.graphs_of[pool] > 0, "a pool was released more often than it was used"
        self.graphs_of[pool] -= 1


def round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
