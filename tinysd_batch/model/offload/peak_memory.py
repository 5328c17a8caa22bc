"""Measure peak memory without a device, from the shapes of live tensors."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = Callable[..., Any]


class PeakMemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made within a `with` and still alive, and keeps the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}  # of each storage, by its identity
        self.live = self.peak_bytes = 0

    def __torch_dispatch__(
        self, operation: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return made

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live)
            weakref.finalize(storage, self.forget, id(storage))

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these: operations that return a view of a tensor seem to make it."""
        for tensor in tensors:
            self.sizes.setdefault(id(tensor.untyped_storage()), 0)

    def forget(self, storage: int) -> None:
        self.live -= self.sizes.pop(storage)
