"""Record inputs and outputs of modules while one segment of the UNet runs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tinysd_batch.quantize.calibration.unet_segments import ForwardState, Segment

ForwardHook = Callable[[nn.Module, Any, Tensor], None]


class StopForward(Exception):  # noqa: N818 - not an error: everything requested has been recorded
    """Raised by a hook once the last requested module has run."""


def record_activations(
    unet: nn.Module, segment: Segment, state: ForwardState, names: set[str], last: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a segment on a copy of `state` and record what passes through some of its modules.

    Args:
        unet: The UNet that the segment belongs to.
        segment: The segment to run.
        state: The state before the segment; it is not changed.
        names: Full names of the modules to record.
        last: The segment stops after this module. An empty string runs it to its end.

    Returns:
        Input and output of each named module.
    """
    recorded: dict[str, tuple[Tensor, Tensor]] = {}

    def make_hook(name: str) -> ForwardHook:
        def record(_: nn.Module, args: Any, output: Tensor) -> None:
            recorded[name] = (args[0], output)
            if name == last:
                raise StopForward

        return record

    with forward_hooks(unet, {name: make_hook(name) for name in names}), contextlib.suppress(StopForward):
        segment.run_for_module(unet, state.copy(), last)
    return recorded


@contextlib.contextmanager
def forward_hooks(unet: nn.Module, hooks: Mapping[str, ForwardHook]) -> Iterator[None]:
    """Register a forward hook on each named module, and remove all of them on exit."""
    handles = [unet.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
