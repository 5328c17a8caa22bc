"""The pretended card: its memory, its streams, and what is asked of it through `torch.cuda`."""

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support.fake_cuda.allocator import USUAL, Allocator, Block
from tests.support.fake_cuda.graphs import Capture
from tests.support.fake_cuda.race_detector import Accesses, Clock, Timeline

CONTEXT_BYTES = 300 * 2**20  # what CUDA takes for itself on small cards
STREAMS = 32  # torch has so many, and hands them out in turn
BLAS_BYTES = 8519680  # the workspace of cuBLAS for each stream


@dataclass(eq=False, slots=True)
class Memory:
    """Of a tensor and all its views."""

    block: Block
    users: int = 0


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, card: "Card", enable_timing: bool = False) -> None:
        self.card = card
        self.clock: Clock | None = None  # None: never recorded
        self.capture: Capture | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        timeline = stream.timeline if stream else self.card.current
        self.clock, self.capture = dict(timeline.clock), timeline.capture

    def elapsed_time(self, _: "Event") -> float:
        """Milliseconds: always one, since this card knows no time."""
        return 1.0


@dataclass(frozen=True)
class Stream:
    """Stands for `torch.cuda.Stream`."""

    card: "Card" = field(repr=False)
    timeline: Timeline

    @property
    def cuda_stream(self) -> int:
        return self.timeline.number

    def wait_event(self, event: Event) -> None:
        if event.clock is None:  # CUDA does not wait for what never was recorded
            return
        if event.capture is not None:
            if event.capture.origin.capture is not event.capture:
                raise RuntimeError("CUDA error: an event of a capture that is over was waited for")
            event.capture.join(self.timeline)
        elif self.timeline.capture is not None:
            raise self.timeline.capture.refuse("a wait for work that is not captured")
        self.timeline.learn(event.clock)

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self.card)
        event.record(other)
        self.wait_event(event)


class Card:
    """One card of `total` bytes, of which some are taken by CUDA itself."""

    place = torch.device("cpu")  # of the numbers

    def __init__(self, total: int = 4 * 2**30) -> None:
        self.device = torch.device("cuda", 0)
        self.allocator = Allocator(total, CONTEXT_BYTES, total)
        self.timelines = [Timeline(number) for number in range(STREAMS + 1)]
        self.current = self.timelines[0]
        self.next_stream = itertools.cycle(self.timelines[1:])
        self.next_pool = itertools.count(1)
        self.host = Timeline(-1)  # what the program has waited for
        self.memory: dict[int, Memory] = {}  # of storages on the host, by their identity
        self.storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.locked: dict[int, tuple[int, Accesses]] = {}  # page-locked memory of the host: bytes, and who reads it
        self.workspaces: dict[int, Memory] = {}  # of cuBLAS, for each stream
        self.untold = ""  # an error that was met, and not yet told
        self.counts: Counter[str] = Counter()

    # Streams

    def begin_work(self) -> Timeline:
        """On the current stream, after all that the program has waited for. Raises CaptureError once it is broken."""
        timeline = self.current
        if self.untold:
            error, self.untold = self.untold, ""
            raise RuntimeError(f"CUDA error: {error}")
        if timeline.capture is not None and timeline.capture.is_broken:
            raise timeline.capture.refuse("a previous error")
        if timeline.capture is None:
            timeline.learn(self.host.clock)
        timeline.step()
        return timeline

    def wait(self, *timelines: Timeline) -> None:
        """The program waits for these streams. Raises CaptureError where one is being captured."""
        for timeline in timelines:
            if timeline.capture is not None:
                raise timeline.capture.refuse("the program waits for it")
            self.host.learn(timeline.clock)

    def finish(self) -> None:
        """All work that is under way."""
        self.host.learn({timeline.number: timeline.now for timeline in self.timelines})

    # Memory

    def take_for_a_moment(self, nbytes: int) -> None:
        """As torch does to change a type on the card."""
        self.allocator.free(self.new_memory(nbytes).block)

    def new_memory(self, nbytes: int) -> Memory:
        capture = self.current.capture
        if capture is None:
            self.current.learn(self.host.clock)
        return Memory(self.allocator.allocate(nbytes, self.current, capture.pool if capture else USUAL))

    def lies_in(self, numbers: Tensor) -> tuple[Memory | None, bool]:
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

    def use(self, memory: Memory, tensor: Tensor) -> None:
        """As long as the tensor lives."""
        memory.users += 1
        weakref.finalize(tensor, self.leave, memory).atexit = False

    def leave(self, memory: Memory) -> None:
        memory.users -= 1
        if not memory.users:
            self.allocator.free(memory.block)

    def empty_cache(self) -> None:
        if not self.allocator.underway:
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

    def touch(self, reads: Iterable[Memory | None], writes: Iterable[Memory | None]) -> None:
        """A piece of work on the current stream. Raises Race where it may get in another's way."""
        timeline = self.begin_work()
        written = {memory for memory in writes if memory is not None}
        for memory in {memory for memory in reads if memory is not None} | written:
            self.accesses(memory).note(timeline, writes=memory in written)

    def accesses(self, memory: Memory) -> Accesses:
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

    def locked_at(self, tensor: Tensor) -> Accesses | None:
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
        self.locked[address] = nbytes, Accesses()
        return True

    def fail_once(self, error: str) -> None:
        """CUDA tells of an error that nobody asked for at the next launch, which is innocent."""
        self.untold = error

    def unlock(self, address: int) -> None:
        """Raises Race where the card may still read the memory."""
        if self.current.capture is not None:
            raise self.current.capture.refuse("memory of the host is unlocked")
        _, accesses = self.locked.pop(address)
        accesses.check(self.host, "unlocked", writes=True)
