"""The fake GPU: its memory, its streams, and what `torch.cuda` reads and does."""

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support.fake_cuda.allocator import DEFAULT_POOL, Block, FakeCachingAllocator
from tests.support.fake_cuda.graphs import GraphCapture
from tests.support.fake_cuda.race_detector import Clock, MemoryAccesses, StreamTimeline

CONTEXT_BYTES = 300 * 2**20  # the CUDA context on small GPUs
STREAM_COUNT = 32  # torch has so many, and hands them out in rotation
CUBLAS_WORKSPACE_BYTES = 8519680  # for each stream


@dataclass(eq=False, slots=True)
class DeviceMemory:
    """The memory of a tensor and all its views."""

    block: Block
    users: int = 0


class FakeEvent:
    """Replaces `torch.cuda.Event`."""

    def __init__(self, gpu: "FakeCudaDevice", enable_timing: bool = False) -> None:
        self.gpu = gpu
        self.clock: Clock | None = None  # None: never recorded
        self.capture: GraphCapture | None = None

    def record(self, stream: "FakeStream | None" = None) -> None:
        timeline = stream.timeline if stream else self.gpu.current
        self.clock, self.capture = dict(timeline.clock), timeline.capture

    def elapsed_time(self, _: "FakeEvent") -> float:
        """Return one millisecond: the fake GPU does not measure time."""
        return 1.0


@dataclass(frozen=True)
class FakeStream:
    """Replaces `torch.cuda.Stream`."""

    gpu: "FakeCudaDevice" = field(repr=False)
    timeline: StreamTimeline

    @property
    def cuda_stream(self) -> int:
        return self.timeline.number

    def wait_event(self, event: FakeEvent) -> None:
        if event.clock is None:  # CUDA does not wait for an event that was never recorded
            return
        if event.capture is not None:
            if event.capture.main_stream.capture is not event.capture:
                raise RuntimeError("CUDA error: wait for an event of a capture that has ended")
            event.capture.join(self.timeline)
        elif self.timeline.capture is not None:
            raise self.timeline.capture.abort("a wait for an operation that is not captured")
        self.timeline.wait_for(event.clock)

    def wait_stream(self, other: "FakeStream") -> None:
        event = FakeEvent(self.gpu)
        event.record(other)
        self.wait_event(event)


class FakeCudaDevice:
    """A GPU with `total` bytes of memory, some of which CUDA takes for itself."""

    storage_device = torch.device("cpu")  # where the tensors' data really is

    def __init__(self, total: int = 4 * 2**30) -> None:
        self.device = torch.device("cuda", 0)
        self.allocator = FakeCachingAllocator(total, CONTEXT_BYTES, total)
        self.timelines = [StreamTimeline(number) for number in range(STREAM_COUNT + 1)]
        self.current = self.timelines[0]
        self.next_stream = itertools.cycle(self.timelines[1:])
        self.next_pool = itertools.count(1)
        self.host = StreamTimeline(-1)  # the program itself, and what it has waited for
        self.memory: dict[int, DeviceMemory] = {}  # by identity of the storage on the host
        self.storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.pinned: dict[int, tuple[int, MemoryAccesses]] = {}  # page-locked host memory by address: size, accesses
        self.workspaces: dict[int, DeviceMemory] = {}  # of cuBLAS, by stream
        self.pending_error = ""  # an error that occurred and was not reported yet
        self.counts: Counter[str] = Counter()

    # Streams

    def begin_work(self) -> StreamTimeline:
        """Start an operation on the current stream, after all that the program has waited for.

        Raises CaptureError in a capture that was aborted.
        """
        timeline = self.current
        if self.pending_error:
            error, self.pending_error = self.pending_error, ""
            raise RuntimeError(f"CUDA error: {error}")
        if timeline.capture is not None and timeline.capture.is_broken:
            raise timeline.capture.abort("a previous error")
        if timeline.capture is None:
            timeline.wait_for(self.host.clock)
        timeline.step()
        return timeline

    def wait(self, *timelines: StreamTimeline) -> None:
        """Let the program wait for these streams. Raises CaptureError if one is being captured."""
        for timeline in timelines:
            if timeline.capture is not None:
                raise timeline.capture.abort("the program waits for it")
            self.host.wait_for(timeline.clock)

    def synchronize_all(self) -> None:
        """Wait for all operations in progress."""
        self.host.wait_for({timeline.number: timeline.now for timeline in self.timelines})

    # Memory

    def allocate_temporarily(self, nbytes: int) -> None:
        """Allocate and free memory, as torch does to convert a dtype on the GPU."""
        self.allocator.free(self.new_memory(nbytes).block)

    def new_memory(self, nbytes: int) -> DeviceMemory:
        capture = self.current.capture
        if capture is None:
            self.current.wait_for(self.host.clock)
        return DeviceMemory(self.allocator.allocate(nbytes, self.current, capture.pool if capture else DEFAULT_POOL))

    def memory_of(self, host_tensor: Tensor) -> tuple[DeviceMemory | None, bool]:
        """Return the GPU memory that belongs to a host tensor, and whether it is new. None for an empty tensor."""
        storage = host_tensor.untyped_storage()
        key = storage._cdata
        if not storage.nbytes():
            return None, False
        if key in self.memory:
            return self.memory[key], False
        memory = self.memory[key] = self.new_memory(storage.nbytes())
        self.storages[key] = storage
        weakref.finalize(storage, self.memory.pop, key, None)
        return memory, True

    def add_user(self, memory: DeviceMemory, tensor: Tensor) -> None:
        """Use the memory as long as the tensor is alive."""
        memory.users += 1
        weakref.finalize(tensor, self.remove_user, memory).atexit = False

    def remove_user(self, memory: DeviceMemory) -> None:
        memory.users -= 1
        if not memory.users:
            self.allocator.free(memory.block)

    def empty_cache(self) -> None:
        if not self.allocator.capturing_pools:
            before = len(self.allocator.segments)
            self.allocator.release()
            if len(self.allocator.segments) < before:
                self.synchronize_all()  # freeing memory waits for all operations

    # Work

    def compute(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on host tensors."""
        return operation(*args, **kwargs)

    def read_result(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation whose result the program reads."""
        return operation(*args, **kwargs)

    def touch(self, reads: Iterable[DeviceMemory | None], writes: Iterable[DeviceMemory | None]) -> None:
        """Record the accesses of an operation on the current stream. Raises DataRaceError."""
        timeline = self.begin_work()
        written = {memory for memory in writes if memory is not None}
        for memory in {memory for memory in reads if memory is not None} | written:
            self.accesses(memory).record(timeline, writes=memory in written)

    def accesses(self, memory: DeviceMemory) -> MemoryAccesses:
        capture = self.current.capture
        return memory.block.accesses if capture is None else capture.accesses(memory)

    def launch_kernel(
        self, work: Callable[[], None], stream: int, addresses: Sequence[int], writes: Sequence[bool]
    ) -> None:
        """Launch a kernel through the driver. Its memory must be aligned for stores of 16 bytes."""
        assert stream == self.current.number, "a kernel was launched on another stream than torch's operations"
        assert not any(address % 16 for address in addresses), "a kernel got an unaligned address"
        storages = [self.storage_at(address) for address in addresses]
        memory = [self.memory[storage._cdata] for storage in storages]
        self.touch(memory, [block for block, is_written in zip(memory, writes, strict=True) if is_written])
        self.counts["launched"] += 1
        capture = self.current.capture
        if capture is None:
            work()
        else:
            capture.add_kernel(work, storages)

    def storage_at(self, address: int) -> torch.UntypedStorage:
        for storage in self.storages.values():
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return storage
        raise AssertionError(f"a kernel got the address {address:#x}, where the GPU has no tensor")

    # Page-locked host memory

    def find_pinned(self, tensor: Tensor) -> MemoryAccesses | None:
        """Return the accesses to the page-locked memory that a host tensor is in; None if it is in other memory."""
        address = tensor.data_ptr()
        for start, (nbytes, accesses) in self.pinned.items():
            if start <= address < start + nbytes:
                return accesses
        return None

    def lock(self, address: int, nbytes: int) -> bool:
        if self.current.capture is not None:
            raise self.current.capture.abort("host memory is locked")
        if address in self.pinned or nbytes <= 0:
            return False
        self.pinned[address] = nbytes, MemoryAccesses()
        return True

    def set_pending_error(self, error: str) -> None:
        """Let the next launch report this error, as CUDA does with errors that were not read."""
        self.pending_error = error

    def unlock(self, address: int) -> None:
        """Unlock host memory. Raises DataRaceError if the GPU may still read it."""
        if self.current.capture is not None:
            raise self.current.capture.abort("host memory is unlocked")
        _, accesses = self.pinned.pop(address)
        accesses.check(self.host, "unlocked", writes=True)
