"""Stream layers to the device through two buffers."""

from collections.abc import Sequence

import torch

from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.device.streams import get_copy_stream, new_event
from tinysd_batch.model.offload.components import WeightGroup
from tinysd_batch.model.offload.pinned import PinnedWeights


class LayerStream:
    """Two buffers on the device, through which groups of weights are streamed in a cycle.

    While one buffer is in use, the next group is copied into the other.
    """

    def __init__(
        self,
        groups: Sequence[WeightGroup],
        device: torch.device,
        pinned: PinnedWeights | None,
        files: Sequence[MappedTensors] = (),
    ) -> None:
        """Without `pinned` weights are copied from their files, whose pages are released as soon as they are copied."""
        self.groups = groups
        self.pinned = pinned
        self.files = files
        size = max((group.nbytes for group in groups), default=0)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # the group that each buffer holds or is being filled with
        self.active = 0  # the buffer in use
        self.switches = 0  # from one group to another, so far
        self.last_switch: int | None = None  # after this switch no further group is fetched
        self.begins = True  # start over with the next group
        self.copying = get_copy_stream(device) if device.type == "cuda" else None
        self.copied: list[torch.cuda.Event] = []  # per buffer: its copy is complete
        self.used: list[torch.cuda.Event] = []  # per buffer: the last computation that reads it is complete

    def begin_again(self, switches: int | None = None) -> None:
        """Start over with the next group, and fetch no further group after so many `switches`.

        A captured graph must not wait for events from before the capture, nor later work for events in the graph.
        """
        self.begins, self.last_switch = True, switches

    def begin(self) -> None:
        self.clear()
        self.holds, self.switches, self.begins = [None, None], 0, False
        if self.copying is not None:
            self.copied, self.used = ([new_event() for _ in self.buffers] for _ in range(2))
            self.copying.wait_stream(torch.cuda.current_stream())  # which may still use the buffers' memory

    def need(self, number: int) -> None:
        """Let modules use a group's weights, and fetch the group after it."""
        if self.begins:
            self.begin()
        if self.holds[self.active] == number:
            return
        self.leave()
        self.active = 1 - self.active
        if self.holds[self.active] != number:  # the first group, or one out of order
            self.fetch(number, self.active)
        if self.copying is not None:
            torch.cuda.current_stream().wait_event(self.copied[self.active])
        for tensor, view in self.groups[number].views(self.buffers[self.active]):
            tensor.put(view)
        self.switches += 1
        if self.switches != self.last_switch:
            self.fetch((number + 1) % len(self.groups), 1 - self.active)

    def fetch(self, number: int, slot: int) -> None:
        """Copy a group into a buffer, after the computation that still reads the buffer."""
        group, buffer = self.groups[number], self.buffers[slot]
        self.holds[slot] = number
        if self.pinned is None or self.copying is None:
            for tensor, view in group.views(buffer):
                view.copy_(tensor.value)
            for file in self.files:
                file.release(tensor.value for tensor in group.tensors)
            return
        with torch.cuda.stream(self.copying):
            self.copying.wait_event(self.used[slot])
            buffer[: group.nbytes].copy_(self.pinned.group_bytes(number, group.nbytes), non_blocking=True)
            self.copied[slot].record(self.copying)

    def leave(self) -> None:
        """Clear the modules of the current group. Its buffer may be overwritten once the work so far is complete."""
        self.clear()
        if self.copying is not None:
            self.used[self.active].record(torch.cuda.current_stream())

    def clear(self) -> None:
        number = self.holds[self.active]
        if number is not None:
            for tensor in self.groups[number].tensors:
                tensor.clear()

    def close(self) -> None:
        """Wait for pending copies, so that the buffers' memory can be reused."""
        if self.copying is not None and not self.begins:
            torch.cuda.current_stream().wait_stream(self.copying)
