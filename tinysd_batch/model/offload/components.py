"""The four parts that come to the device for their turn: text encoder, UNet encode half, UNet decode half, VAE decoder.

A fragment is made of pieces, modules that work one after the other, so that it can be there as a whole or pass through
the device piece by piece. Weights are constants, so they move one way only: leaving the device is forgetting, never
copying back. What is away has empty tensors in its modules, with which nothing can be computed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.packed.layers import PackedLayer

ALIGNMENT_BYTES = 256  # bytes, of tensors that share a buffer


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

    @property
    def has_device_dtype(self) -> bool:
        """Whether the file holds it in the type in which it is needed."""
        return self.dtype is self.value.dtype

    @property
    def module_tensor(self) -> Tensor:
        """What the module has of it: itself, or an empty tensor."""
        here: Tensor = getattr(self.module, self.name)
        return here

    @property
    def is_onloaded(self) -> bool:
        return self.module_tensor.numel() > 0

    def put(self, tensor: Tensor) -> None:
        if self.name in self.module._buffers:
            self.module._buffers[self.name] = tensor
        else:
            self.module._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)

    def clear(self) -> None:
        self.put(torch.empty(0, dtype=self.dtype))
        if isinstance(self.module, PackedLayer):
            self.module.forget()


@dataclass(slots=True)
class WeightGroup:
    """Tensors that come to the device together."""

    tensors: list[HostTensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """In a buffer, with the gaps between tensors."""
        return sum(align(tensor.nbytes) for tensor in self.tensors)

    def views(self, buffer: Tensor) -> Iterator[tuple[HostTensor, Tensor]]:
        """Each tensor and its place in a buffer of bytes."""
        start = 0
        for tensor in self.tensors:
            place = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.value.shape)
            start += align(tensor.nbytes)
            yield tensor, place

    def copy_into(self, buffer: Tensor) -> None:
        """Bring the tensors to a buffer of bytes."""
        for tensor, place in self.views(buffer):
            # Without waiting torch changes the type on the card, in memory that nobody has planned.
            place.copy_(tensor.value, non_blocking=tensor.has_device_dtype)
            tensor.put(place)

    def onload(self, device: torch.device) -> None:
        """Bring the tensors to the device; on the CPU that is the file's memory itself where the type is right."""
        for tensor in self.tensors:
            tensor.put(tensor.value.to(device, tensor.dtype, non_blocking=True))

    def offload(self) -> None:
        """Forget the device's copy."""
        for tensor in self.tensors:
            tensor.clear()


StreamedGroup = tuple[WeightGroup, list[nn.Module]]  # what comes together, and who needs it


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Component:
    """Modules that work together, and their weights on the host."""

    def __init__(
        self, name: str, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], dtype: torch.dtype,
        order: Sequence[nn.Module] = (), together: Sequence[Sequence[nn.Module]] = (),
    ) -> None:  # fmt: skip
        """`tensors` holds all parameters and buffers of `modules` by dotted name; raises ModelError otherwise.

        Floats become `dtype` on their way to the device, so that the host holds no more than the file's own pages.
        `order` is the one in which modules work (`order_of_use`): each module of it that passes makes a piece, those
        that are to be `together`, since they work by turns, one in common. What is left, little enough, is the standing
        piece.
        """
        self.name = name
        self.file = tensors if isinstance(tensors, MappedTensors) else None
        self.resident = WeightGroup()
        self.streamed = group_streamed_modules(order, together)
        by_module = {module: piece for piece, modules in self.streamed for module in modules}
        for prefix, module in modules.items():
            for path, owner, leaf, place in named_tensors(module):
                value = get_checked_tensor(tensors, f"{prefix}.{path}" if prefix else path, place)
                kind = dtype if value.is_floating_point() else value.dtype
                by_module.get(owner, self.resident).tensors.append(HostTensor(owner, leaf, value, kind))
        self.streamed = [(piece, modules) for piece, modules in self.streamed if piece.tensors]
        for piece in self.groups:
            piece.offload()

    @property
    def groups(self) -> list[WeightGroup]:
        return [self.resident, *(piece for piece, _ in self.streamed)]

    @property
    def host_tensors(self) -> Iterator[HostTensor]:
        return (tensor for piece in self.groups for tensor in piece.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.host_tensors)

    @property
    def is_onloaded(self) -> bool:
        """Whether any of it is on the device."""
        return any(tensor.is_onloaded for tensor in self.host_tensors)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """What floats become when they next come to the device."""
        for tensor in self.host_tensors:
            tensor.dtype = dtype if tensor.value.is_floating_point() else tensor.dtype

    def onload(self, device: torch.device) -> None:
        for piece in self.groups:
            piece.onload(device)

    def use_meta_tensors(self) -> None:
        """Tensors of the right sizes and types without numbers, for a walk on the meta device."""
        for tensor in self.host_tensors:
            tensor.put(torch.empty(tensor.value.shape, dtype=tensor.dtype, device="meta"))

    def offload(self) -> None:
        """Forget the device's copy, and let go of the file's pages."""
        for piece in self.groups:
            piece.offload()
        if self.file is not None:
            self.file.release(tensor.value for tensor in self.host_tensors)


def group_streamed_modules(order: Sequence[nn.Module], together: Sequence[Sequence[nn.Module]]) -> list[StreamedGroup]:
    """An empty piece for each module that passes, or for each group of them, where the first of it works."""
    group_of = {module: number for number, group in enumerate(together) for module in group}
    pieces: dict[nn.Module | int, StreamedGroup] = {}
    for module in order:
        if can_be_streamed(module):
            pieces.setdefault(group_of.get(module, module), (WeightGroup(), []))[1].append(module)
    return list(pieces.values())


def can_be_streamed(module: nn.Module) -> bool:
    """Whether a module's tensors may come as late as when it is called.

    Not where there are none, where others are called within, and not those of embeddings, at whose shapes transformers
    looks before.
    """
    has_own = any(value is not None for value in [*module._parameters.values(), *module._buffers.values()])
    return has_own and not any(module.children()) and not isinstance(module, nn.Embedding)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer: its dotted path, the module that owns it, its name there, the tensor."""
    for prefix, owner in module.named_modules():
        for leaf, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is not None:
                yield f"{prefix}.{leaf}" if prefix else leaf, owner, leaf, value


def check_tensor_shapes(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise ModelError, naming `where`, for a tensor of a module that is missing or of the wrong shape."""
    for path, _, _, place in named_tensors(module):
        try:
            get_checked_tensor(tensors, path, place)
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from None


def get_checked_tensor(tensors: Mapping[str, Tensor], name: str, place: Tensor) -> Tensor:
    if name not in tensors:
        raise ModelError(f"tensor {name} is missing from the model; it needs shape {list(place.shape)}")
    if tensors[name].shape != place.shape:
        raise ModelError(f"tensor {name} has shape {list(tensors[name].shape)}, {list(place.shape)} was expected")
    return tensors[name]


def trace_call_order(modules: Iterable[nn.Module], run: Callable[[], object]) -> list[nn.Module]:
    """The modules within `modules` in the order in which `run` first calls them; cheap on the meta device."""
    order: dict[nn.Module, None] = {}
    handles = [
        inner.register_forward_pre_hook(lambda module, _: order.setdefault(module))
        for module in modules
        for inner in module.modules()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(order)
