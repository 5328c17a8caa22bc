"""Who is on the device, and when: fragments for a whole phase, or piece by piece through two buffers.

While a piece is at work in one buffer the next is copied into the other, on a stream of its own where the device has
streams. On the CPU the "device" is a buffer in memory: the same code copies, waits for nothing, and is tested.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from tinysd_batch.model.device.malloc import trim_heap
from tinysd_batch.model.offload.components import Component, HostTensor, StreamedGroup, WeightGroup
from tinysd_batch.model.offload.layer_stream import LayerStream
from tinysd_batch.model.offload.pinned import PinnedWeights

MAX_RESIDENT_COPY_BYTES = 32 * 2**20  # on the CPU without a budget, a phase that would need more new memory is streamed


class Offloader:
    """Brings fragments to the device for their phases."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weight_budget_bytes: int | None = None  # bytes for the weights of the phase to come; None: no limit
        self.stream_all_weights = False  # whatever the room
        self.arenas: dict[Component, PinnedWeights] = {}
        self.stream: LayerStream | None = None  # of the phase at work

    def should_stream(self, fragments: Sequence[Component]) -> bool:
        """Whether these fragments pass through the device piece by piece."""
        if self.stream_all_weights or self.would_duplicate_weights(fragments):
            return True
        return (
            self.weight_budget_bytes is not None
            and sum(fragment.nbytes for fragment in fragments) > self.weight_budget_bytes
        )

    def would_duplicate_weights(self, fragments: Sequence[Component]) -> bool:
        """Whether on the CPU much would be there twice: in the file's pages, and in the type that is needed."""
        copied = sum(tensor.nbytes for part in fragments for tensor in part.host_tensors if not tensor.has_device_dtype)
        return self.device.type == "cpu" and copied > MAX_RESIDENT_COPY_BYTES

    @contextlib.contextmanager
    def holding(self, *fragments: Component) -> Iterator[None]:
        """These fragments can be computed with."""
        try:
            if self.should_stream(fragments):
                with self.streaming(fragments):
                    yield
            else:
                self.load_resident([tensor for fragment in fragments for tensor in fragment.host_tensors])
                yield
        finally:
            for fragment in fragments:
                fragment.offload()
            if self.device.type == "cpu" and sum(part.nbytes for part in fragments) > MAX_RESIDENT_COPY_BYTES:
                trim_heap()  # of small models it is not worth taking back

    def load_resident(self, tensors: Sequence[HostTensor]) -> None:
        """Bring tensors for the whole phase: to a card in one piece, to the CPU as the file holds them if it can be.

        Many small ones would leave the segments of torch's allocator half empty, and a graph has segments of its own.
        """
        piece = WeightGroup(list(tensors))
        if self.device.type == "cuda":
            piece.copy_into(torch.empty(piece.nbytes, dtype=torch.uint8, device=self.device))
        else:
            piece.onload(self.device)

    @contextlib.contextmanager
    def streaming(self, fragments: Sequence[Component]) -> Iterator[None]:
        """Each piece comes when the first of its modules is about to work."""
        standing, passing = self.split(fragments)
        self.load_resident(standing)
        files = [part.file for part in fragments if part.file is not None]
        self.stream = stream = LayerStream(
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

    def estimate_placement(self, fragments: Sequence[Component], room: int | None) -> tuple[int, int]:
        """Bytes of weights that stay on the device in so much room, and of the buffers that others pass through."""
        self.weight_budget_bytes = room
        if not self.should_stream(fragments):
            return sum(fragment.nbytes for fragment in fragments), 0
        standing, passing = self.split(fragments)
        return sum(tensor.nbytes for tensor in standing), 2 * max((piece.nbytes for piece, _ in passing), default=0)

    def split(self, fragments: Sequence[Component]) -> tuple[list[HostTensor], list[StreamedGroup]]:
        """What stays on the device, and what passes through in buffers of the largest piece's size.

        In limited room, as much stays as fits beside the buffers, spread evenly so that copies hide behind work.
        Without a limit, on the CPU, what the file holds as it is needed takes no memory to stay.
        """
        buffer_bytes = largest_group_bytes(fragments)
        standing = [tensor for part in fragments for tensor in part.resident.tensors]
        pieces = [item for part in fragments for item in part.streamed]
        if not pieces:  # of a small model, whose order of work nobody learnt
            return standing, []
        if self.weight_budget_bytes is None and not self.stream_all_weights:
            standing += [tensor for piece, _ in pieces for tensor in piece.tensors if tensor.has_device_dtype]
            pieces = [
                (WeightGroup([one for one in piece.tensors if not one.has_device_dtype]), modules)
                for piece, modules in pieces
            ]
            return standing, merge_neighbour_groups([item for item in pieces if item[0].tensors], buffer_bytes)
        room = 0 if self.stream_all_weights or self.weight_budget_bytes is None else self.weight_budget_bytes
        room -= sum(part.resident.nbytes for part in fragments) + 2 * buffer_bytes
        share = room / sum(piece.nbytes for piece, _ in pieces)
        only_ready = self.would_duplicate_weights(fragments)
        passing, seen, staying = [], 0, 0
        for piece, modules in pieces:
            seen += piece.nbytes
            may_stay = not only_ready or all(tensor.has_device_dtype for tensor in piece.tensors)
            if may_stay and staying + piece.nbytes <= share * seen:
                staying += piece.nbytes
                standing += piece.tensors
            else:
                passing.append((piece, modules))
        return standing, merge_neighbour_groups(passing, buffer_bytes)

    def arena(self, first: Component, passing: Sequence[StreamedGroup]) -> "PinnedWeights | None":
        """Page-locked memory from which copies overlap with work; the CPU takes tensors from the file's pages."""
        if self.device.type != "cuda" or not passing:
            return None
        pieces = [piece for piece, _ in passing]
        known = self.arenas.get(first)
        if known is None or not known.is_copy_of(pieces):
            self.arenas.pop(first, None)  # before another is made: both would be page-locked at once
            known = self.arenas[first] = PinnedWeights.copy_of(pieces, self.device)
        return known


def largest_group_bytes(fragments: Sequence[Component]) -> int:
    return max((piece.nbytes for part in fragments for piece, _ in part.streamed), default=0)


def merge_neighbour_groups(pieces: Sequence[StreamedGroup], limit: int) -> list[StreamedGroup]:
    """Neighbours put together as long as they fit a buffer of `limit` bytes."""
    passing: list[StreamedGroup] = []
    for piece, modules in pieces:
        if not passing or passing[-1][0].nbytes + piece.nbytes > limit:
            passing.append((WeightGroup(), []))
        passing[-1][0].tensors.extend(piece.tensors)
        passing[-1][1].extend(modules)
    return passing
