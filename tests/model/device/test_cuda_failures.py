"""What can go wrong on a GPU, tested on a fake CUDA device."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.fake_cuda import graphs
from tests.support.fake_cuda.allocator import DEFAULT_POOL, FakeCachingAllocator
from tests.support.fake_cuda.device import CONTEXT_BYTES, FakeCudaDevice
from tests.support.fake_cuda.driver import FakeCudaRuntime
from tests.support.fake_cuda.shape_only import ShapeOnlyCudaDevice
from tests.support.files import write_csv
from tests.support.jobs import Quiet, check_whole, setup_for
from tests.support.models import gpu_measurements, random_sd_v1
from tinysd_batch import TinySD
from tinysd_batch.errors import UsageError
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.model import pipeline
from tinysd_batch.model.device.cuda_graph import CapturedStep
from tinysd_batch.model.device.cuda_overhead import measure_process_gpu_bytes
from tinysd_batch.model.device.precision import PROBE_MEMORY_LIMIT_BYTES, probe_half_precision
from tinysd_batch.model.device.select import choose_device
from tinysd_batch.model.device.streams import on_compute_stream
from tinysd_batch.model.nn.unet import run_unet
from tinysd_batch.model.offload.planner import FRAGMENTATION_SHARE, MAX_FRAGMENTATION_SHARE, Planner
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, StagePlan
from tinysd_batch.model.packed import cuda_kernel, dequantize

MIB = 2**20
STEPS = 3  # two eager steps before a step is captured, and one that replays it


def new_model(path: Path, **options: Any) -> TinySD:
    return TinySD.from_pretrained(path, device="cuda", **{"dtype": "full", "vram_budget": "2GB", **options})


def generate(model: TinySD, **options: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    output = model.generate("cat", 1, num_inference_steps=STEPS, output_type="np", **options)
    return np.asarray(output.images)


@pytest.fixture(autouse=True)
def capture_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture a step even if there are few: the fake GPU is slow."""
    monkeypatch.setattr(pipeline, "MIN_STEPS_TO_CAPTURE", STEPS)


@contextmanager
def eager_steps() -> Iterator[None]:
    """Run all steps eagerly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "MIN_STEPS_TO_CAPTURE", STEPS + 2)
        yield


def pools_in_use(gpu: FakeCudaDevice) -> set[tuple[int, int]]:
    return {segment.pool for segment in gpu.allocator.segments}


@pytest.mark.parametrize("streams", [pytest.param(False, marks=pytest.mark.slow), True])
def test_step_that_cannot_be_captured_runs_eagerly_and_frees_its_memory(
    fake_gpu: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    model = new_model(tiny_model)
    model.offloader.stream_all_weights = streams
    with eager_steps():
        expected = generate(model)

    def run_and_read(*args: Any) -> torch.Tensor:
        noise = run_unet(*args)
        noise.sum().item()  # the program must not wait in a capture
        return noise

    monkeypatch.setattr(pipeline, "run_unet", run_and_read)
    assert (generate(model) == expected).all()
    assert fake_gpu.counts["captured"] == 0
    assert not fake_gpu.allocator.capturing_pools
    torch.cuda.empty_cache()
    assert pools_in_use(fake_gpu) <= {DEFAULT_POOL}
    assert (generate(model) == expected).all()
    assert fake_gpu.counts["begun"] == 1  # capturing is not tried again


def test_steps_run_eagerly_if_the_graph_does_not_fit(
    fake_gpu: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model, vram_budget=CONTEXT_BYTES + 80 * MIB)
    expected = generate(model)
    assert fake_gpu.counts["replayed"] > 1
    monkeypatch.setattr(graphs, "BYTES_PER_OPERATION", MIB)
    fake_gpu.counts.clear()
    assert (generate(model) == expected).all()
    assert fake_gpu.counts["replayed"] == 1  # to compare its output
    assert fake_gpu.allocator.non_torch_bytes == CONTEXT_BYTES


def test_out_of_memory_in_a_capture_discards_only_the_graph(
    fake_gpu: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model, vram_budget=None)
    with eager_steps():
        expected = generate(model)
    begin = graphs.FakeCudaGraph.capture_begin

    def begin_without_memory(graph: graphs.FakeCudaGraph, *args: Any, **options: Any) -> None:
        begin(graph, *args, **options)
        fake_gpu.allocator.limit = 0

    monkeypatch.setattr(graphs.FakeCudaGraph, "capture_begin", begin_without_memory)
    end = graphs.FakeCudaGraph.capture_end

    def end_with_memory(graph: graphs.FakeCudaGraph) -> None:
        fake_gpu.allocator.limit = fake_gpu.allocator.total
        end(graph)

    monkeypatch.setattr(graphs.FakeCudaGraph, "capture_end", end_with_memory)
    assert (generate(model) == expected).all()
    assert fake_gpu.counts["replayed"] == 0
    torch.cuda.empty_cache()
    assert pools_in_use(fake_gpu) <= {DEFAULT_POOL}


def test_graph_with_a_different_output_is_not_used(
    fake_gpu: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model)
    with eager_steps():
        expected = generate(model)
    replay = CapturedStep.replay
    monkeypatch.setattr(CapturedStep, "replay", lambda step, latents: replay(step, latents) + 1e-6)
    assert (generate(model) == expected).all()
    assert fake_gpu.counts["replayed"] == 1


def test_pinned_memory_is_unlocked_when_the_model_is_deleted(fake_gpu: FakeCudaDevice, tiny_model: Path) -> None:
    model = new_model(tiny_model)
    model.offloader.stream_all_weights = True
    generate(model)
    assert len(fake_gpu.pinned) == 3  # of the text encoder, the UNet, the VAE
    del model
    gc.collect()
    assert not fake_gpu.pinned


def test_torch_allocates_pinned_memory_if_pages_cannot_be_locked(
    fake_gpu: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model)
    expected = generate(model)
    refused_bytes: list[int] = []

    def refuse(runtime: FakeCudaRuntime, address: int, nbytes: int, flags: int) -> int:
        refused_bytes.append(nbytes)
        runtime.gpu.set_pending_error("part or all of the requested memory range is already mapped")
        return 712

    monkeypatch.setattr(FakeCudaRuntime, "cudaHostRegister", refuse)
    model.offloader.stream_all_weights = True
    assert (generate(model) == expected).all()
    assert len(refused_bytes) == len(fake_gpu.pinned) == 2  # the prompt was encoded before


def test_images_are_the_same_if_no_kernel_compiles(
    fake_gpu: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(new_model(tiny_model))
    dequantize.has_working_kernels.cache_clear()
    cuda_kernel.get_cuda_kernel.cache_clear()

    def fail(source: str, name: str) -> None:
        raise RuntimeError("nvrtc: error: invalid value for --gpu-architecture\nand more")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", fail)
    fake_gpu.counts.clear()
    message = r"cuda:0: weights are dequantized without a kernel, which is slow: nvrtc.*ture$"
    with pytest.warns(UserWarning, match=message):
        images = generate(new_model(tiny_model))
    assert (images == expected).all()
    assert fake_gpu.counts["launched"] == 0


def test_failed_kernel_launch_raises(fake_gpu: FakeCudaDevice) -> None:
    kernel = cuda_kernel.get_cuda_kernel("unpack_rows", torch.float32, fake_gpu.device)
    with pytest.raises(RuntimeError, match="CUDA error: 1"):
        kernel.launch(0, [0, 0, 0, 0], [0, 0, 2, 0])


def test_probe_stays_within_its_memory_limit(shape_only_gpu: ShapeOnlyCudaDevice) -> None:
    assert probe_half_precision(shape_only_gpu.device, torch.float16).is_accurate
    allocator = shape_only_gpu.allocator
    assert 0 < allocator.max_allocated <= PROBE_MEMORY_LIMIT_BYTES
    assert (allocator.limit, allocator.reserved) == (allocator.total, 0)


def test_process_memory_is_read_from_the_driver(
    fake_gpu: FakeCudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the driver lists processes. In containers it does not, and all memory in use is counted."""
    assert measure_process_gpu_bytes(fake_gpu.device) == CONTEXT_BYTES
    for name, output, expected in (
        ("listed", f"1, 900\n{os.getpid()}, 123\n", 123 * MIB),
        ("not_listed", "", CONTEXT_BYTES),
    ):
        (tmp_path / name).mkdir()
        program = tmp_path / name / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{output}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        assert measure_process_gpu_bytes(fake_gpu.device) == expected


def test_gpu_without_code_in_this_torch_is_refused(fake_gpu: FakeCudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    with pytest.raises(UsageError, match=r"fake CUDA device has compute capability 8\.6, and torch .* sm_90 only"):
        choose_device(None)


def test_copies_never_use_the_compute_stream(fake_gpu: FakeCudaDevice, tiny_model: Path) -> None:
    """Torch has 32 streams and hands them out in rotation."""
    model = new_model(tiny_model)
    model.offloader.stream_all_weights = True
    copy_streams = set()
    with on_compute_stream(model.device):
        compute_stream = torch.cuda.current_stream().cuda_stream
        for _ in range(40):
            with model.offloader.holding(model.vae_fragment):
                stream = model.offloader.stream
                assert stream is not None
                assert stream.copying is not None
                copy_streams.add(stream.copying.cuda_stream)
    assert compute_stream not in copy_streams


def test_job_on_a_small_gpu_falls_back_and_generates_all_images(
    fake_gpu: FakeCudaDevice, tiny_model: Path, tmp_path: Path
) -> None:
    allocator = fake_gpu.allocator
    manifest = write_csv(tmp_path / "m.csv", [{"prompt": "cat", "seed": 1, "n_samples": 4, "width": 48, "height": 48}])

    def run(name: str) -> list[dict[str, Any]]:
        torch.cuda.empty_cache()
        allocator.max_allocated = 0
        job = open_job(manifest, tmp_path / name, {"model": str(tiny_model), "steps": 2})
        setup = replace(setup_for(job), settings=replace(job.settings, device="cuda", precision="full"))
        run_job(job, lambda _: InlinePool(setup), Quiet(), lambda: False, None)
        rows = check_whole(tmp_path / name, 4)
        assert {(row["status"], row["device_name"]) for row in rows} == {("ok", "fake CUDA device")}
        return rows

    assert not any(row["degraded"] for row in run("large"))
    allocator.total = allocator.limit = CONTEXT_BYTES + allocator.max_allocated - 1
    assert any(row["degraded"] for row in run("small"))


@contextmanager
def record_stage_memory(allocator: FakeCachingAllocator) -> Iterator[dict[str, tuple[int, int]]]:
    """Record for each stage, by name, the peak bytes of tensors, and what torch reserved for them."""
    measured: dict[str, tuple[int, int]] = {}
    executing = Planner.executing

    @contextmanager
    def record(planner: Planner, plan: StagePlan) -> Iterator[ExecutionStrategy]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with executing(planner, plan) as strategy:
            yield strategy
        measured[plan.name] = allocator.max_allocated, allocator.max_reserved

    preallocate = Planner.preallocate

    def ignore(planner: Planner, plan: StagePlan) -> None:  # it allocates what was planned, not what is needed
        before = allocator.max_allocated
        preallocate(planner, plan)
        allocator.max_allocated = before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "executing", record)
        patch.setattr(Planner, "preallocate", ignore)
        yield measured


def check_plan(model: TinySD, shape: MicroBatchShape, measured: dict[str, tuple[int, int]], slack: int = 0) -> None:
    """Check that tensors take what was estimated, and that torch reserves no more than the budget."""
    plans = {plan.name: plan for plan in model.planner.plan_stages(shape)}
    assert measured.keys() == plans.keys()
    for name, (allocated, reserved) in measured.items():
        plan = plans[name]
        tensors = plan.resident_bytes + plan.buffer_bytes + plan.activation_bytes
        estimated = tensors + model.planner.overhead.workspace_bytes
        assert allocated == pytest.approx(estimated, rel=0.1, abs=slack), name
        assert reserved <= (model.planner.torch_budget_bytes or 0), name


@pytest.mark.parametrize("dtype", ["full", pytest.param("autocast", marks=pytest.mark.slow)])
def test_stages_take_what_was_planned(fake_gpu: FakeCudaDevice, tiny_model: Path, dtype: str) -> None:
    model = new_model(tiny_model, dtype=dtype, vram_budget=CONTEXT_BYTES + 96 * MIB)
    with record_stage_memory(fake_gpu.allocator) as measured:
        model.generate(["cat", "a dog"], [1, 2], num_inference_steps=3, height=64, width=64)
    check_plan(model, MicroBatchShape(4, 64, 64, model.info.max_tokens, 3), measured, slack=300_000)


OUT_OF_MEMORY = [
    pytest.param(torch.OutOfMemoryError("CUDA out of memory."), marks=pytest.mark.slow),
    RuntimeError("unable to find an engine to execute this"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_within_the_budget_increases_the_fragmentation_reserve(
    fake_gpu: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    model = new_model(tiny_model, vram_budget=CONTEXT_BYTES + 80 * MIB)
    with eager_steps():
        expected = generate(model)
    decode, shares = model.decode_pixels, []

    def fail_except_second(latents: torch.Tensor) -> torch.Tensor:
        shares.append(model.planner.fragmentation_share)
        if len(shares) != 2:
            raise error
        return decode(latents)

    monkeypatch.setattr(model, "decode_pixels", fail_except_second)
    assert (generate(model) == expected).all()
    assert shares == [FRAGMENTATION_SHARE, 2 * FRAGMENTATION_SHARE]
    with pytest.raises(UsageError, match="generating 512x512 takes at least"):  # stated with the usual reserve
        model.planner.plan_stages(MicroBatchShape(2, 512, 512, model.info.max_tokens))
    with pytest.raises(type(error)):
        generate(model)
    assert shares[2:] == [2 * FRAGMENTATION_SHARE, MAX_FRAGMENTATION_SHARE]


# At SD v1's size, on a device that computes shapes only


@pytest.fixture(scope="session")
def sd_v1_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of SD v1's size with random weights, the UNet at 2 bits."""
    folder = tmp_path_factory.mktemp("models") / "sd-v1"
    random_sd_v1.make_random_model(folder)
    return folder


BUDGETS = [  # MB in addition to the CUDA context; None: the smallest possible budget
    (None, "autocast", 512, 1), (256, "autocast", 512, 1), (256, "full", 512, 1), (668, "full", 512, 1),
    (400, "autocast", 768, 1), (165, "autocast", 256, 4),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("own_mb", "dtype", "size", "images"), BUDGETS)
def test_budget_is_kept_at_the_size_of_sd_v1(
    shape_only_gpu: ShapeOnlyCudaDevice, sd_v1_size: Path, own_mb: int | None, dtype: str, size: int, images: int
) -> None:
    model = new_model(sd_v1_size, dtype=dtype)
    shape = MicroBatchShape(2 * images, size, size, model.info.max_tokens, images + 1)
    budget = (
        model.planner.overhead.context_bytes + own_mb * 10**6 if own_mb else model.planner.estimate_min_budget(shape)
    )
    model = new_model(sd_v1_size, dtype=dtype, vram_budget=budget)
    torch.cuda.empty_cache()
    shape_only_gpu.allocator.max_in_use = 0
    with record_stage_memory(shape_only_gpu.allocator) as measured:
        model.generate([f"cat {number}" for number in range(images)], 1, num_inference_steps=6, height=size, width=size)
    assert shape_only_gpu.allocator.max_in_use <= budget
    assert shape_only_gpu.counts["replayed"] > 0
    if model.planner.fragmentation_share == FRAGMENTATION_SHARE:  # otherwise stages were planned again meanwhile
        check_plan(model, shape, measured)


@pytest.mark.slow
def test_gpu_benchmark_runs(
    shape_only_gpu: ShapeOnlyCudaDevice,
    sd_v1_size: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Time on a real GPU is too expensive to find mistakes in it."""
    monkeypatch.setattr(gpu_measurements, "IMAGES", 2)
    dtype = "autocast"
    options = gpu_measurements.new_parser().parse_args(
        ["--model", str(sd_v1_size), "--steps", "6", "--dtype", dtype, "--budget", "1000MB"]
    )
    measured = gpu_measurements.measure_generation(options)
    assert CONTEXT_BYTES + measured["whole"] <= 1000 * 10**6
    gpu_measurements.print_generation("budget 1000MB", dtype, measured)
    gpu_measurements.print_diffusers(dtype, gpu_measurements.measure_diffusers_step(options))
    gpu_measurements.print_dequantize(dtype, gpu_measurements.measure_dequantize(options))
    assert "a step replayed" in capsys.readouterr().out
