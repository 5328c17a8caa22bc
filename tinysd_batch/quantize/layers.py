"""Layers that can be quantized."""

from torch import nn

LinearOrConv = nn.Linear | nn.Conv2d


def get_layer(unet: nn.Module, name: str) -> LinearOrConv:
    """A linear or convolution layer by its name."""
    layer = unet.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d), (name, type(layer))
    return layer
