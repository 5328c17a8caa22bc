"""The pretended card: its memory, its streams, and what is asked of it through `torch.cuda`."""

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

CONTEXT_BYTES = 300 * 2**20  # what CUDA takes for itself on small cards
STREAM_COUNT = 32  # torch has so many, and hands them out in turn
CUBLAS_WORKSPACE_BYTES = 8519680  # the workspace of cuBLAS for each stream


@dataclass(eq=False, slots=True)
class DeviceMemory:
    """Of a tensor and all its views."""

    block: Block
    users: int = 0


class FakeEvent:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, card: "FakeCudaDevice", enable_timing: bool = False) -> None:
        self.card = card
        self.clock: Clock | None = None  # None: never recorded
        self.capture: GraphCapture | None = None

    def record(self, stream: "FakeStream | None" = None) -> None:
        timeline = stream.timeline if stream else self.card.current
        self.clock, self.capture = dict(timeline.clock), timeline.capture

    def elapsed_time(self, _: "FakeEvent") -> float:
        """Milliseconds: always one, since this card knows no time."""
        return 1.0


@dataclass(frozen=True)
class FakeStream:
    """Stands for `torch.cuda.Stream`."""

    card: "FakeCudaDevice" = field(repr=False)
    timeline: StreamTimeline

    @property
    def cuda_stream(self) -> int:
        return self.timeline.number

    def wait_event(self, event: FakeEvent) -> None:
        if event.clock is None:  # CUDA does not wait for what never was recorded
            return
        if event.capture is not None:
            if event.capture.origin.capture is not event.capture:
                raise RuntimeError("CUDA error: an event of a capture that is over was waited for")
            event.capture.join(self.timeline)
        elif self.timeline.capture is not None:
            raise self.timeline.capture.refuse("a wait for work that is not captured")
        self.timeline.learn(event.clock)

    def wait_stream(self, other: "FakeStream") -> None:
        event = FakeEvent(self.card)
        event.record(other)
        self.wait_event(event)


class FakeCudaDevice:
    """One card of `total` bytes, of which some are taken by CUDA itself."""

    place = torch.device("cpu")  # of the numbers

    def __init__(self, total: int = 4 * 2**30) -> None:
        self.device = torch.device("cuda", 0)
        self.allocator = FakeCachingAllocator(total, CONTEXT_BYTES, total)
        self.timelines = [StreamTimeline(number) for number in range(STREAM_COUNT + 1)]
        self.current = self.timelines[0]
        self.next_stream = itertools.cycle(self.timelines[1:])
        self.next_pool = itertools.count(1)
        self.host = StreamTimeline(-1)  # what the program has waited for
        self.memory: dict[int, DeviceMemory] = {}  # of storages on the host, by their identity
        self.storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.locked: dict[
            int, tuple[int, MemoryAccesses]
        ] = {}  # page-locked memory of the host: bytes, and who reads it
        self.workspaces: dict[int, DeviceMemory] = {}  # of cuBLAS, for each stream
        self.pending_error = ""  # an error that was met, and not yet told
        self.counts: Counter[str] = Counter()

    # Streams

    def begin_work(self) -> StreamTimeline:
        """On the current stream, after all that the program has waited for. Raises CaptureError once it is broken."""
        timeline = self.current
        if self.pending_error:
            error, self.pending_error = self.pending_error, ""
            raise RuntimeError(f"CUDA error: {error}")
        if timeline.capture is not None and timeline.capture.is_broken:
            raise timeline.capture.refuse("a previous error")
        if timeline.capture is None:
            timeline.learn(self.host.clock)
        timeline.step()
        return timeline

    def wait(self, *timelines: StreamTimeline) -> None:
        """The program waits for these streams. Raises CaptureError where one is being captured."""
        for timeline in timelines:
            if timeline.capture is not None:
                raise timeline.capture.refuse("the program waits for it")
            self.host.learn(timeline.clock)

    def finish(self) -> None:
        """All work that is under way."""
        self.host.learn({timeline.number: timeline.now for timeline in self.timelines})

    # Memory

    def allocate_temporarily(self, nbytes: int) -> None:
        """As torch does to change a type on the card."""
        self.allocator.free(self.new_memory(nbytes).block)

    def new_memory(self, nbytes: int) -> DeviceMemory:
        capture = self.current.capture
        if capture is None:
            self.current.learn(self.host.clock)
        return DeviceMemory(self.allocator.allocate(nbytes, self.current, capture.pool if capture else DEFAULT_POOL))

    def memory_of(self, numbers: Tensor) -> tuple[DeviceMemory | None, bool]:
        """The card's memory for these numbers of the host's, and whether it is new. None where there are none."""
        storage = numbers.untyped_storage()
        key = storage._cdata
        if not storage.nbytes():
            return None, False
        if key in self.memory:
            return self.memory[key], False
        made = self.memory[key] = self.new_memory(storage.nbytes())
        self.storages[key] = storage
        weakref.finalize(storage, self.memory.pop, key, None)
        return made, True

    def use(self, memory: DeviceMemory, tensor: Tensor) -> None:
        """As long as the tensor lives."""
        memory.users += 1
        weakref.finalize(tensor, self.leave, memory).atexit = False

    def leave(self, memory: DeviceMemory) -> None:
        memory.users -= 1
        if not memory.users:
            self.allocator.free(memory.block)

    def empty_cache(self) -> None:
        if not self.allocator.capturing_pools:
            before = len(self.allocator.segments)
            self.allocator.release()
            if len(self.allocator.segments) < before:
                self.finish()  # to free memory waits for all work

    # Work

    def compute(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation makes of tensors of the host."""
        return operation(*args, **kwargs)

    def tell(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the program is told, where it waits for numbers."""
        return operation(*args, **kwargs)

    def touch(self, reads: Iterable[DeviceMemory | None], writes: Iterable[DeviceMemory | None]) -> None:
        """A piece of work on the current stream. Raises Race where it may get in another's way."""
        timeline = self.begin_work()
        written = {memory for memory in writes if memory is not None}
        for memory in {memory for memory in reads if memory is not None} | written:
            self.accesses(memory).note(timeline, writes=memory in written)

    def accesses(self, memory: DeviceMemory) -> MemoryAccesses:
        capture = self.current.capture
        return memory.block.accesses if capture is None else capture.accesses(memory)

    def launched(self, work: Callable[[], None], stream: int, addresses: Sequence[int], writes: Sequence[bool]) -> None:
        """A kernel by the driver's own door. What it writes must lie as 16 bytes at once can be written."""
        assert stream == self.current.number, "a kernel went to another stream than torch's work"
        assert not any(address % 16 for address in addresses), "a kernel was given an odd address"
        storages = [self.storage_at(address) for address in addresses]
        memory = [self.memory[storage._cdata] for storage in storages]
        self.touch(memory, [one for one, written in zip(memory, writes, strict=True) if written])
        self.counts["launched"] += 1
        capture = self.current.capture
        if capture is None:
            work()
        else:
            capture.keep(work, storages)

    def storage_at(self, address: int) -> torch.UntypedStorage:
        for storage in self.storages.values():
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return storage
        raise AssertionError(f"a kernel was given {address:#x}, where no tensor of the card lies")

    # Page-locked memory of the host

    def find_pinned(self, tensor: Tensor) -> MemoryAccesses | None:
        """Who reads the page-locked memory that a tensor of the host lies in; None where it lies in other memory."""
        address = tensor.data_ptr()
        for start, (nbytes, accesses) in self.locked.items():
            if start <= address < start + nbytes:
                return accesses
        return None

    def lock(self, address: int, nbytes: int) -> bool:
        if self.current.capture is not None:
            raise self.current.capture.refuse("memory of the host is locked")
        if address in self.locked or nbytes <= 0:
            return False
        self.locked[address] = nbytes, MemoryAccesses()
        return True

    def set_pending_error(self, error: str) -> None:
        """CUDA tells of an error that nobody asked for at the next launch, which is innocent."""
        self.pending_error = error

    def unlock(self, address: int) -> None:
        """Raises Race where the card may still read the memory."""
        if self.current.capture is not None:
            raise self.current.capture.refuse("memory of the host is unlocked")
        _, accesses = self.locked.pop(address)
        accesses.check(self.host, "unlocked", writes=True)
