"""Tensors of the fake GPU. Operations on them run on the CPU, but under the rules of a GPU."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.fake_cuda.device import CUBLAS_WORKSPACE_BYTES, DeviceMemory, FakeCudaDevice
from tests.support.fake_cuda.graphs import GraphCapture
from tests.support.fake_cuda.race_detector import MemoryAccesses

Operation = Callable[..., Any]
Arguments = tuple[Any, ...]
Named = dict[str, Any]
aten = torch.ops.aten
TO_COPY, COPY = aten._to_copy.default, aten.copy_.default
SYNCHRONIZING = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SIZE_DEPENDS_ON_DATA = {
    aten.nonzero.default,
    aten.masked_select.default,
}  # the program waits for the result's size
JOINED = {aten.cat.default, aten.stack.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
PLAIN = {int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format}
EMPTY = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip


class FakeCudaTensor(Tensor):
    """A tensor that reports to be on the GPU; its data is in `host_tensor`."""

    gpu: ClassVar[FakeCudaDevice]
    host_tensor: Tensor
    memory: DeviceMemory | None
    is_first: bool  # the first tensor in its memory; others are views

    @staticmethod
    def __new__(cls, host_tensor: Tensor) -> "FakeCudaTensor":
        tensor: FakeCudaTensor = Tensor._make_wrapper_subclass(
            cls,
            host_tensor.shape,
            strides=host_tensor.stride(),
            storage_offset=host_tensor.storage_offset(),
            dtype=host_tensor.dtype,
            device=cls.gpu.device,
        )
        tensor.host_tensor = host_tensor
        tensor.memory, tensor.is_first = cls.gpu.memory_of(host_tensor)
        if tensor.memory is not None:
            cls.gpu.add_user(tensor.memory, tensor)
        return tensor

    @classmethod
    def __torch_function__(
        cls, operation: Operation, types: Any, args: Arguments = (), kwargs: Named | None = None
    ) -> Any:
        if operation is F.scaled_dot_product_attention:  # torch would look for CUDA kernels
            return run(cls.gpu, operation, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return operation(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Operation, types: Any, args: Arguments = (), kwargs: Named | None = None
    ) -> Any:
        return run(cls.gpu, operation, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.host_tensor.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host_tensor.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()


class FakeCudaMode(TorchDispatchMode):
    """Run operations that involve the GPU on the fake GPU, and all others as usual."""

    def __init__(self, gpu: FakeCudaDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Save the two wrappers that disable dynamo for each operation: nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, operation: Operation, types: Any, args: Arguments = (), kwargs: Named | None = None
    ) -> Any:
        if kwargs and kwargs.get("pin_memory"):
            return create_pinned(self.gpu, operation, args, {**kwargs, "pin_memory": False})
        return run(self.gpu, operation, args, kwargs or {})


def run(gpu: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named) -> Any:
    """Run an operation wherever its tensors are. Raises RuntimeError as torch does if they are on different devices."""
    on_gpu = [tensor for tensor in tensors_in(args, kwargs) if isinstance(tensor, FakeCudaTensor)]
    device = kwargs.get("device")
    to_gpu = device is not None and torch.device(device).type == "cuda"
    if not on_gpu and not to_gpu:
        return operation(*args, **kwargs)
    if device is not None:
        kwargs = {**kwargs, "device": gpu.storage_device if to_gpu else torch.device("cpu")}
    if operation in (TO_COPY, COPY):
        return transfer(gpu, operation, args, kwargs, to_gpu or device is None)
    if operation in SYNCHRONIZING:
        wait_for_result(gpu, on_gpu)
        return gpu.read_result(operation, to_host_tensors(args), to_host_tensors(kwargs))
    if operation in SIZE_DEPENDS_ON_DATA:
        wait_for_result(gpu, on_gpu)
    if on_gpu:
        check_same_device(gpu, operation, args, kwargs)
    if device is not None and not to_gpu:  # such as an empty host tensor like one on the GPU
        return operation(*to_host_tensors(args), **to_host_tensors(kwargs))
    return run_on_gpu(gpu, operation, args, kwargs)


def create_pinned(gpu: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named) -> Tensor:
    """Create a page-locked host tensor, whose memory torch keeps until all copies from it are complete."""
    tensor: Tensor = operation(*args, **kwargs)
    gpu.lock(tensor.data_ptr(), tensor.untyped_storage().nbytes())
    weakref.finalize(tensor.untyped_storage(), gpu.pinned.pop, tensor.data_ptr())
    return tensor


def transfer(gpu: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named, to_gpu: bool) -> Any:
    """Copy from the host to the GPU, back, or within the GPU."""
    source = args[1] if operation is COPY else args[0]
    if operation is COPY:
        to_gpu = isinstance(args[0], FakeCudaTensor)
    if not isinstance(source, FakeCudaTensor):
        non_blocking = bool(kwargs.get("non_blocking") or (args[2:] and args[2]))
        check_source(gpu, source, non_blocking)
        if non_blocking and source.dtype is not (
            args[0].dtype if operation is COPY else kwargs.get("dtype", source.dtype)
        ):
            gpu.allocate_temporarily(source.nbytes)  # torch then converts the dtype on the GPU
    elif not to_gpu:
        assert not kwargs.get("non_blocking"), "the fake GPU has no asynchronous copies to the host"
        wait_for_result(gpu, [source])
        return gpu.read_result(operation, to_host_tensors(args), kwargs)
    return run_on_gpu(gpu, operation, args, kwargs)


def check_source(gpu: FakeCudaDevice, source: Tensor, non_blocking: bool) -> None:
    """Record that the GPU reads host memory: later if it is page-locked, otherwise before the copy returns."""
    accesses, capture = gpu.find_pinned(source), gpu.current.capture
    if accesses is None or not non_blocking:
        if capture is not None:
            raise capture.abort("a copy from pageable memory")
        return
    record = partial(record_read, gpu, accesses)
    if capture is not None:
        capture.work.append(record)
    else:
        gpu.begin_work()
        record()


def record_read(gpu: FakeCudaDevice, accesses: MemoryAccesses) -> None:
    accesses.reads[gpu.current.number] = gpu.current.now


def wait_for_result(gpu: FakeCudaDevice, tensors: list[FakeCudaTensor]) -> None:
    """Let the program wait until it can read tensors of the GPU."""
    gpu.touch([tensor.memory for tensor in tensors], [])
    gpu.wait(gpu.current)


def check_same_device(gpu: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named) -> None:
    """Raise RuntimeError if tensors are on different devices.

    Scalars may be on the host unless tensors are joined, and so may indices, which are copied.
    """
    checked = (args[0], args[2:], kwargs) if operation in INDEXED else (args, kwargs)
    for tensor in tensors_in(*checked):
        if not isinstance(tensor, FakeCudaTensor) and (tensor.dim() > 0 or operation in JOINED):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {operation}"
            )
    if operation not in INDEXED or gpu.current.capture is None:
        return
    for index in tensors_in(args[1]):
        if not isinstance(index, FakeCudaTensor) or index.dtype is torch.bool:
            raise gpu.current.capture.abort("indices that have to be copied or counted")


@dataclass(frozen=True, eq=False, slots=True)
class HostOperation:
    """An operation on host tensors: a graph must not keep tensors of the GPU alive."""

    gpu: FakeCudaDevice
    operation: Operation
    args: Arguments
    kwargs: Named

    def run(self) -> Any:
        return self.gpu.compute(self.operation, self.args, self.kwargs)

    def run_again(self, outputs: Mapping[int, Tensor]) -> None:
        """Run it again and copy new results, by their index, into the outputs of the first run."""
        for index, result in enumerate(tensors_in(self.run())):
            if index in outputs:
                outputs[index].copy_(result)


@dataclass(frozen=True, eq=False, slots=True)
class Operands:
    """The tensors of the GPU that an operation gets, and those that it writes to."""

    inputs: list[FakeCudaTensor]
    written: list[FakeCudaTensor]

    def wrap(self, host_tensor: Tensor) -> FakeCudaTensor:
        """Return the GPU tensor for a result: an input, if the operation returned it, or a new one."""
        for tensor in self.inputs:
            if tensor.host_tensor is host_tensor:
                return tensor
        return FakeCudaTensor(host_tensor)

    def touch(self, gpu: FakeCudaDevice, *new: FakeCudaTensor) -> None:
        gpu.touch([tensor.memory for tensor in self.inputs], [tensor.memory for tensor in (*self.written, *new)])
        gpu.counts["operations"] += 1


def run_on_gpu(gpu: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named) -> Any:
    """Run an operation at once; in a capture, record it for the graph."""
    inputs = [tensor for tensor in tensors_in(args, kwargs) if isinstance(tensor, FakeCudaTensor)]
    written = [tensor for tensor in written_by(operation, args, kwargs) if isinstance(tensor, FakeCudaTensor)]
    host_operation = HostOperation(gpu, operation, to_host_tensors(args), to_host_tensors(kwargs))
    operands = Operands(inputs, written)
    capture = gpu.current.capture
    if operation in PRODUCTS:
        allocate_workspace(gpu)
    if capture is not None:
        return record_for_graph(host_operation, operands, capture)
    result, new = compute_result(host_operation, operands)
    if written or (new and operation not in EMPTY):  # other operations only return views
        operands.touch(gpu, *new.values())
    return result


def record_for_graph(host_operation: HostOperation, operands: Operands, capture: GraphCapture) -> Any:
    if capture.is_broken:
        raise capture.abort("a previous error")
    gpu = host_operation.gpu
    if operands.written:
        assert len(operands.written) == 1, "the fake GPU cannot capture operations that write to several tensors"
        operands.touch(gpu)
        capture.work.append(host_operation.run)
        return operands.written[0]
    result, new = compute_result(host_operation, operands)
    if new and host_operation.operation not in EMPTY:
        operands.touch(gpu, *new.values())
        outputs = {index: tensor.host_tensor for index, tensor in new.items()}
        capture.work.append(partial(host_operation.run_again, outputs))
        for tensor in new.values():
            poison(tensor.host_tensor)
    return result


def compute_result(host_operation: HostOperation, operands: Operands) -> tuple[Any, dict[int, FakeCudaTensor]]:
    """Return the result on the GPU, and by index those of its tensors that have memory of their own."""
    result = map_tensors(operands.wrap, host_operation.run())
    new = {
        index: tensor
        for index, tensor in enumerate(tensors_in(result))
        if isinstance(tensor, FakeCudaTensor) and tensor.is_first and not is_among(tensor, operands.inputs)
    }
    if host_operation.operation in EMPTY:
        for tensor in new.values():
            poison(tensor.host_tensor)
    return result, new


def is_among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)


def allocate_workspace(gpu: FakeCudaDevice) -> None:
    """Allocate the current stream's cuBLAS workspace once; it is never freed."""
    if gpu.current.number not in gpu.workspaces:
        gpu.workspaces[gpu.current.number] = memory = gpu.new_memory(CUBLAS_WORKSPACE_BYTES)
        memory.users = 1


def tensors_in(*values: Any) -> list[Tensor]:
    """Return all tensors in nested arguments in order; many times faster than torch's pytrees."""
    tensors: list[Tensor] = []
    collect_tensors(values, tensors)
    return tensors


def collect_tensors(values: Iterable[Any], tensors: list[Tensor]) -> None:
    for value in values:
        if type(value) in PLAIN:
            continue
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            collect_tensors(value, tensors)
        elif isinstance(value, dict):
            collect_tensors(value.values(), tensors)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor in nested arguments."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(function, item) for item in value])
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    return value


def to_host_tensors(value: Any) -> Any:
    """Replace tensors of the GPU by their host tensors."""
    return map_tensors(lambda tensor: tensor.host_tensor if isinstance(tensor, FakeCudaTensor) else tensor, value)


def written_by(operation: Operation, args: Arguments, kwargs: Named) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
    written: list[Tensor] = []
    for position, name in written_arguments(operation):
        written += tensors_in(args[position] if position < len(args) else kwargs.get(name))
    return written


@functools.cache
def written_arguments(operation: Operation) -> list[tuple[int, str]]:
    """Return positions and names of the arguments that an operation writes to."""
    schema = getattr(operation, "_schema", None)
    return [
        (position, argument.name)
        for position, argument in enumerate(schema.arguments if schema else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def poison(tensor: Tensor) -> None:
    """Overwrite a tensor with values that cannot be mistaken for a result."""
    with contextlib.suppress(RuntimeError):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 99)
