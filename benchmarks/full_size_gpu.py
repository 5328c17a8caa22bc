"""Stable Diffusion v1 at its own size with random weights on a GPU: memory and time of 512x512.

    python -m benchmarks.full_size_gpu            every way of fitting a card, in float16 and float32; a step beside
                                                  diffusers'; the unpacking kernel beside a copy on the card
    python -m benchmarks.full_size_gpu --size 768 other pictures
    python -m benchmarks.full_size_gpu --pretend  without a GPU: memory only, as torch's allocator would hand it out

Each line is a process of its own (all import at once: some 10 GB of memory; --ways asks for fewer). What the whole
process takes is the card's own count (NVML, by nvidia-ml-py), less what was in use before; nothing else may use the
card. Torch's own peak is its allocator's. Seconds are those of the last pictures, when kernels are loaded; a step's are
denoising's, all steps alike, with the first two, which are issued one by one, and what capturing takes.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tests.support.random_sd_v1 import MODEL, SD_V1_UNET, make_random_model
from tinysd_batch.model.device.cuda_graph import MIN_STEPS_TO_CAPTURE, CapturedStep
from tinysd_batch.model.device.cuda_overhead import measure_cuda_overhead
from tinysd_batch.model.offload.planner import CUBLAS_WORKSPACE_VARIABLE, SMALL_CUBLAS_WORKSPACE
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, StagePlan
from tinysd_batch.model.packed.dequantize import dequantize, has_working_kernels
from tinysd_batch.model.packed.format import Layout
from tinysd_batch.model.pipeline import TinySD

STEPS = 20
IMAGES = 3  # drawn by a process; the first loads kernels, and is the one whose memory is watched
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "turbo": {"turbo": True},
    "resident": {},
    "budget 1000MB": {"budget": "1000MB"},
    "own 256 MB": {"own": 256 * 10**6},
    "least": {"least": True},
    "all streamed": {"streams": True},
}
LARGEST_MATRIX = (1280, 23040)  # the largest of SD v1's matrices
ROUNDS, REPLAYS = 30, 5
DEVICE_SLEEP_CYCLES = 20_000_000
MB, MIB = 10**6, 2**20
FAKE_DEVICE_BYTES = 8 * 2**30


# Within a process


class DeviceMemoryMonitor:
    """The most memory of the card that is in use while a thread looks, in bytes beyond what was in use at first."""

    def __init__(self) -> None:
        self.before = torch.cuda.device_memory_used(0)
        self.peak_bytes = 0
        self.is_sampling = False

    def used_bytes(self) -> int:
        return torch.cuda.device_memory_used(0) - self.before

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        self.is_sampling = True
        thread = threading.Thread(target=self.sample_until_stopped)
        thread.start()
        try:
            yield
        finally:
            self.is_sampling = False
            thread.join()

    def sample_until_stopped(self) -> None:
        while self.is_sampling:
            self.peak_bytes = max(self.peak_bytes, self.used_bytes())
            time.sleep(0.002)


@contextlib.contextmanager
def record_stage_memory(model: TinySD, watch: DeviceMemoryMonitor, found: dict[str, Any]) -> Iterator[None]:
    """Have a model tell of each phase torch's own peak, and what of the card is not torch's."""
    working, set_aside = model.planner.executing, model.planner.preallocate
    before = {"own": 0, "reserved": 0}  # a graph's room was taken, as large as it was planned

    def unseen(plan: StagePlan) -> None:
        before.update(own=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
        set_aside(plan)
        torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def watched(plan: StagePlan) -> Iterator[ExecutionStrategy]:
        torch.cuda.empty_cache()  # else what is reserved would be what an earlier phase left
        torch.cuda.reset_peak_memory_stats()
        before.update(own=0, reserved=0)
        with working(plan) as strategy:
            yield strategy
        found[plan.name] = {
            "own": max(before["own"], torch.cuda.max_memory_allocated()),
            "reserved": max(before["reserved"], torch.cuda.max_memory_reserved()),
            "others": watch.used_bytes() - torch.cuda.memory_reserved(),
        }

    model.planner.executing, model.planner.preallocate = watched, unseen  # type: ignore[method-assign]
    yield
    model.planner.executing, model.planner.preallocate = working, set_aside  # type: ignore[method-assign]


@contextlib.contextmanager
def record_graph_replay(found: dict[str, Any]) -> Iterator[None]:
    """Have steps tell whether they were replayed, how long that takes, and what the driver keeps for it."""
    close = CapturedStep.close

    def watched(step: CapturedStep) -> None:
        if step.graph is not None:
            found.update(graph=step.graph_bytes, replay_s=time_on_device_s(step.graph.replay, REPLAYS))
        close(step)

    CapturedStep.close = watched  # type: ignore[method-assign, assignment]
    yield
    CapturedStep.close = close  # type: ignore[method-assign]


def measure_generation(given: argparse.Namespace) -> dict[str, Any]:
    """Pictures by the engine: memory of the first, seconds of the others."""
    watch = DeviceMemoryMonitor()
    torch.zeros(1, device="cuda")
    context = watch.used_bytes()
    budget = given.budget
    if given.own:  # for torch's own memory
        dtype = torch.float32 if given.dtype == "full" else torch.float16
        os.environ[CUBLAS_WORKSPACE_VARIABLE] = SMALL_CUBLAS_WORKSPACE
        budget = measure_cuda_overhead(torch.device("cuda", 0), dtype).context_bytes + given.own
    if given.least:
        roomy = TinySD.from_pretrained(given.model, device="cuda", dtype=given.dtype, vram_budget="0.9")
        budget = roomy.planner.estimate_min_budget(MicroBatchShape(2, given.size, given.size, roomy.info.max_tokens))
    model = TinySD.from_pretrained(given.model, device="cuda", dtype=given.dtype, vram_budget=budget, turbo=given.turbo)

    def picture() -> Any:
        return model.generate(
            "a lake", 1, num_inference_steps=given.steps, sampler="ddim", guidance_scale=7.5, height=given.size,
            width=given.size, output_type="np",
        )  # fmt: skip

    model.offloader.stream_all_weights = given.streams
    plan = model.planner.plan_stages(MicroBatchShape(2, given.size, given.size, model.info.max_tokens))
    foretold = {
        phase.name: phase.peak_bytes - phase.fragmentation_bytes - model.planner.overhead.context_bytes
        for phase in plan
    }
    phases: dict[str, Any] = {}
    with watch.sampling(), record_stage_memory(model, watch, phases):
        picture()
    made, seconds = [], []
    for _ in range(IMAGES - 1):
        started = time.monotonic()
        made.append(picture())
        seconds.append(time.monotonic() - started)
    graphs: dict[str, Any] = {}
    with record_graph_replay(graphs):
        picture()
    return {
        **graphs,
        "context": context, "counted": model.planner.overhead.context_bytes, "whole": watch.peak_bytes, "phases": phases,
        "foretold": foretold, "streamed": plan[1].weight_bytes - plan[1].resident_bytes,
        "picture_s": statistics.median(seconds), "decode_s": statistics.median(one.decode_s for one in made),
        "text_s": statistics.median(one.text_s for one in made),
        "step_s": statistics.median(one.denoise_s for one in made) / given.steps,
        "mean": float(made[-1].images.mean()),
    }  # fmt: skip


def time_on_device_s(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of a piece of work on the card."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(DEVICE_SLEEP_CYCLES)  # type: ignore[no-untyped-call]  # else the card waits for the processor
        before.record()
        work()
        after.record()
        torch.cuda.synchronize()
        times.append(float(before.elapsed_time(after)) / 1000)
    return statistics.median(times)


def measure_diffusers_step(given: argparse.Namespace) -> dict[str, Any]:
    """A guided step by diffusers' own UNet, dense: by the clock, the card waited for, as ours is measured."""
    watch = DeviceMemoryMonitor()
    dtype = torch.float32 if given.dtype == "full" else torch.float16
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_V1_UNET)
    unet = unet.to(dtype).to_empty(device="cuda").eval()
    found: dict[str, Any] = {}
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(0.001)
        for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            unet.to(memory_format=layout)
            latents = torch.randn(2, 4, given.size // 8, given.size // 8, dtype=dtype, device="cuda")
            latents = latents.contiguous(memory_format=layout)
            context = torch.randn(2, 77, 768, dtype=dtype, device="cuda")
            times = [time_step_s(lambda: unet(latents, 500, context), given.steps) for _ in range(IMAGES)]  # noqa: B023
            found[name] = statistics.median(times[1:])
    return {**found, "own": torch.cuda.max_memory_allocated(), "whole": watch.used_bytes()}


def time_step_s(step: Callable[[], object], count: int) -> float:
    """Seconds of a step by the clock, in a row of them."""
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.monotonic() - started) / count


def measure_dequantize(given: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second of the unpacking kernel, over layers that no cache holds, and of a copy."""
    assert has_working_kernels(torch.device("cuda", 0)), "no kernels on this card"
    dtype = torch.float32 if given.dtype == "full" else torch.float16
    layout = Layout(2, 64)
    weights = [
        layout.weight({
            name: torch.randint(0, 256 if kind == torch.uint8 else 2**14, shape, device="cuda").to(kind)
            for name, (kind, shape) in layout.tensors(*LARGEST_MATRIX).items()
        })
        for _ in range(8)
    ]  # fmt: skip
    rooms = [torch.empty(LARGEST_MATRIX, dtype=dtype, device="cuda") for _ in weights]
    moved = len(weights) * (layout.nbytes(*LARGEST_MATRIX) + rooms[0].nbytes)

    def all_of_them() -> None:
        for weight, room in zip(weights, rooms, strict=True):
            dequantize(weight, room)

    big = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    return {
        "unpacking": moved / time_on_device_s(all_of_them, ROUNDS),
        "copy": 2 * len(big) / time_on_device_s(lambda: other.copy_(big), ROUNDS),
        "filling": len(big) / time_on_device_s(lambda: big.fill_(1), ROUNDS),
    }


def measure_host_to_device(_: argparse.Namespace) -> dict[str, Any]:
    """The card's name, and bytes a second from page-locked memory to it."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    card = torch.empty_like(host, device="cuda")
    name = f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    return {"card": name, "bus": len(host) / time_on_device_s(lambda: card.copy_(host, non_blocking=True), ROUNDS)}


MeasureFunction = Callable[[argparse.Namespace], dict[str, Any]]
CHILDREN: dict[str, MeasureFunction] = {
    "draw": measure_generation, "diffusers": measure_diffusers_step, "unpacking": measure_dequantize, "bus": measure_host_to_device
}  # fmt: skip


# The processes


class MeasurementProcess:
    """A measurement in a process of its own, which imports at once and then waits for its turn."""

    def __init__(self, kind: str, given: argparse.Namespace, **changes: Any) -> None:
        changes = {"model": given.model, "steps": given.steps, "size": given.size, **changes}
        words = [sys.executable, "-m", "benchmarks.full_size_gpu", "--child", kind]
        for name, value in changes.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self) -> dict[str, Any]:
        """What it found, or what went wrong in it."""
        said, _ = self.process.communicate("go\n")
        found: dict[str, Any] = json.loads((said.splitlines() or ['{"error": "it ended without a word"}'])[-1])
        return found


def run_as_child(measure: MeasureFunction, given: argparse.Namespace) -> None:
    if not sys.stdin.readline():  # nobody wants to know any more
        return
    try:
        found = measure(given)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(found))


def print_generation(name: str, dtype: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"{name:<16}{dtype:<10}{found['error']}", flush=True)
        return
    own = max(phase["own"] for phase in found["phases"].values())
    print(
        f"{name:<16}{dtype:<10}{found['whole'] / MIB:>9.0f}{found['context'] / MIB:>9.0f}"
        f"{found['counted'] / MIB:>9.0f}{own / MB:>9.1f}{found['step_s'] * 1000:>9.1f}{found['decode_s']:>9.2f}"
        f"{found['picture_s']:>9.2f}{found['streamed'] / MB:>9.1f}",
        flush=True,
    )
    if "graph" in found:
        print(
            f"    a step replayed {found['replay_s'] * 1000:.1f} ms; the graph takes {found['graph'] / MB:.1f} MB more"
        )
    else:
        print("    steps were issued one by one")
    for phase, one in found["phases"].items():
        print(
            f"    {phase:<14} foretold {found['foretold'][phase] / MB:7.1f} MB, torch's own {one['own'] / MB:7.1f}"
            f" ({one['own'] / found['foretold'][phase]:.2f}), reserved {one['reserved'] / MB:7.1f},"
            f" not torch's {one['others'] / MB:7.1f}",
            flush=True,
        )


def print_diffusers(dtype: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"diffusers, {dtype}: {found['error']}")
        return
    steps = ", ".join(f"{found[name] * 1000:.1f} ms {name}" for name in ("contiguous", "channels_last"))
    print(f"diffusers, {dtype}: a guided step {steps}; own {found['own'] / MB:.0f} MB", flush=True)


def print_dequantize(dtype: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"unpacking, {dtype}: {found['error']}")
        return
    share = found["unpacking"] / found["copy"]
    print(
        f"unpacking, {dtype}: {found['unpacking'] / 1e9:.0f} GB/s read and written, {share:.2f} times what a copy "
        f"on the card moves ({found['copy'] / 1e9:.0f} GB/s); filling memory {found['filling'] / 1e9:.0f} GB/s",
        flush=True,
    )


def measure_on_gpu(given: argparse.Namespace) -> None:
    bus = MeasurementProcess("bus", given)
    plan: list[tuple[Callable[[dict[str, Any]], None], MeasurementProcess]] = []
    for dtype in [given.dtype] if given.dtype else ["autocast", "full"]:
        draws = [(way, MeasurementProcess("draw", given, dtype=dtype, **CONFIGURATIONS[way])) for way in given.ways]
        plan += [(partial(print_generation, way, dtype), child) for way, child in draws]
        plan.append((partial(print_diffusers, dtype), MeasurementProcess("diffusers", given, dtype=dtype)))
        plan.append((partial(print_dequantize, dtype), MeasurementProcess("unpacking", given, dtype=dtype)))
    found = bus.measure()
    if "error" in found:
        raise SystemExit(f"this measures a CUDA card: {found['error']}")
    print(f"SD v1, random weights, {given.size}x{given.size}, {given.steps} steps, {found['card']}")
    print(f"from page-locked memory to the card: {found['bus'] / 1e9:.1f} GB/s")
    print(
        f"{'way':<16}{'precision':<10}{'whole':>9}{'context':>9}{'counted':>9}{'own':>9}{'step':>9}{'decode':>9}"
        f"{'picture':>9}{'streamed':>9}\n{'':<26}{'MiB':>9}{'MiB':>9}{'MiB':>9}{'MB':>9}{'ms':>9}{'s':>9}{'s':>9}"
        f"{'MB/step':>9}"
    )
    for tell, child in plan:
        tell(child.measure())


def measure_on_fake_device(given: argparse.Namespace) -> None:
    """Every way on a card that computes nothing, and knows neither time nor what libraries take to work in."""
    from tests.support.fake_cuda.patch import use_fake_cuda
    from tests.support.fake_cuda.shape_only import ShapeOnlyCudaDevice

    print(
        f"SD v1, {given.size}x{given.size}, a pretended card: what tensors take, and what torch reserves for them, MB"
    )
    print(f"{'way':<16}{'precision':<10}{'tensors':>9}{'reserved':>9}{'graph':>9}{'streamed':>9}")
    for dtype in [given.dtype] if given.dtype else ["autocast", "full"]:
        for name in given.ways:
            settings = {**vars(given), "dtype": dtype, "steps": MIN_STEPS_TO_CAPTURE, **CONFIGURATIONS[name]}
            with use_fake_cuda(ShapeOnlyCudaDevice(FAKE_DEVICE_BYTES)):
                found = measure_generation(argparse.Namespace(**settings))
            own, reserved = (max(one[what] for one in found["phases"].values()) for what in ("own", "reserved"))
            numbers = (own, reserved, found.get("graph", 0), found["streamed"])
            print(f"{name:<16}{dtype:<10}" + "".join(f"{number / MB:>9.1f}" for number in numbers), flush=True)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--ways", nargs="+", default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS))
    parser.add_argument("--dtype", choices=["full", "autocast"], help="one of both only")
    parser.add_argument("--pretend", action="store_true", help="no card is needed, and memory alone is told")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--own", type=int, help=argparse.SUPPRESS)
    for name in ("--budget", "--least", "--turbo", "--streams"):
        kind = "store" if name == "--budget" else "store_true"
        parser.add_argument(name, action=kind, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    given = new_parser().parse_args()
    if given.child:
        run_as_child(CHILDREN[given.child], given)
        return
    if not given.model.exists():
        make_random_model(given.model)
    (measure_on_fake_device if given.pretend else measure_on_gpu)(given)


if __name__ == "__main__":
    main()
