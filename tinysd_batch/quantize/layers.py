"""Layers that can be quantized."""

from torch import nn

Layer = nn.Linear | nn.Conv2d


def layer_of(unet: nn.Module, name: str) -> Layer:
    """A linear or convolution layer by its name."""
    layer = unet.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d), (name, type(layer))
    return layer
