"""Stream layers to the device through two buffers."""

from collections.abc import Sequence

import torch

from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.device.streams import get_copy_stream, new_event
from tinysd_batch.model.offload.components import WeightGroup
from tinysd_batch.model.offload.pinned import PinnedWeights


class LayerStream:
    """Two buffers on the device through which pieces pass in a circle."""

    def __init__(
        self,
        pieces: Sequence[WeightGroup],
        device: torch.device,
        arena: PinnedWeights | None,
        files: Sequence[MappedTensors] = (),
    ) -> None:
        """Without an arena tensors come from their files, whose pages are let go of as soon as they are copied."""
        self.groups = pieces
        self.arena = arena
        self.files = files
        size = max((piece.nbytes for piece in pieces), default=0)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # which piece a buffer has, or is being given
        self.at_work = 0  # which buffer
        self.switches = 0  # from a piece to another, so far
        self.last: int | None = None  # the switch after which nothing is sent for
        self.begins = True  # with the next piece
        self.copying = get_copy_stream(device) if device.type == "cuda" else None
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
        for tensor, place in self.groups[number].views(self.buffers[self.at_work]):
            tensor.put(place)
        self.switches += 1
        if self.switches != self.last:
            self.fetch((number + 1) % len(self.groups), 1 - self.at_work)

    def fetch(self, number: int, slot: int) -> None:
        """Copy a piece into a buffer, after the work that still reads it."""
        piece, buffer = self.groups[number], self.buffers[slot]
        self.holds[slot] = number
        if self.arena is None or self.copying is None:
            for tensor, place in piece.views(buffer):
                place.copy_(tensor.value)
            for file in self.files:
                file.release(tensor.value for tensor in piece.tensors)
            return
        with torch.cuda.stream(self.copying):
            self.copying.wait_event(self.used[slot])
            buffer[: piece.nbytes].copy_(self.arena.group_bytes(number, piece.nbytes), non_blocking=True)
            self.copied[slot].record(self.copying)

    def leave(self) -> None:
        """Empty the modules of the piece at work, whose buffer may be written to when the work so far is done."""
        self.clear()
        if self.copying is not None:
            self.used[self.at_work].record(torch.cuda.current_stream())

    def clear(self) -> None:
        number = self.holds[self.at_work]
        if number is not None:
            for tensor in self.groups[number].tensors:
                tensor.clear()

    def close(self) -> None:
        """Wait for copies under way, so that the buffers' memory can serve others."""
        if self.copying is not None and not self.begins:
            torch.cuda.current_stream().wait_stream(self.copying)
