"""Other programs' 2-bit quantizers on given layers of a UNet, in an environment of their own.

    PYTHON benchmarks/quantize/peers.py METHOD UNET_FOLDER LAYERS.json OUT.safetensors

Run by `benchmarks.quantize.compare_quantizers`, never imported: the environment needs torch, diffusers and the
program, which is asked
for nothing but what its weights are worth as floats and how many bytes it would store for them. METHOD is hqq (g64),
quanto (int2), sdnq or sdnq64 (uint2). SDNQ is under the GPL; no part of it comes near the package.
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
    return sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))


def hqq(unet: Any, names: list[str]) -> tuple[dict[str, Tensor], int]:
    """Half-quadratic quantization in groups of 64 (32 where 64 does not divide a row), of the matrix, tap-major."""
    from hqq.core.quantize import Quantizer

    found, total = {}, 0
    for name in names:
        weight = unet.get_submodule(name).weight.detach()
        order = (0, 2, 3, 1) if weight.dim() == 4 else (0, 1)
        moved = weight.permute(*order)
        matrix = moved.reshape(len(weight), -1)
        size = 64 if matrix.shape[1] % 64 == 0 else 32
        codes, meta = Quantizer.quantize(
            matrix, nbits=2, group_size=size, axis=1, device="cpu", compute_dtype=torch.float32
        )
        back = Quantizer.dequantize(codes, meta).float().view(moved.shape)
        found[name] = (back.permute(0, 3, 1, 2) if weight.dim() == 4 else back).contiguous()
        total += matrix.numel() // 4 + 2 * 2 * matrix.numel() // size  # codes; scale and zero as float16
    return found, total


def quanto(unet: Any, names: list[str]) -> tuple[dict[str, Tensor], int]:
    from optimum.quanto import freeze, qint2, quantize

    quantize(unet, weights=qint2, include=names)
    freeze(unet)
    found, total = {}, 0
    for name in names:
        weight = unet.get_submodule(name).weight
        found[name] = weight.dequantize().detach().float().contiguous()
        inner = [getattr(weight, one, None) for one in ("_scale", "_shift")]
        total += weight.numel() // 4 + sum(2 * one.numel() for one in inner if one is not None)  # as float16
    return found, total


def sdnq(unet: Any, names: list[str], **settings: Any) -> tuple[dict[str, Tensor], int]:
    """By its own defaults: groups of 8 and 16 with float32 scales, small layers left out. Bytes as it stores them."""
    from sdnq import sdnq_post_load_quant

    others = [
        name for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in names
    ]  # fmt: skip
    settings = {"weights_dtype": "uint2", "quant_conv": True, "modules_to_not_convert": others, **settings}
    unet = sdnq_post_load_quant(unet, torch_dtype=torch.float16, **settings)
    found, total = {}, 0
    for name in names:
        layer = unet.get_submodule(name)
        total += count_bytes(value for key, value in layer.state_dict().items() if key != "bias")
        if hasattr(layer, "dequantize"):
            layer.dequantize()
        found[name] = unet.get_submodule(name).weight.detach().float().contiguous()
    return found, total


def sdnq64(unet: Any, names: list[str]) -> tuple[dict[str, Tensor], int]:
    """In groups of 64, every layer. Bytes as if its scales and zero points were float16, which they are not."""
    every = {"group_size": 64, "minimum_allowed_numel": 1, "minimum_allowed_channel_size": 1, "add_skip_keys": False}
    found, total = sdnq(unet, names, **every)
    codes = sum(one.numel() for one in found.values()) // 4
    return found, codes + (total - codes) // 2


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
