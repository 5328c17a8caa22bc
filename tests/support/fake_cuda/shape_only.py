"""A fake GPU that computes nothing, to measure in seconds how much memory operations of any size take."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tests.support.fake_cuda.device import FakeCudaDevice
from tests.support.fake_cuda.tensors import COPY, TO_COPY, map_tensors


class ShapeOnlyCudaDevice(FakeCudaDevice):
    """A fake GPU whose tensors have shapes only.

    Programs that read results get random numbers, and True for comparisons.
    """

    storage_device = torch.device("meta")

    def compute(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = map_tensors(lambda tensor: tensor.to(self.storage_device), (args, kwargs))
        if operation is F.scaled_dot_product_attention:  # no fused kernel on meta: all scores would count
            return torch.empty_like(args[0])
        return operation(*args, **kwargs)

    def read_result(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if operation is TO_COPY:
            dtype, shape = kwargs.get("dtype") or args[0].dtype, args[0].shape
            return torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        return args[0].zero_() if operation is COPY else True

    def launch_kernel(
        self, work: Callable[[], None], stream: int, addresses: Sequence[int], writes: Sequence[bool]
    ) -> None:
        self.begin_work()
        self.counts["launched"] += 1
