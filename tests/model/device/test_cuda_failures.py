"""What can go wrong on a card, on one that is pretended."""

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

from tests.support import gpu_measurements, random_sd_v1
from tests.support.fake_cuda import graphs
from tests.support.fake_cuda.allocator import DEFAULT_POOL, FakeCachingAllocator
from tests.support.fake_cuda.device import CONTEXT_BYTES, FakeCudaDevice
from tests.support.fake_cuda.driver import FakeCudaRuntime
from tests.support.fake_cuda.shape_only import ShapeOnlyCudaDevice
from tests.support.files import write_csv
from tests.support.jobs import Quiet, check_whole, setup_for
from tinysd_batch import TinySD
from tinysd_batch.config import Settings
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
STEPS = 3  # two before a step is captured, and one that replays it


def new_model(path: Path, **options: Any) -> TinySD:
    return TinySD.from_pretrained(path, device="cuda", **{"dtype": "full", "vram_budget": "2GB", **options})


def pictures(model: TinySD, **options: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    made: np.ndarray[Any, np.dtype[np.float32]] = model.generate(
        "cat", 1, num_inference_steps=STEPS, output_type="np", **options
    ).images
    return made


@pytest.fixture(autouse=True)
def captures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few steps are captured, too: this GPU's time is dear."""
    monkeypatch.setattr(pipeline, "MIN_STEPS_TO_CAPTURE", STEPS)


@contextmanager
def issued() -> Iterator[None]:
    """Steps are not captured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "MIN_STEPS_TO_CAPTURE", STEPS + 2)
        yield


def pools(card: FakeCudaDevice) -> set[tuple[int, int]]:
    return {segment.pool for segment in card.allocator.segments}


@pytest.mark.parametrize("streams", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_step_that_cannot_be_captured_is_issued_and_leaves_nothing_behind(
    pretended_card: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    model = new_model(tiny_model)
    model.offloader.stream_all_weights = streams
    with issued():
        expected = pictures(model)

    def looked_at(*given: Any) -> torch.Tensor:
        said = run_unet(*given)
        said.sum().item()
        return said

    monkeypatch.setattr(pipeline, "run_unet", looked_at)
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["captured"] == 0
    assert not pretended_card.allocator.capturing_pools
    torch.cuda.empty_cache()
    assert pools(pretended_card) <= {DEFAULT_POOL}
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["begun"] == 1  # what could not be captured is not tried again


def test_where_a_graph_does_not_fit_steps_are_issued(
    pretended_card: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model, vram_budget=CONTEXT_BYTES + 80 * MIB)
    expected = pictures(model)
    assert pretended_card.counts["replayed"] > 1
    monkeypatch.setattr(graphs, "BYTES_PER_OPERATION", MIB)
    pretended_card.counts.clear()
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["replayed"] == 1  # the one that was compared
    assert pretended_card.allocator.non_torch_bytes == CONTEXT_BYTES


def test_memory_that_runs_out_in_a_capture_costs_the_graph_only(
    pretended_card: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model, vram_budget=None)
    with issued():
        expected = pictures(model)
    begin = graphs.FakeCudaGraph.capture_begin

    def without_room(graph: graphs.FakeCudaGraph, *given: Any, **options: Any) -> None:
        begin(graph, *given, **options)
        pretended_card.allocator.limit = 0

    monkeypatch.setattr(graphs.FakeCudaGraph, "capture_begin", without_room)
    end = graphs.FakeCudaGraph.capture_end

    def with_room(graph: graphs.FakeCudaGraph) -> None:
        pretended_card.allocator.limit = pretended_card.allocator.total
        end(graph)

    monkeypatch.setattr(graphs.FakeCudaGraph, "capture_end", with_room)
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["replayed"] == 0
    torch.cuda.empty_cache()
    assert pools(pretended_card) <= {DEFAULT_POOL}


def test_a_graph_that_says_something_else_is_not_used(
    pretended_card: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model)
    with issued():
        expected = pictures(model)
    replay = CapturedStep.replay
    monkeypatch.setattr(CapturedStep, "replay", lambda step, latents: replay(step, latents) + 1e-6)
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["replayed"] == 1


def test_page_locked_memory_is_let_go_of_when_nobody_reads_it_any_more(
    pretended_card: FakeCudaDevice, tiny_model: Path
) -> None:
    model = new_model(tiny_model)
    model.offloader.stream_all_weights = True
    pictures(model)
    assert len(pretended_card.locked) == 3  # of the text encoder, the UNet, the VAE
    del model
    gc.collect()
    assert not pretended_card.locked


def test_where_pages_cannot_be_locked_torch_does_it(
    pretended_card: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model)
    expected = pictures(model)
    refused: list[int] = []

    def refuse(runtime: FakeCudaRuntime, address: int, nbytes: int, flags: int) -> int:
        refused.append(nbytes)
        runtime.card.set_pending_error("part or all of the requested memory range is already mapped")
        return 712

    monkeypatch.setattr(FakeCudaRuntime, "cudaHostRegister", refuse)
    model.offloader.stream_all_weights = True
    assert (pictures(model) == expected).all()
    assert len(refused) == len(pretended_card.locked) == 2  # the prompts are known by now


def test_a_card_on_which_no_kernel_compiles_draws_the_same(
    pretended_card: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pictures(new_model(tiny_model))
    dequantize.has_working_kernels.cache_clear()
    cuda_kernel.get_cuda_kernel.cache_clear()

    def fail(source: str, name: str) -> None:
        raise RuntimeError("nvrtc: error: invalid value for --gpu-architecture\nand more")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", fail)
    pretended_card.counts.clear()
    with pytest.warns(UserWarning, match=r"cuda:0: weights are dequantized without a kernel, which is slow: nvrtc.*ture$"):
        found = pictures(new_model(tiny_model))
    assert (found == expected).all()
    assert pretended_card.counts["launched"] == 0


def test_a_kernel_that_cannot_be_launched_is_an_error(pretended_card: FakeCudaDevice) -> None:
    kernel = cuda_kernel.get_cuda_kernel("unpack_rows", torch.float32, pretended_card.device)
    with pytest.raises(RuntimeError, match="CUDA error: 1"):
        kernel.launch(0, [0, 0, 0, 0], [0, 0, 2, 0])


def test_the_probe_keeps_within_its_own_limit(idle_card: ShapeOnlyCudaDevice) -> None:
    assert probe_half_precision(idle_card.device, torch.float16).is_accurate
    allocator = idle_card.allocator
    assert 0 < allocator.max_allocated <= PROBE_MEMORY_LIMIT_BYTES
    assert (allocator.limit, allocator.reserved) == (allocator.total, 0)


def test_the_driver_knows_what_this_process_takes(
    pretended_card: FakeCudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it names processes; in containers it does not, and all that is in use counts."""
    assert measure_process_gpu_bytes(pretended_card.device) == CONTEXT_BYTES
    for name, said, expected in (("knows", f"1, 900\n{os.getpid()}, 123\n", 123 * MIB), ("not", "", CONTEXT_BYTES)):
        (tmp_path / name).mkdir()
        program = tmp_path / name / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{said}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        assert measure_process_gpu_bytes(pretended_card.device) == expected


def test_a_card_that_torch_has_no_code_for_is_refused(
    pretended_card: FakeCudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    with pytest.raises(UsageError, match=r"a pretended card has compute capability 8\.6, and torch .* sm_90 only"):
        choose_device(None)


def test_copies_have_a_stream_of_their_own_however_many_phases(
    pretended_card: FakeCudaDevice, tiny_model: Path
) -> None:
    """Torch has 32 streams and hands them out in turn."""
    model = new_model(tiny_model)
    model.offloader.stream_all_weights = True
    met = set()
    with on_compute_stream(model.device):
        working = torch.cuda.current_stream().cuda_stream
        for _ in range(40):
            with model.offloader.holding(model.vae_fragment):
                stream = model.offloader.stream
                assert stream is not None
                assert stream.copying is not None
                met.add(stream.copying.cuda_stream)
    assert working not in met


def test_a_job_on_a_small_card_saves_memory_and_draws_everything(
    pretended_card: FakeCudaDevice, tiny_model: Path, tmp_path: Path
) -> None:
    allocator = pretended_card.allocator
    manifest = write_csv(tmp_path / "m.csv", [{"prompt": "cat", "seed": 1, "n_samples": 4, "width": 48, "height": 48}])

    def draw(name: str) -> list[dict[str, Any]]:
        torch.cuda.empty_cache()
        allocator.max_allocated = 0
        job = open_job(manifest, tmp_path / name, Settings(model=str(tiny_model), steps=2))
        setup = replace(setup_for(job), device="cuda", precision="full")
        run_job(job, lambda _: InlinePool(setup), Quiet(), lambda: False, None)
        rows = check_whole(tmp_path / name, 4)
        assert {(row["status"], row["device_name"]) for row in rows} == {("ok", "a pretended card")}
        return rows

    assert not any(row["degraded"] for row in draw("large"))
    allocator.total = allocator.limit = CONTEXT_BYTES + allocator.max_allocated - 1
    assert any(row["degraded"] for row in draw("small"))


@contextmanager
def watching(allocator: FakeCachingAllocator) -> Iterator[dict[str, tuple[int, int]]]:
    """Of each phase, by its name: the most bytes that tensors took, and that torch reserved for them."""
    measured: dict[str, tuple[int, int]] = {}
    working = Planner.executing

    @contextmanager
    def watched(planner: Planner, phase: StagePlan) -> Iterator[ExecutionStrategy]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with working(planner, phase) as way:
            yield way
        measured[phase.name] = allocator.max_allocated, allocator.max_reserved

    set_aside = Planner.preallocate

    def unseen(planner: Planner, phase: StagePlan) -> None:  # it takes what was planned, whatever work takes
        before = allocator.max_allocated
        set_aside(planner, phase)
        allocator.max_allocated = before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "executing", watched)
        patch.setattr(Planner, "preallocate", unseen)
        yield measured


def check_plan(model: TinySD, shape: MicroBatchShape, measured: dict[str, tuple[int, int]], slack: int = 0) -> None:
    """Tensors take what was foretold, and torch reserves no more than it may."""
    planned = {phase.name: phase for phase in model.planner.plan_stages(shape)}
    assert measured.keys() == planned.keys()
    for name, (allocated, reserved) in measured.items():
        phase = planned[name]
        alive = phase.resident_bytes + phase.buffer_bytes + phase.activation_bytes + model.planner.overhead.workspace_bytes
        assert allocated == pytest.approx(alive, rel=0.1, abs=slack), name
        assert reserved <= (model.planner.torch_budget_bytes or 0), name


@pytest.mark.parametrize("dtype", ["full", pytest.param("autocast", marks=pytest.mark.slow)])
def test_a_plan_for_the_card_is_what_it_takes(pretended_card: FakeCudaDevice, tiny_model: Path, dtype: str) -> None:
    model = new_model(tiny_model, dtype=dtype, vram_budget=CONTEXT_BYTES + 96 * MIB)
    with watching(pretended_card.allocator) as measured:
        model.generate(["cat", "a dog"], [1, 2], num_inference_steps=3, height=64, width=64)
    check_plan(model, MicroBatchShape(4, 64, 64, model.info.max_tokens, 3), measured, slack=300_000)


NO_ROOM = [
    pytest.param(torch.OutOfMemoryError("CUDA out of memory."), marks=pytest.mark.slow),
    RuntimeError("unable to find an engine to execute this"),
]


@pytest.mark.parametrize("error", NO_ROOM, ids=lambda error: type(error).__name__)
def test_memory_that_lies_in_too_many_pieces_makes_it_leave_larger_gaps(
    pretended_card: FakeCudaDevice, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    model = new_model(tiny_model, vram_budget=CONTEXT_BYTES + 80 * MIB)
    with issued():
        expected = pictures(model)
    decode, tried = model.decode_pixels, []

    def short_of_memory(latents: torch.Tensor) -> torch.Tensor:
        tried.append(model.planner.fragmentation_share)
        if len(tried) != 2:
            raise error
        return decode(latents)

    monkeypatch.setattr(model, "decode_pixels", short_of_memory)
    assert (pictures(model) == expected).all()
    assert tried == [FRAGMENTATION_SHARE, 2 * FRAGMENTATION_SHARE]
    with pytest.raises(UsageError, match="generating 512x512 takes at least"):  # as ever
        model.planner.plan_stages(MicroBatchShape(2, 512, 512, model.info.max_tokens))
    with pytest.raises(type(error)):
        pictures(model)
    assert tried[2:] == [2 * FRAGMENTATION_SHARE, MAX_FRAGMENTATION_SHARE]


# At SD v1's size, by a card that computes nothing


@pytest.fixture(scope="session")
def sd_v1_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights at SD v1's sizes, 2 bits in the UNet."""
    folder = tmp_path_factory.mktemp("models") / "sd-v1"
    random_sd_v1.make_random_model(folder)
    return folder


BUDGETS = [  # MB besides what CUDA takes; None: the least that can be
    (None, "autocast", 512, 1), (256, "autocast", 512, 1), (256, "full", 512, 1), (668, "full", 512, 1),
    (400, "autocast", 768, 1), (165, "autocast", 256, 4),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("own_mb", "dtype", "size", "images"), BUDGETS)
def test_a_budget_is_kept_at_sd_v1s_size(
    idle_card: ShapeOnlyCudaDevice, sd_v1_size: Path, own_mb: int | None, dtype: str, size: int, images: int
) -> None:
    model = new_model(sd_v1_size, dtype=dtype)
    shape = MicroBatchShape(2 * images, size, size, model.info.max_tokens, images + 1)
    budget = (
        model.planner.overhead.context_bytes + own_mb * 10**6 if own_mb else model.planner.estimate_min_budget(shape)
    )
    model = new_model(sd_v1_size, dtype=dtype, vram_budget=budget)
    torch.cuda.empty_cache()
    idle_card.allocator.max_in_use = 0
    with watching(idle_card.allocator) as measured:
        model.generate([f"cat {n}" for n in range(images)], 1, num_inference_steps=6, height=size, width=size)
    assert idle_card.allocator.max_in_use <= budget
    assert idle_card.counts["replayed"] > 0
    if model.planner.fragmentation_share == FRAGMENTATION_SHARE:  # else what was done in the end is not what was planned at first
        check_plan(model, shape, measured)


@pytest.mark.slow
def test_the_benchmark_for_cards_runs(
    idle_card: ShapeOnlyCudaDevice,
    sd_v1_size: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The time on a real one is dear."""
    monkeypatch.setattr(gpu_measurements, "IMAGES", 2)
    dtype = "autocast"
    given = gpu_measurements.new_parser().parse_args(
        ["--model", str(sd_v1_size), "--steps", "6", "--dtype", dtype, "--budget", "1000MB"]
    )
    found = gpu_measurements.measure_generation(given)
    assert CONTEXT_BYTES + found["whole"] <= 1000 * 10**6
    gpu_measurements.print_generation("budget 1000MB", dtype, found)
    gpu_measurements.print_diffusers(dtype, gpu_measurements.measure_diffusers_step(given))
    gpu_measurements.print_dequantize(dtype, gpu_measurements.measure_dequantize(given))
    assert "a step replayed" in capsys.readouterr().out
