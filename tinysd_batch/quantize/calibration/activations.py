"""Record the inputs of layers while a part of the UNet runs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tinysd_batch.quantize.calibration.unet_segments import ForwardState, Segment


class StopForward(Exception):  # noqa: N818 - no error: the walk has seen enough
    """The last layer that was asked for has worked."""


def record_activations(
    unet: nn.Module, unit: Segment, state: ForwardState, names: set[str], last: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the named modules while a unit works on a copy of `state`, as far as the module `last`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = (args[0], output)
            if name == last:
                raise StopForward

        return hook

    with forward_hooks({name: note(name) for name in names}, unet), contextlib.suppress(StopForward):
        unit.run_for_module(unet, state.copy(), last)
    return seen


@contextlib.contextmanager
def forward_hooks(hooks: Mapping[str, Callable[[nn.Module, Any, Tensor], None]], unet: nn.Module) -> Iterator[None]:
    handles = [unet.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
