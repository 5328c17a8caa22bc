"""Who is on the device, and when: fragments for a whole phase, or piece by piece through two buffers.

While a piece is at work in one buffer the next is copied into the other, on a stream of its own where the device has
streams. On the CPU the "device" is a buffer in memory: the same code copies, waits for nothing, and is tested.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.offload.components import Fragment, HostTensor, Passing, Piece

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"  # and what it is called in the environment
PORTABLE = 1  # page-locked for all cards of the process: cudaHostRegisterPortable
COPIED_WHOLE_BYTES = 32 * 2**20  # on the CPU without a budget, a phase that would need more new memory is streamed


class Residency:
    """Brings fragments to the device for their phases."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.room: int | None = None  # bytes for the weights of the phase to come; None: no limit
        self.streams_all = False  # whatever the room
        self.arenas: dict[Fragment, Arena] = {}
        self.stream: Stream | None = None  # of the phase at work

    def streams(self, fragments: Sequence[Fragment]) -> bool:
        """Whether these fragments pass through the device piece by piece."""
        if self.streams_all or self.must_copy_much(fragments):
            return True
        return self.room is not None and sum(fragment.nbytes for fragment in fragments) > self.room

    def must_copy_much(self, fragments: Sequence[Fragment]) -> bool:
        """Whether on the CPU much would be there twice: in the file's pages, and in the type that is needed."""
        copied = sum(tensor.nbytes for part in fragments for tensor in part.host if not tensor.lies_ready)
        return self.device.type == "cpu" and copied > COPIED_WHOLE_BYTES

    @contextlib.contextmanager
    def holding(self, *fragments: Fragment) -> Iterator[None]:
        """These fragments can be computed with."""
        try:
            if self.streams(fragments):
                with self.streaming(fragments):
                    yield
            else:
                self.place([tensor for fragment in fragments for tensor in fragment.host])
                yield
        finally:
            for fragment in fragments:
                fragment.offload()
            if self.device.type == "cpu" and sum(part.nbytes for part in fragments) > COPIED_WHOLE_BYTES:
                return_freed_memory()  # of small models it is not worth taking back

    def place(self, tensors: Sequence[HostTensor]) -> None:
        """Bring tensors for the whole phase: to a card in one piece, to the CPU as the file holds them if it can be.

        Many small ones would leave the segments of torch's allocator half empty, and a graph has segments of its own.
        """
        piece = Piece(list(tensors))
        if self.device.type == "cuda":
            piece.fill(torch.empty(piece.nbytes, dtype=torch.uint8, device=self.device))
        else:
            piece.onload(self.device)

    @contextlib.contextmanager
    def streaming(self, fragments: Sequence[Fragment]) -> Iterator[None]:
        """Each piece comes when the first of its modules is about to work."""
        standing, passing = self.split(fragments)
        self.place(standing)
        files = [part.file for part in fragments if part.file is not None]
        self.stream = stream = Stream(
            [piece for piece, _ in passing], self.device, self.arena(fragments[0], passing), files
        )
        handles = [
            module.register_forward_pre_hook(lambda *_, number=number: stream.need(number))
            for number, (_, modules) in enumerate(passing)
            for module in modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            stream.close()
            self.stream = None

    @contextlib.contextmanager
    def capturing(self, steps: int) -> Iterator[None]:
        """While a step is captured as a graph, of which its copies are a part, after so many that were not."""
        stream = self.stream
        if stream is None:
            yield
            return
        stream.begin_again(switches=stream.switches // steps)
        try:
            yield
        finally:
            try:
                stream.close()
            finally:  # a capture that broke off refuses even this, and what comes next must not wait for it
                stream.begin_again()

    def placed(self, fragments: Sequence[Fragment], room: int | None) -> tuple[int, int]:
        """Bytes of weights that stay on the device in so much room, and of the buffers that others pass through."""
        self.room = room
        if not self.streams(fragments):
            return sum(fragment.nbytes for fragment in fragments), 0
        standing, passing = self.split(fragments)
        return sum(tensor.nbytes for tensor in standing), 2 * max((piece.nbytes for piece, _ in passing), default=0)

    def split(self, fragments: Sequence[Fragment]) -> tuple[list[HostTensor], list[Passing]]:
        """What stays on the device, and what passes through in buffers of the largest piece's size.

        In limited room, as much stays as fits beside the buffers, spread evenly so that copies hide behind work.
        Without a limit, on the CPU, what the file holds as it is needed takes no memory to stay.
        """
        buffer_bytes = largest_piece(fragments)
        standing = [tensor for part in fragments for tensor in part.standing.tensors]
        pieces = [item for part in fragments for item in part.passing]
        if not pieces:  # of a small model, whose order of work nobody learnt
            return standing, []
        if self.room is None and not self.streams_all:
            standing += [tensor for piece, _ in pieces for tensor in piece.tensors if tensor.lies_ready]
            pieces = [
                (Piece([one for one in piece.tensors if not one.lies_ready]), modules) for piece, modules in pieces
            ]
            return standing, gather([item for item in pieces if item[0].tensors], buffer_bytes)
        room = 0 if self.streams_all or self.room is None else self.room
        room -= sum(part.standing.nbytes for part in fragments) + 2 * buffer_bytes
        share = room / sum(piece.nbytes for piece, _ in pieces)
        only_ready = self.must_copy_much(fragments)
        passing, seen, staying = [], 0, 0
        for piece, modules in pieces:
            seen += piece.nbytes
            may_stay = not only_ready or all(tensor.lies_ready for tensor in piece.tensors)
            if may_stay and staying + piece.nbytes <= share * seen:
                staying += piece.nbytes
                standing += piece.tensors
            else:
                passing.append((piece, modules))
        return standing, gather(passing, buffer_bytes)

    def arena(self, first: Fragment, passing: Sequence[Passing]) -> "Arena | None":
        """Page-locked memory from which copies overlap with work; the CPU takes tensors from the file's pages."""
        if self.device.type != "cuda" or not passing:
            return None
        pieces = [piece for piece, _ in passing]
        known = self.arenas.get(first)
        if known is None or not known.is_of(pieces):
            self.arenas.pop(first, None)  # before another is made: both would be page-locked at once
            known = self.arenas[first] = Arena.of(pieces, self.device)
        return known


def return_freed_memory() -> None:
    """Hand the system what this phase has freed, which glibc would keep for itself."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def hand_back_blocks_of(nbytes: int) -> None:
    """Have glibc give blocks of the system's own for tensors of so many bytes, which go back as soon as they are free.

    Otherwise its heap keeps what it once had; but fetching pages anew costs time. Holds for the whole process.
    """
    if MMAP_THRESHOLD not in os.environ:  # the user's word
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, nbytes)
            libc.mallopt(M_TRIM_THRESHOLD, 16 * nbytes)


def largest_piece(fragments: Sequence[Fragment]) -> int:
    return max((piece.nbytes for part in fragments for piece, _ in part.passing), default=0)


def gather(pieces: Sequence[Passing], limit: int) -> list[Passing]:
    """Neighbours put together as long as they fit a buffer of `limit` bytes."""
    passing: list[Passing] = []
    for piece, modules in pieces:
        if not passing or passing[-1][0].nbytes + piece.nbytes > limit:
            passing.append((Piece(), []))
        passing[-1][0].tensors.extend(piece.tensors)
        passing[-1][1].extend(modules)
    return passing


@dataclass(frozen=True, slots=True)
class Arena:
    """All pieces in page-locked host memory, one after the other, as the device wants them."""

    memory: Tensor
    starts: tuple[int, ...]
    contents: "Contents"

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device | None = None) -> "Arena":
        """Page-locked for a card, or as any other memory."""
        nbytes = sum(piece.nbytes for piece in pieces)
        memory = page_locked(nbytes, device) if device else torch.empty(nbytes, dtype=torch.uint8)
        starts, end = [], 0
        for piece in pieces:
            starts.append(end)
            for tensor, place in piece.views(memory[end:]):
                place.copy_(tensor.value)
            end += piece.nbytes
        return cls(memory, tuple(starts), contents_of(pieces))

    def is_of(self, pieces: Sequence[Piece]) -> bool:
        """Whether it holds just these tensors; others may be as large."""
        return self.contents == contents_of(pieces)

    def piece(self, number: int, nbytes: int) -> Tensor:
        return self.memory[self.starts[number] :][:nbytes]


Contents = tuple[tuple[tuple[int, torch.dtype], ...], ...]  # of each piece the tensors, by their identity


def contents_of(pieces: Sequence[Piece]) -> Contents:
    return tuple(tuple((id(tensor), tensor.dtype) for tensor in piece.tensors) for piece in pieces)


def page_locked(nbytes: int, device: torch.device) -> Tensor:
    """Bytes that a card can copy by itself. Torch's own door to such memory hands out powers of two."""
    memory = mmap.mmap(-1, nbytes)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    runtime, wait = torch.cuda.cudart(), functools.partial(torch.cuda.synchronize, device)  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(tensor.data_ptr(), nbytes, PORTABLE)):
        forget_error()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def unlock(address: int, _: mmap.mmap) -> None:
        with contextlib.suppress(RuntimeError):
            wait()  # the piece after the last is sent for, too, and else nobody waits for it
        runtime.cudaHostUnregister(address)

    weakref.finalize(tensor, unlock, tensor.data_ptr(), memory).atexit = False  # the process's end unlocks it, too
    return tensor


def forget_error() -> None:
    """What went wrong and is dealt with: CUDA would tell of it at the next launch, which is innocent."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


@functools.cache
def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each card: torch hands out 32 in turn, and a new one would some day be that on which work is done."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class Stream:
    """Two buffers on the device through which pieces pass in a circle."""

    def __init__(
        self, pieces: Sequence[Piece], device: torch.device, arena: Arena | None, files: Sequence[MappedTensors] = ()
    ) -> None:
        """Without an arena tensors come from their files, whose pages are let go of as soon as they are copied."""
        self.pieces = pieces
        self.arena = arena
        self.files = files
        size = max((piece.nbytes for piece in pieces), default=0)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # which piece a buffer has, or is being given
        self.at_work = 0  # which buffer
        self.switches = 0  # from a piece to another, so far
        self.last: int | None = None  # the switch after which nothing is sent for
        self.begins = True  # with the next piece
        self.copying = copying_stream(device) if device.type == "cuda" else None
        self.copied: list[torch.cuda.Event] = []
        self.used: list[torch.cuda.Event] = []

    def begin_again(self, switches: int | None = None) -> None:
        """With the next piece, as if nothing had passed; after so many `switches` nothing more is sent for.

        What is captured may not wait for what went before, nor what comes later for what was captured.
        """
        self.begins, self.last = True, switches

    def begin(self) -> None:
        self.clear()
        self.holds, self.switches, self.begins = [None, None], 0, False
        if self.copying is not None:
            self.copied, self.used = ([new_event() for _ in self.buffers] for _ in range(2))
            self.copying.wait_stream(torch.cuda.current_stream())  # of which the buffers' memory may still be in use

    def need(self, number: int) -> None:
        """Have a piece in its modules, and send for the one after it."""
        if self.begins:
            self.begin()
        if self.holds[self.at_work] == number:
            return
        self.leave()
        self.at_work = 1 - self.at_work
        if self.holds[self.at_work] != number:  # the first, or out of turn
            self.fetch(number, self.at_work)
        if self.copying is not None:
            torch.cuda.current_stream().wait_event(self.copied[self.at_work])
        for tensor, place in self.pieces[number].views(self.buffers[self.at_work]):
            tensor.put(place)
        self.switches += 1
        if self.switches != self.last:
            self.fetch((number + 1) % len(self.pieces), 1 - self.at_work)

    def fetch(self, number: int, slot: int) -> None:
        """Copy a piece into a buffer, after the work that still reads it."""
        piece, buffer = self.pieces[number], self.buffers[slot]
        self.holds[slot] = number
        if self.arena is None or self.copying is None:
            for tensor, place in piece.views(buffer):
                place.copy_(tensor.value)
            for file in self.files:
                file.release(tensor.value for tensor in piece.tensors)
            return
        with torch.cuda.stream(self.copying):
            self.copying.wait_event(self.used[slot])
            buffer[: piece.nbytes].copy_(self.arena.piece(number, piece.nbytes), non_blocking=True)
            self.copied[slot].record(self.copying)

    def leave(self) -> None:
        """Empty the modules of the piece at work, whose buffer may be written to when the work so far is done."""
        self.clear()
        if self.copying is not None:
            self.used[self.at_work].record(torch.cuda.current_stream())

    def clear(self) -> None:
        number = self.holds[self.at_work]
        if number is not None:
            for tensor in self.pieces[number].tensors:
                tensor.clear()

    def close(self) -> None:
        """Wait for copies under way, so that the buffers' memory can serve others."""
        if self.copying is not None and not self.begins:
            torch.cuda.current_stream().wait_stream(self.copying)
