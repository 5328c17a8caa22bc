"""CUDA graphs of the fake GPU: operations are recorded while they are captured, and run when they are replayed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.fake_cuda.allocator import Pool
from tests.support.fake_cuda.race_detector import DataRaceError, MemoryAccesses, StreamTimeline

if TYPE_CHECKING:
    from tests.support.fake_cuda.device import DeviceMemory, FakeCudaDevice

BYTES_PER_OPERATION = 6000  # that the driver keeps for each operation of a graph; on real GPUs it varies


class CaptureError(RuntimeError):
    """CUDA's error for an operation that cannot be captured, and again at the end of a capture that this aborted."""


@dataclass(eq=False, slots=True)
class GraphCapture:
    """A capture in progress. `outside` has the accesses to memory that is not from the graph's own pool."""

    main_stream: StreamTimeline
    pool: Pool
    work: list[Callable[[], object]] = field(default_factory=list)
    outside: "dict[DeviceMemory, MemoryAccesses]" = field(default_factory=dict)
    joined: list[StreamTimeline] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)  # owners of the memory that kernels access by address
    is_broken: bool = False

    def add_kernel(self, work: Callable[[], object], memory_owner: object) -> None:
        self.work.append(work)
        self.kept.append(memory_owner)

    def abort(self, reason: str) -> CaptureError:
        """Abort the capture and return the error to raise."""
        self.is_broken = True
        return CaptureError(f"CUDA error: operation not permitted when stream is capturing: {reason}")

    def accesses(self, memory: "DeviceMemory") -> MemoryAccesses:
        if memory.block.segment.pool == self.pool:
            return memory.block.accesses
        return self.outside.setdefault(memory, MemoryAccesses())

    def join(self, timeline: StreamTimeline) -> None:
        if timeline.capture is None:
            timeline.capture = self
            self.joined.append(timeline)
        elif timeline.capture is not self:
            raise self.abort("two captures would be merged")

    def end(self) -> None:
        """Raise CaptureError if the capture was aborted, or if a stream has not been joined again."""
        for timeline in (self.main_stream, *self.joined):
            timeline.capture = None
        if self.is_broken:
            raise CaptureError("CUDA error: operation failed due to a previous error during capture")
        if not all(self.main_stream.is_after(timeline.number, timeline.now) for timeline in self.joined):
            raise CaptureError("CUDA error: capturing stream has unjoined work")


class FakeCudaGraph:
    """Replaces `torch.cuda.CUDAGraph`."""

    def __init__(self, gpu: "FakeCudaDevice") -> None:
        self.gpu = gpu
        self.captured: GraphCapture | None = None
        self.is_complete = False

    @property
    def nbytes(self) -> int:
        """The memory that the driver keeps for it."""
        return BYTES_PER_OPERATION * len(self.captured.work) if self.captured and self.is_complete else 0

    def capture_begin(self, pool: Pool, capture_error_mode: str = "global") -> None:
        timeline = self.gpu.current
        if timeline.number == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        assert timeline.capture is None, "a capture within a capture"
        self.captured = timeline.capture = GraphCapture(timeline, pool)
        self.gpu.allocator.begin(pool)
        self.gpu.counts["begun"] += 1

    def capture_end(self) -> None:
        assert self.captured is not None
        self.captured.end()  # if this raises, torch does not end the pool
        self.gpu.allocator.end(self.captured.pool)
        self.is_complete = True
        for block in self.gpu.allocator.pool_blocks(self.captured.pool):
            block.accesses = MemoryAccesses()  # nothing has run yet
        self.gpu.allocator.add_non_torch_bytes(self.nbytes)
        self.gpu.counts["captured"] += 1

    def replay(self) -> None:
        """Run the recorded operations. Raises DataRaceError if their memory was freed, or may still be in use."""
        assert self.captured is not None
        assert self.is_complete, "replayed before it was captured"
        timeline = self.gpu.begin_work()
        for memory, accesses in self.captured.outside.items():
            if not memory.users:
                raise DataRaceError("a graph accesses memory that was freed")
            memory.block.accesses.record(timeline, writes=bool(accesses.writes))
        for block in self.gpu.allocator.pool_blocks(self.captured.pool):
            block.accesses.record(timeline, writes=True)
        for work in self.captured.work:
            work()
        self.gpu.counts["replayed"] += 1

    def reset(self) -> None:
        self.gpu.allocator.add_non_torch_bytes(-self.nbytes)
        if self.is_complete and self.captured is not None:
            self.gpu.allocator.release_pool(self.captured.pool)
        self.captured, self.is_complete = None, False
