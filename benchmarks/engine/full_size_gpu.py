"""Memory and time of 512x512 images on a GPU, with random weights of Stable Diffusion v1's size.

    python -m benchmarks.engine.full_size_gpu
        each way to fit into GPU memory, in float16 and float32; a step beside diffusers'; dequantization beside a copy
    python -m benchmarks.engine.full_size_gpu --size 768
        other image sizes
    python -m benchmarks.engine.full_size_gpu --fake-device
        without a GPU: memory only, as torch's allocator would hand it out

Each line comes from a process of its own. All of them import at once, which takes about 10 GB of memory (--ways: less).
What the whole process takes is the GPU's own count (NVML, by nvidia-ml-py) minus what was in use before; nothing else
may use the GPU meanwhile. Torch's own peak is its allocator's. Durations are those of the last images, when all kernels
are loaded. The time of a step is the mean over all steps of an image, including the first two, which run eagerly, and
the capture of the graph.
"""

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.support.models.gpu_measurements import (
    CHILDREN,
    CONFIGURATIONS,
    MB,
    MeasureFunction,
    measure_generation,
    new_parser,
    print_dequantize,
    print_diffusers,
    print_generation,
)
from tests.support.models.random_sd_v1 import make_random_model
from tinysd_batch.model.device.cuda_graph import MIN_STEPS_TO_CAPTURE

FAKE_DEVICE_BYTES = 8 * 2**30


class MeasurementProcess:
    """A measurement in a process of its own, which imports at once and then waits until `measure` is called."""

    def __init__(self, name: str, arguments: argparse.Namespace, **options: Any) -> None:
        options = {"model": arguments.model, "steps": arguments.steps, "size": arguments.size, **options}
        command = [sys.executable, "-m", "benchmarks.engine.full_size_gpu", "--child", name]
        for option, value in options.items():
            command += [f"--{option}"] if value is True else [f"--{option}", str(value)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self) -> dict[str, Any]:
        """Return what the process measured, or its error."""
        output, _ = self.process.communicate("start\n")
        lines = output.splitlines() or ['{"error": "the process ended without any output"}']
        measured: dict[str, Any] = json.loads(lines[-1])
        return measured


def run_as_child(measure: MeasureFunction, arguments: argparse.Namespace) -> None:
    """Wait for a line of input, measure, and print the result as JSON."""
    if not sys.stdin.readline():  # the parent process has ended
        return
    try:
        measured = measure(arguments)
    except Exception as error:  # noqa: BLE001 - any error is a result
        traceback.print_exc()
        measured = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(measured))


def measure_on_gpu(arguments: argparse.Namespace) -> None:
    host_to_device = MeasurementProcess("host-to-device", arguments)
    children: list[tuple[Callable[[dict[str, Any]], None], MeasurementProcess]] = []
    for dtype in [arguments.dtype] if arguments.dtype else ["autocast", "full"]:
        for name in arguments.ways:
            child = MeasurementProcess("generation", arguments, dtype=dtype, **CONFIGURATIONS[name])
            children.append((partial(print_generation, name, dtype), child))
        children.append((partial(print_diffusers, dtype), MeasurementProcess("diffusers", arguments, dtype=dtype)))
        children.append((partial(print_dequantize, dtype), MeasurementProcess("dequantize", arguments, dtype=dtype)))
    measured = host_to_device.measure()
    if "error" in measured:
        raise SystemExit(f"this benchmark needs a CUDA GPU: {measured['error']}")
    print(f"SD v1, random weights, {arguments.size}x{arguments.size}, {arguments.steps} steps, {measured['device']}")
    print(f"from page-locked memory to the GPU: {measured['host_to_device'] / 1e9:.1f} GB/s")
    print(
        f"{'configuration':<16}{'precision':<10}{'whole':>9}{'context':>9}{'counted':>9}{'own':>9}{'step':>9}"
        f"{'decode':>9}{'image':>9}{'streamed':>9}\n"
        f"{'':<26}{'MiB':>9}{'MiB':>9}{'MiB':>9}{'MB':>9}{'ms':>9}{'s':>9}{'s':>9}{'MB/step':>9}"
    )
    for print_result, child in children:
        print_result(child.measure())


def measure_on_fake_device(arguments: argparse.Namespace) -> None:
    """Measure all configurations on a device that computes nothing, and knows neither time nor library workspaces."""
    from tests.support.fake_cuda.patch import use_fake_cuda
    from tests.support.fake_cuda.shape_only import ShapeOnlyCudaDevice

    print(
        f"SD v1, {arguments.size}x{arguments.size}, fake CUDA device: memory of tensors, and what torch reserves, in MB"
    )
    print(f"{'configuration':<16}{'precision':<10}{'tensors':>9}{'reserved':>9}{'graph':>9}{'streamed':>9}")
    for dtype in [arguments.dtype] if arguments.dtype else ["autocast", "full"]:
        for name in arguments.ways:
            options = {**vars(arguments), "dtype": dtype, "steps": MIN_STEPS_TO_CAPTURE, **CONFIGURATIONS[name]}
            with use_fake_cuda(ShapeOnlyCudaDevice(FAKE_DEVICE_BYTES)):
                measured = measure_generation(argparse.Namespace(**options))
            own, reserved = (max(stage[key] for stage in measured["stages"].values()) for key in ("own", "reserved"))
            sizes = (own, reserved, measured.get("graph", 0), measured["streamed"])
            print(f"{name:<16}{dtype:<10}" + "".join(f"{size / MB:>9.1f}" for size in sizes), flush=True)


def main() -> None:
    arguments = new_parser(__doc__).parse_args()
    if arguments.child:
        run_as_child(CHILDREN[arguments.child], arguments)
        return
    if not arguments.model.exists():
        make_random_model(arguments.model)
    if arguments.fake_device:
        measure_on_fake_device(arguments)
    else:
        measure_on_gpu(arguments)


if __name__ == "__main__":
    main()
