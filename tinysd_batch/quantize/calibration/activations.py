"""Record the inputs of layers while a part of the UNet runs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tinysd_batch.quantize.calibration.unet_segments import State, Unit


class Reached(Exception):  # noqa: N818 - no error: the walk has seen enough
    """The last layer that was asked for has worked."""


def watch(unet: nn.Module, unit: Unit, state: State, names: set[str], last: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the named modules while a unit works on a copy of `state`, as far as the module `last`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = (args[0], output)
            if name == last:
                raise Reached

        return hook

    with hooked({name: note(name) for name in names}, unet), contextlib.suppress(Reached):
        unit.run_for(unet, state.copy(), last)
    return seen


@contextlib.contextmanager
def hooked(hooks: Mapping[str, Callable[[nn.Module, Any, Tensor], None]], unet: nn.Module) -> Iterator[None]:
    handles = [unet.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
