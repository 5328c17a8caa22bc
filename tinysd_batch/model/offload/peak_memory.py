"""Measure peak memory without a device, from the sizes of live tensors."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = Callable[..., Any]


class PeakMemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sum the sizes of all live tensors that are created within its context, and keep the largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}  # bytes by id of the storage
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(
        self, operation: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self.remove, id(storage))

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Do not count existing tensors, which would be counted when an operation returns a view of them."""
        for tensor in tensors:
            self.sizes.setdefault(id(tensor.untyped_storage()), 0)

    def remove(self, storage: int) -> None:
        self.live_bytes -= self.sizes.pop(storage)
