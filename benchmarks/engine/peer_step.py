"""Measure a guided step of SD v1's UNet at 2 bits by another program, in an environment of its own.

    PYTHON benchmarks/engine/peer_step.py METHOD CONFIG PRECISION SIZE STEPS

`benchmarks.engine.full_size_cpu` runs this file as a script and never imports it. METHOD is quanto (int2) or sdnq
(uint2, convolutions included), both with their default settings. CONFIG is the UNet's configuration as JSON, PRECISION
the type of activations and arithmetic. Weights are random. The last line printed is JSON.
"""

import json
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel


def quanto(unet: Any) -> Any:
    from optimum.quanto import freeze, qint2, quantize

    quantize(unet, weights=qint2)
    freeze(unet)
    return unet


def sdnq(unet: Any) -> Any:
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(unet, torch_dtype=unet.dtype, weights_dtype="uint2", quant_conv=True)


METHODS = {"quanto": quanto, "sdnq": sdnq}


def read_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    method, config, precision = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    size, steps = int(sys.argv[4]), int(sys.argv[5])
    dtype = getattr(torch, precision)
    unet = UNet2DConditionModel(**config).to(dtype).eval().requires_grad_(False)
    unet = METHODS[method](unet)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    latents = torch.randn(2, 4, size // 8, size // 8, dtype=dtype)
    context = torch.randn(2, 77, config["cross_attention_dim"], dtype=dtype)
    cpu_times = []
    with torch.no_grad():
        for step in range(steps):
            before = read_cpu_s()
            unet(latents, 999 - step, context)
            cpu_times.append(read_cpu_s() - before)
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print(
        json.dumps(
            {"step_cpu_s": statistics.median(cpu_times[1:]), "peak_gib": int(peak) / 2**20, "precision": precision}
        )
    )


if __name__ == "__main__":
    main()
