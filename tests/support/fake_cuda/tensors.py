"""Tensors of the pretended card, and how operations on them are done: by the processor, under the card's rules."""

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
}  # the program waits for the size of the result
JOINED = {aten.cat.default, aten.stack.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
PLAIN = {int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format}
EMPTY = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip


class FakeCudaTensor(Tensor):
    """Says that it is on the card; its numbers are on the host."""

    card: ClassVar[FakeCudaDevice]
    numbers: Tensor
    memory: DeviceMemory | None
    is_first: bool  # in its memory; others are views

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "FakeCudaTensor":
        made: FakeCudaTensor = Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=cls.card.device,
        )  # fmt: skip
        made.numbers = numbers
        made.memory, made.is_first = cls.card.memory_of(numbers)
        if made.memory is not None:
            cls.card.use(made.memory, made)
        return made

    @classmethod
    def __torch_function__(
        cls, operation: Operation, types: Any, args: Arguments = (), kwargs: Named | None = None
    ) -> Any:
        if operation is F.scaled_dot_product_attention:  # torch would look for a card's kernels
            return run(cls.card, operation, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return operation(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Operation, types: Any, args: Arguments = (), kwargs: Named | None = None
    ) -> Any:
        return run(cls.card, operation, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()


class FakeCudaMode(TorchDispatchMode):
    """Has the card do what is asked of it, and the processor all else."""

    def __init__(self, card: FakeCudaDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.card = card

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, so that each operation can do without the two wrappers that keep dynamo away."""
        return False

    def __torch_dispatch__(
        self, operation: Operation, types: Any, args: Arguments = (), kwargs: Named | None = None
    ) -> Any:
        if kwargs and kwargs.get("pin_memory"):
            return pinned(self.card, operation, args, {**kwargs, "pin_memory": False})
        return run(self.card, operation, args, kwargs or {})


def run(card: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named) -> Any:
    """Wherever the tensors are. Raises RuntimeError as torch does where they are not together."""
    on_card = [tensor for tensor in tensors_in(args, kwargs) if isinstance(tensor, FakeCudaTensor)]
    place = kwargs.get("device")
    goes_there = place is not None and torch.device(place).type == "cuda"
    if not on_card and not goes_there:
        return operation(*args, **kwargs)
    if place is not None:
        kwargs = {**kwargs, "device": card.place if goes_there else torch.device("cpu")}
    if operation in (TO_COPY, COPY):
        return transfer(card, operation, args, kwargs, goes_there or place is None)
    if operation in SYNCHRONIZING:
        wait_for_result(card, on_card)
        return card.tell(operation, to_host_tensors(args), to_host_tensors(kwargs))
    if operation in SIZE_DEPENDS_ON_DATA:
        wait_for_result(card, on_card)
    if on_card:
        check_together(card, operation, args, kwargs)
    if place is not None and not goes_there:  # as an empty tensor on the host is made like one on the card
        return operation(*to_host_tensors(args), **to_host_tensors(kwargs))
    return work(card, operation, args, kwargs)


def pinned(card: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named) -> Tensor:
    """Memory of the host that torch locks, and keeps for itself until all copies of it are done."""
    made: Tensor = operation(*args, **kwargs)
    card.lock(made.data_ptr(), made.untyped_storage().nbytes())
    weakref.finalize(made.untyped_storage(), card.locked.pop, made.data_ptr())
    return made


def transfer(card: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named, stays: bool) -> Any:
    """From the host to the card, back, or within the card."""
    source = args[1] if operation is COPY else args[0]
    goes_there = isinstance(args[0], FakeCudaTensor) if operation is COPY else stays
    if not isinstance(source, FakeCudaTensor):
        non_blocking = bool(kwargs.get("non_blocking") or (args[2:] and args[2]))
        check_source(card, source, non_blocking)
        if non_blocking and source.dtype is not (
            args[0].dtype if operation is COPY else kwargs.get("dtype", source.dtype)
        ):
            card.allocate_temporarily(source.nbytes)  # torch changes the type on the card then
    elif not goes_there:
        assert not kwargs.get("non_blocking"), "to the host without waiting: this card cannot"
        wait_for_result(card, [source])
        return card.tell(operation, to_host_tensors(args), kwargs)
    return work(card, operation, args, kwargs)


def check_source(card: FakeCudaDevice, source: Tensor, non_blocking: bool) -> None:
    """The card reads memory of the host: of any kind before the program goes on, or by and by where it is locked."""
    accesses, capture = card.find_pinned(source), card.current.capture
    if accesses is None or not non_blocking:
        if capture is not None:
            raise capture.refuse("a copy from pageable memory")
        return
    reads = partial(note_reading, card, accesses)
    if capture is not None:
        capture.work.append(reads)
    else:
        card.begin_work()
        reads()


def note_reading(card: FakeCudaDevice, accesses: MemoryAccesses) -> None:
    accesses.reads[card.current.number] = card.current.now


def wait_for_result(card: FakeCudaDevice, tensors: list[FakeCudaTensor]) -> None:
    """The program looks at numbers of the card's."""
    card.touch([tensor.memory for tensor in tensors], [])
    card.wait(card.current)


def check_together(card: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named) -> None:
    """A single number may be on the host, unless tensors are put together; and so may indices, which are copied."""
    looked_at = (args[0], args[2:], kwargs) if operation in INDEXED else (args, kwargs)
    for tensor in tensors_in(*looked_at):
        if not isinstance(tensor, FakeCudaTensor) and (tensor.dim() > 0 or operation in JOINED):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {operation}"
            )
    if operation not in INDEXED or card.current.capture is None:
        return
    for index in tensors_in(args[1]):
        if not isinstance(index, FakeCudaTensor) or index.dtype is torch.bool:
            raise card.current.capture.refuse("indices that have to be copied, or counted")


@dataclass(frozen=True, eq=False, slots=True)
class HostOperation:
    """An operation on the host's tensors in place of the card's: a graph must not keep those."""

    card: FakeCudaDevice
    operation: Operation
    args: Arguments
    kwargs: Named

    def do(self) -> Any:
        return self.card.compute(self.operation, self.args, self.kwargs)

    def do_again(self, places: Mapping[int, Tensor]) -> None:
        """What is new goes to these places."""
        for number, found in enumerate(tensors_in(self.do())):
            if number in places:
                places[number].copy_(found)


@dataclass(frozen=True, eq=False, slots=True)
class Operands:
    """The tensors of the card that an operation is given, and those of them that it writes to."""

    given: list[FakeCudaTensor]
    written: list[FakeCudaTensor]

    def wrapped(self, numbers: Tensor) -> FakeCudaTensor:
        """A tensor of the card: one of the given ones, if it is that."""
        for one in self.given:
            if one.numbers is numbers:
                return one
        return FakeCudaTensor(numbers)

    def touch(self, card: FakeCudaDevice, *new: FakeCudaTensor) -> None:
        card.touch([one.memory for one in self.given], [one.memory for one in (*self.written, *new)])
        card.counts["operations"] += 1


def work(card: FakeCudaDevice, operation: Operation, args: Arguments, kwargs: Named) -> Any:
    """Done at once; where a graph is captured, written down for it."""
    given = [tensor for tensor in tensors_in(args, kwargs) if isinstance(tensor, FakeCudaTensor)]
    written = [tensor for tensor in written_by(operation, args, kwargs) if isinstance(tensor, FakeCudaTensor)]
    task, operands = (
        HostOperation(card, operation, to_host_tensors(args), to_host_tensors(kwargs)),
        Operands(given, written),
    )
    capture = card.current.capture
    if operation in PRODUCTS:
        take_workspace(card)
    if capture is not None:
        return write_down(task, operands, capture)
    made, new = result_of(task, operands)
    if written or (new and operation not in EMPTY):  # others look at the same memory in another way
        operands.touch(card, *new.values())
    return made


def write_down(task: HostOperation, operands: Operands, capture: GraphCapture) -> Any:
    if capture.is_broken:
        raise capture.refuse("a previous error")
    if operands.written:
        assert len(operands.written) == 1, "this card cannot capture what writes to several places"
        operands.touch(task.card)
        capture.work.append(task.do)
        return operands.written[0]
    made, new = result_of(task, operands)
    if new and task.operation not in EMPTY:
        operands.touch(task.card, *new.values())
        capture.work.append(partial(task.do_again, {number: one.numbers for number, one in new.items()}))
        for tensor in new.values():
            poison(tensor.numbers)
    return made


def result_of(task: HostOperation, operands: Operands) -> tuple[Any, dict[int, FakeCudaTensor]]:
    """On the card; and by their places among its tensors those that have memory of their own."""
    made = map_tensors(operands.wrapped, task.do())
    new = {
        number: one
        for number, one in enumerate(tensors_in(made))
        if isinstance(one, FakeCudaTensor) and one.is_first and not is_among(one, operands.given)
    }
    if task.operation in EMPTY:
        for tensor in new.values():
            poison(tensor.numbers)
    return made, new


def is_among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)


def take_workspace(card: FakeCudaDevice) -> None:
    """Once for each stream, for good."""
    if card.current.number not in card.workspaces:
        card.workspaces[card.current.number] = memory = card.new_memory(CUBLAS_WORKSPACE_BYTES)
        memory.users = 1


def tensors_in(*things: Any) -> list[Tensor]:
    """In order; what torch's pytrees do, many times faster for what operations are given."""
    tensors: list[Tensor] = []
    collect(things, tensors)
    return tensors


def collect(things: Iterable[Any], tensors: list[Tensor]) -> None:
    for thing in things:
        if type(thing) in PLAIN:
            continue
        if isinstance(thing, Tensor):
            tensors.append(thing)
        elif isinstance(thing, list | tuple):
            collect(thing, tensors)
        elif isinstance(thing, dict):
            collect(thing.values(), tensors)


def map_tensors(change: Callable[[Tensor], Any], thing: Any) -> Any:
    """The same with every tensor changed."""
    if type(thing) in PLAIN:
        return thing
    if isinstance(thing, Tensor):
        return change(thing)
    if isinstance(thing, list | tuple):
        return type(thing)([map_tensors(change, one) for one in thing])
    if isinstance(thing, dict):
        return {name: map_tensors(change, one) for name, one in thing.items()}
    return thing


def to_host_tensors(thing: Any) -> Any:
    """With tensors of the host in place of the card's."""
    return map_tensors(lambda tensor: tensor.numbers if isinstance(tensor, FakeCudaTensor) else tensor, thing)


def written_by(operation: Operation, args: Arguments, kwargs: Named) -> list[Tensor]:
    """The arguments that an operation writes to."""
    written: list[Tensor] = []
    for position, name in written_arguments(operation):
        written += tensors_in(args[position] if position < len(args) else kwargs.get(name))
    return written


@functools.cache
def written_arguments(operation: Operation) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operation writes to."""
    schema = getattr(operation, "_schema", None)
    return [
        (position, argument.name)
        for position, argument in enumerate(schema.arguments if schema else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def poison(tensor: Tensor) -> None:
    """Write what nobody could take for a result."""
    with contextlib.suppress(RuntimeError):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 99)
