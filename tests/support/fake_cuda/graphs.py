"""Graphs of the pretended card: work that is written down while it is captured, and done when it is replayed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.fake_cuda.allocator import Pool
from tests.support.fake_cuda.race_detector import DataRaceError, MemoryAccesses, StreamTimeline

if TYPE_CHECKING:
    from tests.support.fake_cuda.device import DeviceMemory, FakeCudaDevice

BYTES_PER_OPERATION = 6000  # that the driver keeps for an operation of a graph; real ones vary


class CaptureError(RuntimeError):
    """What CUDA says of work that cannot be captured; at the end of a capture that this broke off, too."""


@dataclass(eq=False, slots=True)
class GraphCapture:
    """A capture under way. `outside` is memory that is not of the graph's own pool, and what is done to it."""

    origin: StreamTimeline
    pool: Pool
    work: list[Callable[[], object]] = field(default_factory=list)
    outside: "dict[DeviceMemory, MemoryAccesses]" = field(default_factory=dict)
    joined: list[StreamTimeline] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)  # what addresses point to
    is_broken: bool = False

    def keep(self, work: Callable[[], object], pointed_to: object) -> None:
        self.work.append(work)
        self.kept.append(pointed_to)

    def refuse(self, what: str) -> CaptureError:
        """An error to be raised; the capture is not to be saved any more."""
        self.is_broken = True
        return CaptureError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def accesses(self, memory: "DeviceMemory") -> MemoryAccesses:
        if memory.block.segment.pool == self.pool:
            return memory.block.accesses
        return self.outside.setdefault(memory, MemoryAccesses())

    def join(self, timeline: StreamTimeline) -> None:
        if timeline.capture is None:
            timeline.capture = self
            self.joined.append(timeline)
        elif timeline.capture is not self:
            raise self.refuse("two captures would be one")

    def end(self) -> None:
        """Raises CaptureError where it is broken, or where a stream has not come back to the first."""
        for timeline in (self.origin, *self.joined):
            timeline.capture = None
        if self.is_broken:
            raise CaptureError("CUDA error: operation failed due to a previous error during capture")
        if not all(self.origin.knows(timeline.number, timeline.now) for timeline in self.joined):
            raise CaptureError("CUDA error: capturing stream has unjoined work")


class FakeCudaGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self, card: "FakeCudaDevice") -> None:
        self.card = card
        self.captured: GraphCapture | None = None
        self.is_complete = False

    @property
    def nbytes(self) -> int:
        """That the driver keeps for it."""
        return BYTES_PER_OPERATION * len(self.captured.work) if self.captured and self.is_complete else 0

    def capture_begin(self, pool: Pool, capture_error_mode: str = "global") -> None:
        timeline = self.card.current
        if timeline.number == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        assert timeline.capture is None, "a capture within a capture"
        self.captured = timeline.capture = GraphCapture(timeline, pool)
        self.card.allocator.begin(pool)
        self.card.counts["begun"] += 1

    def capture_end(self) -> None:
        assert self.captured is not None
        self.captured.end()  # where this raises, torch forgets the pool
        self.card.allocator.end(self.captured.pool)
        self.is_complete = True
        for block in self.card.allocator.pool_blocks(self.captured.pool):
            block.accesses = MemoryAccesses()  # nothing was done yet
        self.card.allocator.add_non_torch_bytes(self.nbytes)
        self.card.counts["captured"] += 1

    def replay(self) -> None:
        """Raises Race where what it works with was freed, or may still be in use."""
        assert self.captured is not None
        assert self.is_complete, "replayed before it was captured"
        timeline = self.card.begin_work()
        for memory, accesses in self.captured.outside.items():
            if not memory.users:
                raise DataRaceError("a graph works with memory that was freed")
            memory.block.accesses.note(timeline, writes=bool(accesses.writes))
        for block in self.card.allocator.pool_blocks(self.captured.pool):
            block.accesses.note(timeline, writes=True)
        for work in self.captured.work:
            work()
        self.card.counts["replayed"] += 1

    def reset(self) -> None:
        self.card.allocator.add_non_torch_bytes(-self.nbytes)
        if self.is_complete and self.captured is not None:
            self.card.allocator.release_pool(self.captured.pool)
        self.captured, self.is_complete = None, False
