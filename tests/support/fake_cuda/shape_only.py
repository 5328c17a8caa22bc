"""A pretended card that computes nothing: what work takes of its memory is seen in seconds, at any size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tests.support.fake_cuda.device import FakeCudaDevice
from tests.support.fake_cuda.tensors import COPY, TO_COPY, map_tensors


class ShapeOnlyCudaDevice(FakeCudaDevice):
    """Tensors have sizes only. A program that waits for numbers is told some, and that all is so and nothing amiss."""

    place = torch.device("meta")

    def compute(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = map_tensors(lambda tensor: tensor.to(self.place), (args, kwargs))
        if operation is F.scaled_dot_product_attention:  # there torch has no fused kernel, and would count all scores
            return torch.empty_like(args[0])
        return operation(*args, **kwargs)

    def tell(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if operation is TO_COPY:
            kind = kwargs.get("dtype") or args[0].dtype
            return (
                torch.rand(args[0].shape).to(kind) if kind.is_floating_point else torch.zeros(args[0].shape, dtype=kind)
            )
        return args[0].zero_() if operation is COPY else True

    def launched(self, work: Callable[[], None], stream: int, addresses: Sequence[int], writes: Sequence[bool]) -> None:
        self.begin_work()
        self.counts["launched"] += 1
