"""The components that are moved to the device one by one: text encoder, UNet halves (encode, decode), VAE decoder.

A component consists of groups of weights whose modules run one after the other, so that it can be on the device as a
whole, or be streamed group by group. Weights never change, so they are copied in one direction only: to offload them is
to drop the device's copy. Offloaded modules hold empty tensors, with which nothing can be computed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.packed.layers import PackedLayer

ALIGNMENT_BYTES = 256  # of tensors that share a buffer


@dataclass(slots=True)
class HostTensor:
    """A weight on the host, and the module and attribute that it belongs to."""

    module: nn.Module
    name: str
    value: Tensor  # memory-mapped, as stored in the file
    dtype: torch.dtype  # on the device

    @property
    def nbytes(self) -> int:
        """Size on the device."""
        return self.value.numel() * self.dtype.itemsize

    @property
    def has_device_dtype(self) -> bool:
        """Whether the file stores it in the dtype that the device needs."""
        return self.dtype is self.value.dtype

    @property
    def module_tensor(self) -> Tensor:
        """The module's current tensor: the weight, or an empty tensor while it is offloaded."""
        tensor: Tensor = getattr(self.module, self.name)
        return tensor

    @property
    def is_onloaded(self) -> bool:
        return self.module_tensor.numel() > 0

    def put(self, tensor: Tensor) -> None:
        """Make a tensor the module's parameter or buffer."""
        if self.name in self.module._buffers:
            self.module._buffers[self.name] = tensor
        else:
            self.module._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)

    def clear(self) -> None:
        """Replace the module's tensor by an empty one."""
        self.put(torch.empty(0, dtype=self.dtype))
        if isinstance(self.module, PackedLayer):
            self.module.clear_cache()


@dataclass(slots=True)
class WeightGroup:
    """Weights that are copied to the device together."""

    tensors: list[HostTensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size in a buffer, including alignment."""
        return sum(align(tensor.nbytes) for tensor in self.tensors)

    def views(self, buffer: Tensor) -> Iterator[tuple[HostTensor, Tensor]]:
        """Yield each tensor with its view into a uint8 buffer."""
        start = 0
        for tensor in self.tensors:
            view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.value.shape)
            start += align(tensor.nbytes)
            yield tensor, view

    def copy_into(self, buffer: Tensor) -> None:
        """Copy the tensors into a uint8 buffer and let their modules use them there."""
        for tensor, view in self.views(buffer):
            # A non-blocking copy would convert the dtype on the GPU, in memory that was not planned.
            view.copy_(tensor.value, non_blocking=tensor.has_device_dtype)
            tensor.put(view)

    def onload(self, device: torch.device) -> None:
        """Copy the tensors to the device. The CPU uses the file's memory itself where the dtype is right."""
        for tensor in self.tensors:
            tensor.put(tensor.value.to(device, tensor.dtype, non_blocking=True))

    def offload(self) -> None:
        """Drop the device's copy."""
        for tensor in self.tensors:
            tensor.clear()


StreamedGroup = tuple[WeightGroup, list[nn.Module]]  # weights, and the modules that need them


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Component:
    """Modules that run in the same stage, and their weights on the host."""

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        order: Sequence[nn.Module] = (),
        together: Sequence[Sequence[nn.Module]] = (),
    ) -> None:
        """Take the weights of modules from a file and leave the modules offloaded.

        Args:
            name: for messages.
            modules: by the prefix of their tensors' names.
            tensors: all parameters and buffers of `modules`, by dotted name.
            dtype: what floating-point weights are converted to on their way to the device, so that the host needs no
                memory beyond the file's own pages.
            order: the modules in the order of their calls (`trace_call_order`). Each that can be streamed becomes a
                group. The other weights, which are few, are always resident.
            together: modules that are called alternately, and therefore share a group.

        Raises:
            ModelError: a tensor is missing or has the wrong shape.
        """
        self.name = name
        self.file = tensors if isinstance(tensors, MappedTensors) else None
        self.resident = WeightGroup()
        self.streamed = group_streamed_modules(order, together)
        group_of = {module: group for group, members in self.streamed for module in members}
        for prefix, module in modules.items():
            for path, owner, name_in_owner, placeholder in named_tensors(module):
                value = get_checked_tensor(tensors, f"{prefix}.{path}" if prefix else path, placeholder)
                device_dtype = dtype if value.is_floating_point() else value.dtype
                group = group_of.get(owner, self.resident)
                group.tensors.append(HostTensor(owner, name_in_owner, value, device_dtype))
        self.streamed = [(group, members) for group, members in self.streamed if group.tensors]
        for group in self.groups:
            group.offload()

    @property
    def groups(self) -> list[WeightGroup]:
        return [self.resident, *(group for group, _ in self.streamed)]

    @property
    def host_tensors(self) -> Iterator[HostTensor]:
        return (tensor for group in self.groups for tensor in group.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.host_tensors)

    @property
    def is_onloaded(self) -> bool:
        """Whether any of its weights are on the device."""
        return any(tensor.is_onloaded for tensor in self.host_tensors)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Set what floating-point weights are converted to when they next come to the device."""
        for tensor in self.host_tensors:
            tensor.dtype = dtype if tensor.value.is_floating_point() else tensor.dtype

    def onload(self, device: torch.device) -> None:
        for group in self.groups:
            group.onload(device)

    def use_meta_tensors(self) -> None:
        """Put tensors of the right shapes and dtypes, without data, into the modules for a run on the meta device."""
        for tensor in self.host_tensors:
            tensor.put(torch.empty(tensor.value.shape, dtype=tensor.dtype, device="meta"))

    def offload(self) -> None:
        """Drop the device's copy, and release the file's pages."""
        for group in self.groups:
            group.offload()
        if self.file is not None:
            self.file.release(tensor.value for tensor in self.host_tensors)


def group_streamed_modules(order: Sequence[nn.Module], together: Sequence[Sequence[nn.Module]]) -> list[StreamedGroup]:
    """Return an empty group for each module that can be streamed, and one for each list of modules in `together`.

    Groups are in the order of the first call to one of their modules.
    """
    shared_group = {module: number for number, members in enumerate(together) for module in members}
    groups: dict[nn.Module | int, StreamedGroup] = {}
    for module in order:
        if can_be_streamed(module):
            groups.setdefault(shared_group.get(module, module), (WeightGroup(), []))[1].append(module)
    return list(groups.values())


def can_be_streamed(module: nn.Module) -> bool:
    """Whether it suffices that a module's tensors arrive when it is called.

    Not for modules without tensors, nor for those with submodules, nor for embeddings, whose shape transformers reads
    before it calls them.
    """
    has_own = any(value is not None for value in [*module._parameters.values(), *module._buffers.values()])
    return has_own and not any(module.children()) and not isinstance(module, nn.Embedding)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield for every parameter and buffer: dotted path, owning module, name in that module, tensor."""
    for prefix, owner in module.named_modules():
        for name, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is not None:
                yield f"{prefix}.{name}" if prefix else name, owner, name, value


def check_tensor_shapes(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise ModelError, naming the file or folder `where`, if a tensor is missing or has the wrong shape."""
    for path, _, _, placeholder in named_tensors(module):
        try:
            get_checked_tensor(tensors, path, placeholder)
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from None


def get_checked_tensor(tensors: Mapping[str, Tensor], name: str, placeholder: Tensor) -> Tensor:
    """Return a tensor with the shape of the model's placeholder. Raises ModelError."""
    expected = list(placeholder.shape)
    if name not in tensors:
        raise ModelError(f"tensor {name} is missing from the model; it needs shape {expected}")
    if tensors[name].shape != placeholder.shape:
        raise ModelError(f"tensor {name} has shape {list(tensors[name].shape)}, {expected} was expected")
    return tensors[name]


def trace_call_order(modules: Iterable[nn.Module], run: Callable[[], object]) -> list[nn.Module]:
    """Return all submodules of `modules` in the order in which `run` first calls them; cheap on the meta device."""
    order: dict[nn.Module, None] = {}
    handles = [
        submodule.register_forward_pre_hook(lambda module, _: order.setdefault(module))
        for module in modules
        for submodule in module.modules()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(order)
