"""The four parts that come to the device for their turn: text encoder, UNet encode half, UNet decode half, VAE decoder.

Weights are constants, so they move one way only: leaving the device is forgetting, never copying back. A fragment that
is away has empty tensors in its modules, with which nothing can be computed.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinysd_batch.errors import ModelError
from tinysd_batch.model.packed import PackedLayer


@dataclass(slots=True)
class HostTensor:
    """A weight on the host and the place in its module where it goes."""

    module: nn.Module
    name: str
    value: Tensor  # as the file holds it, mapped
    dtype: torch.dtype  # on the device

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.value.numel() * self.dtype.itemsize

    def put(self, tensor: Tensor) -> None:
        if self.name in self.module._buffers:
            self.module._buffers[self.name] = tensor
        else:
            self.module._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)


class Fragment:
    """Modules that are on the device together or not at all."""

    def __init__(
        self, name: str, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """`tensors` holds all parameters and buffers of `modules` by dotted name; raises ModelError otherwise.

        Floats become `dtype` on their way to the device, so that the host holds no more than the file's own pages.
        """
        self.name = name
        self.is_onloaded = False
        self.host = []
        for prefix, module in modules.items():
            for path, owner, leaf, place in named_places(module):
                value = take(tensors, f"{prefix}.{path}" if prefix else path, place)
                self.host.append(HostTensor(owner, leaf, value, dtype if value.is_floating_point() else value.dtype))
        self.clear()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.host)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """What floats become when they next come to the device."""
        for tensor in self.host:
            tensor.dtype = dtype if tensor.value.is_floating_point() else tensor.dtype

    def onload(self, device: torch.device) -> None:
        """Bring the weights to the device; on the CPU that is the file's memory itself where the type is right."""
        if not self.is_onloaded:
            for tensor in self.host:
                tensor.put(tensor.value.to(device, tensor.dtype, non_blocking=True))
            self.is_onloaded = True

    def offload(self) -> None:
        """Forget the device's copy."""
        if self.is_onloaded:
            self.clear()
            self.is_onloaded = False

    def clear(self) -> None:
        for tensor in self.host:
            tensor.put(torch.empty(0, dtype=tensor.dtype))
            if isinstance(tensor.module, PackedLayer):
                tensor.module.kept = None


def named_places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer: its dotted path, the module that owns it, its name there, the tensor."""
    for prefix, owner in module.named_modules():
        for leaf, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is not None:
                yield f"{prefix}.{leaf}" if prefix else leaf, owner, leaf, value


def take(tensors: Mapping[str, Tensor], name: str, place: Tensor) -> Tensor:
    if name not in tensors:
        raise ModelError(f"tensor {name} is missing from the model; it needs shape {list(place.shape)}")
    if tensors[name].shape != place.shape:
        raise ModelError(f"tensor {name} has shape {list(tensors[name].shape)}, {list(place.shape)} was expected")
    return tensors[name]


class Residency:
    """Decides who stays on the device. Without a budget, or with room for all, fragments stay until told to go."""

    def __init__(self, fragments: Iterable[Fragment], device: torch.device, budget_bytes: int | None) -> None:
        """Raises ModelError when a single fragment is larger than the budget."""
        self.device = device
        together = list(fragments)
        largest = max(together, key=lambda fragment: fragment.nbytes)
        if budget_bytes is not None and largest.nbytes > budget_bytes:
            raise ModelError(
                f"vram_budget = {budget_bytes / 1e6:.1f} MB: "
                f"the {largest.name} alone takes {largest.nbytes / 1e6:.1f} MB"
            )
        self.one_at_a_time = budget_bytes is not None and sum(part.nbytes for part in together) > budget_bytes

    @contextlib.contextmanager
    def holding(self, *fragments: Fragment) -> Iterator[None]:
        """These fragments are there for a whole phase, or with a tight budget each only while `using` it."""
        try:
            if not self.one_at_a_time:
                for fragment in fragments:
                    fragment.onload(self.device)
            yield
        finally:
            for fragment in fragments:
                fragment.offload()

    @contextlib.contextmanager
    def using(self, fragment: Fragment) -> Iterator[None]:
        """The fragment is there now."""
        fragment.onload(self.device)
        try:
            yield
        finally:
            if self.one_at_a_time:
                fragment.offload()
