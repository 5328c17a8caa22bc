"""Bring components to the device for a stage: all weights at once, or layer by layer through two buffers.

While a group of layers computes from one buffer, the next group is copied into the other, on a separate CUDA stream. On
the CPU the "device" is a buffer in memory: the same code copies there without streams, and is tested there.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from tinysd_batch.model.device.malloc import trim_heap
from tinysd_batch.model.offload.components import Component, HostTensor, StreamedGroup, WeightGroup
from tinysd_batch.model.offload.layer_stream import LayerStream
from tinysd_batch.model.offload.pinned import PinnedWeights

MAX_RESIDENT_COPY_BYTES = 32 * 2**20  # on the CPU without a budget: a stage that would copy more than this is streamed


class Offloader:
    """Bring components to the device for their stages."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weight_budget_bytes: int | None = None  # limit for the weights of the next stage; None: no limit
        self.stream_all_weights = False  # whatever the budget
        self.pinned_weights: dict[Component, PinnedWeights] = {}  # by the first component of a stage
        self.stream: LayerStream | None = None  # of the current stage

    def should_stream(self, components: Sequence[Component], weight_budget_bytes: int | None) -> bool:
        """Whether weights of these components are to be streamed to the device layer by layer."""
        if self.stream_all_weights or self.would_duplicate_weights(components):
            return True
        nbytes = sum(component.nbytes for component in components)
        return weight_budget_bytes is not None and nbytes > weight_budget_bytes

    def would_duplicate_weights(self, components: Sequence[Component]) -> bool:
        """Whether on the CPU many weights would be in memory twice: as stored in the file, and in the device dtype."""
        tensors = (tensor for component in components for tensor in component.host_tensors)
        copied_bytes = sum(tensor.nbytes for tensor in tensors if not tensor.has_device_dtype)
        return self.device.type == "cpu" and copied_bytes > MAX_RESIDENT_COPY_BYTES

    @contextlib.contextmanager
    def holding(self, *components: Component) -> Iterator[None]:
        """Make these components ready to compute. Their weights leave the device afterwards."""
        try:
            if self.should_stream(components, self.weight_budget_bytes):
                with self.streaming(components):
                    yield
            else:
                self.load_resident([tensor for component in components for tensor in component.host_tensors])
                yield
        finally:
            for component in components:
                component.offload()
            nbytes = sum(component.nbytes for component in components)
            if self.device.type == "cpu" and nbytes > MAX_RESIDENT_COPY_BYTES:
                trim_heap()  # not worth it for small models

    def load_resident(self, tensors: Sequence[HostTensor]) -> None:
        """Load tensors for the whole stage: as one block on a GPU; on the CPU directly from the file if possible.

        Many small tensors would leave the segments of torch's allocator half empty, and a graph has its own segments.
        """
        group = WeightGroup(list(tensors))
        if self.device.type == "cuda":
            group.copy_into(torch.empty(group.nbytes, dtype=torch.uint8, device=self.device))
        else:
            group.onload(self.device)

    @contextlib.contextmanager
    def streaming(self, components: Sequence[Component]) -> Iterator[None]:
        """Copy each group to the device when the first of its modules is about to run."""
        resident, streamed = self.split_weights(components, self.weight_budget_bytes)
        self.load_resident(resident)
        files = [component.file for component in components if component.file is not None]
        groups = [group for group, _ in streamed]
        pinned = self.get_pinned_weights(components[0], groups)
        self.stream = stream = LayerStream(groups, self.device, pinned, files)
        handles = [
            module.register_forward_pre_hook(lambda *_, number=number: stream.need(number))
            for number, (_, modules) in enumerate(streamed)
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
        """Prepare for capturing a step as a graph, which includes its copies, after so many eager steps."""
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
            finally:  # an aborted capture makes close() fail, too, and later steps must not wait for its events
                stream.begin_again()

    def estimate_placement(self, components: Sequence[Component], weight_budget_bytes: int | None) -> tuple[int, int]:
        """Return how many bytes of weights would be resident under this budget, and how many bytes of buffers."""
        if not self.should_stream(components, weight_budget_bytes):
            return sum(component.nbytes for component in components), 0
        resident, streamed = self.split_weights(components, weight_budget_bytes)
        return sum(tensor.nbytes for tensor in resident), 2 * max((group.nbytes for group, _ in streamed), default=0)

    def split_weights(
        self, components: Sequence[Component], weight_budget_bytes: int | None
    ) -> tuple[list[HostTensor], list[StreamedGroup]]:
        """Decide which weights are resident, and which are streamed through buffers as large as the largest group.

        Under a budget, as many weights are resident as fit next to the buffers, spread evenly so that copies overlap
        with computation. Without a budget, on the CPU, weights that the file holds in the device dtype are resident,
        because using them in place takes no memory.
        """
        buffer_bytes = largest_group_bytes(components)
        resident = [tensor for component in components for tensor in component.resident.tensors]
        groups = [group for component in components for group in component.streamed]
        if not groups:  # a small model, whose call order was not traced
            return resident, []
        if weight_budget_bytes is None and not self.stream_all_weights:
            resident += [tensor for group, _ in groups for tensor in group.tensors if tensor.has_device_dtype]
            groups = [
                (WeightGroup([tensor for tensor in group.tensors if not tensor.has_device_dtype]), modules)
                for group, modules in groups
            ]
            return resident, merge_neighbour_groups([item for item in groups if item[0].tensors], buffer_bytes)
        available = 0 if self.stream_all_weights or weight_budget_bytes is None else weight_budget_bytes
        available -= sum(component.resident.nbytes for component in components) + 2 * buffer_bytes
        resident_share = available / sum(group.nbytes for group, _ in groups)
        only_device_dtype = self.would_duplicate_weights(components)
        streamed, seen_bytes, resident_bytes = [], 0, 0
        for group, modules in groups:
            seen_bytes += group.nbytes
            may_stay = not only_device_dtype or all(tensor.has_device_dtype for tensor in group.tensors)
            if may_stay and resident_bytes + group.nbytes <= resident_share * seen_bytes:
                resident_bytes += group.nbytes
                resident += group.tensors
            else:
                streamed.append((group, modules))
        return resident, merge_neighbour_groups(streamed, buffer_bytes)

    def get_pinned_weights(self, first: Component, groups: Sequence[WeightGroup]) -> PinnedWeights | None:
        """Return page-locked memory, from which copies overlap with computation. The CPU copies from the file."""
        if self.device.type != "cuda" or not groups:
            return None
        pinned = self.pinned_weights.get(first)
        if pinned is None or not pinned.is_copy_of(groups):
            self.pinned_weights.pop(first, None)  # first, so that the old and new copy are not page-locked together
            pinned = self.pinned_weights[first] = PinnedWeights.copy_of(groups, self.device)
        return pinned


def largest_group_bytes(components: Sequence[Component]) -> int:
    return max((group.nbytes for component in components for group, _ in component.streamed), default=0)


def merge_neighbour_groups(groups: Sequence[StreamedGroup], max_bytes: int) -> list[StreamedGroup]:
    """Merge neighbouring groups as long as they fit a buffer of `max_bytes`."""
    merged: list[StreamedGroup] = []
    for group, modules in groups:
        if not merged or merged[-1][0].nbytes + group.nbytes > max_bytes:
            merged.append((WeightGroup(), []))
        merged[-1][0].tensors.extend(group.tensors)
        merged[-1][1].extend(modules)
    return merged
