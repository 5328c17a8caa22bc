"""The layers that can be quantized: linear and convolution layers."""

from torch import nn

LinearOrConv = nn.Linear | nn.Conv2d


def get_layer(unet: nn.Module, name: str) -> LinearOrConv:
    """Return the linear or convolution layer called `name`."""
    layer = unet.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d), (name, type(layer))
    return layer
