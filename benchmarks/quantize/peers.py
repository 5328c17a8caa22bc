"""Quantize given layers of a UNet to 2 bits with other programs, in an environment of their own.

    PYTHON benchmarks/quantize/peers.py METHOD UNET_FOLDER LAYERS.json OUT.safetensors

`benchmarks.quantize.compare_quantizers` runs this file as a script and never imports it. The environment needs torch,
diffusers and the program, which only provides the dequantized weights and the bytes that it would store for them.
METHOD is hqq (groups of 64), quanto (int2), sdnq or sdnq64 (uint2). SDNQ is licensed under the GPL; no part of it is
used by the package.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn


def count_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def hqq(unet: Any, names: list[str]) -> tuple[dict[str, Tensor], int]:
    """Half-quadratic quantization in groups of 64, or of 32 where 64 does not divide a row.

    Columns of a convolution count kernel positions first, then input channels.
    """
    from hqq.core.quantize import Quantizer

    weights, total = {}, 0
    for name in names:
        weight = unet.get_submodule(name).weight.detach()
        order = (0, 2, 3, 1) if weight.dim() == 4 else (0, 1)
        permuted = weight.permute(*order)
        matrix = permuted.reshape(len(weight), -1)
        group_size = 64 if matrix.shape[1] % 64 == 0 else 32
        codes, meta = Quantizer.quantize(
            matrix, nbits=2, group_size=group_size, axis=1, device="cpu", compute_dtype=torch.float32
        )
        dequantized = Quantizer.dequantize(codes, meta).float().view(permuted.shape)
        weights[name] = (dequantized.permute(0, 3, 1, 2) if weight.dim() == 4 else dequantized).contiguous()
        total += matrix.numel() // 4 + 2 * 2 * matrix.numel() // group_size  # codes; scale and zero as float16
    return weights, total


def quanto(unet: Any, names: list[str]) -> tuple[dict[str, Tensor], int]:
    from optimum.quanto import freeze, qint2, quantize

    quantize(unet, weights=qint2, include=names)
    freeze(unet)
    weights, total = {}, 0
    for name in names:
        weight = unet.get_submodule(name).weight
        weights[name] = weight.dequantize().detach().float().contiguous()
        affine = [getattr(weight, attribute, None) for attribute in ("_scale", "_shift")]
        total += weight.numel() // 4 + sum(2 * tensor.numel() for tensor in affine if tensor is not None)  # as float16
    return weights, total


def sdnq(unet: Any, names: list[str], **settings: Any) -> tuple[dict[str, Tensor], int]:
    """SDNQ with its defaults: groups of 8 and 16 with float32 scales, small layers as floats. Bytes as stored."""
    from sdnq import sdnq_post_load_quant

    others = [
        name for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in names
    ]  # fmt: skip
    settings = {"weights_dtype": "uint2", "quant_conv": True, "modules_to_not_convert": others, **settings}
    unet = sdnq_post_load_quant(unet, torch_dtype=torch.float16, **settings)
    weights, total = {}, 0
    for name in names:
        layer = unet.get_submodule(name)
        total += count_bytes(value for key, value in layer.state_dict().items() if key != "bias")
        if hasattr(layer, "dequantize"):
            layer.dequantize()
        weights[name] = unet.get_submodule(name).weight.detach().float().contiguous()
    return weights, total


def sdnq64(unet: Any, names: list[str]) -> tuple[dict[str, Tensor], int]:
    """SDNQ with groups of 64 in all layers. Bytes as if scales and zero points were float16; SDNQ stores float32."""
    settings = {"group_size": 64, "minimum_allowed_numel": 1, "minimum_allowed_channel_size": 1, "add_skip_keys": False}
    weights, total = sdnq(unet, names, **settings)
    codes = sum(weight.numel() for weight in weights.values()) // 4
    return weights, codes + (total - codes) // 2


METHODS = {"hqq": hqq, "quanto": quanto, "sdnq": sdnq, "sdnq64": sdnq64}


def main() -> None:
    method, folder, layers, out = sys.argv[1:5]
    torch.set_num_threads(1)
    names = json.loads(Path(layers).read_text())
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)
    weights, total = METHODS[method](unet, names)
    save_file(weights, out, metadata={"bytes": str(total)})


if __name__ == "__main__":
    main()
