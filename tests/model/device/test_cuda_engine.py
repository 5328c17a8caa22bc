"""The engine on a CUDA device: a fake one, and with `pytest -m gpu` a real one, too."""

from pathlib import Path

import pytest
import torch

from tests.support.fake_cuda.device import FakeCudaDevice
from tinysd_batch import TinySD
from tinysd_batch.model import pipeline
from tinysd_batch.model.device.cuda_graph import EAGER_STEPS, CapturedStep
from tinysd_batch.model.device.cuda_overhead import measure_cuda_overhead, measure_process_gpu_bytes
from tinysd_batch.model.device.precision import choose_precision, probe_half_precision
from tinysd_batch.model.packed.dequantize import has_working_kernels
from tinysd_batch.model.sampling.cuda_noise import CudaNoiseGenerator

MIB = 2**20
STEPS = 4


@pytest.fixture(autouse=True)
def capture_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture a step even if there are few: the fake CUDA device is slow."""
    monkeypatch.setattr(pipeline, "MIN_STEPS_TO_CAPTURE", STEPS)


@pytest.mark.parametrize(("dtype", "tolerance"), [("full", 1e-2), ("autocast", 1e-1)])
def test_image_is_the_same_as_on_the_cpu(
    cuda_device: FakeCudaDevice | None, tiny_model: Path, dtype: str, tolerance: float
) -> None:
    """The embedded model on a real GPU; it is too slow on the fake one."""
    model = "embedded" if cuda_device is None else tiny_model
    options = {"num_inference_steps": 10 if cuda_device is None else STEPS, "output_type": "np"}
    expected = TinySD.from_pretrained(model, device="cpu").generate("red apple", 7, **options).images  # type: ignore[arg-type]
    images = TinySD.from_pretrained(model, device="cuda", dtype=dtype).generate("red apple", 7, **options).images  # type: ignore[arg-type]
    assert abs(images - expected).mean() < tolerance


def test_streaming_gives_identical_images_and_frees_all_weights(
    cuda_device: FakeCudaDevice | None, tiny_model: Path
) -> None:
    resident = TinySD.from_pretrained(tiny_model, device="cuda", dtype="autocast", vram_budget="4GB")
    streamed = TinySD.from_pretrained(tiny_model, device="cuda", dtype="autocast", vram_budget="4GB")
    streamed.offloader.stream_all_weights = True
    options = {"num_inference_steps": STEPS, "output_type": "np"}
    images = [model.generate("cat", [1, 2], **options).images for model in (resident, streamed)]  # type: ignore[arg-type]
    assert (images[0] == images[1]).all()
    assert not any(fragment.is_onloaded for fragment in streamed.fragments)


@pytest.mark.parametrize("streams", [pytest.param(False, marks=pytest.mark.slow), True])
def test_replayed_steps_are_bit_identical(
    cuda_device: FakeCudaDevice | None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cuda", dtype="autocast", vram_budget="4GB")
    model.offloader.stream_all_weights = streams
    replayed: list[CapturedStep] = []
    replay = CapturedStep.replay

    def record(step: CapturedStep, latents: torch.Tensor) -> torch.Tensor:
        replayed.append(step)
        return replay(step, latents)

    monkeypatch.setattr(CapturedStep, "replay", record)
    options = {"num_inference_steps": STEPS, "output_type": "latent", "sampler": "ddim"}
    latents = model.generate("cat", [1, 2], **options).images  # type: ignore[arg-type]
    assert len(replayed) == STEPS - EAGER_STEPS + 1  # one more to compare its output
    monkeypatch.setattr(pipeline, "MIN_STEPS_TO_CAPTURE", STEPS + 1)
    assert torch.equal(latents, model.generate("cat", [1, 2], **options).images)  # type: ignore[arg-type]
    assert len(replayed) == STEPS - EAGER_STEPS + 1


@pytest.mark.parametrize("dtype", [pytest.param("full", marks=pytest.mark.slow), "autocast"])
def test_budget_is_kept(cuda_device: FakeCudaDevice | None, tiny_model: Path, dtype: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch_dtype = torch.float32 if dtype == "full" else torch.float16
    budget = measure_cuda_overhead(device, torch_dtype).context_bytes + 64 * MIB
    model = TinySD.from_pretrained(tiny_model, device=device, dtype=dtype, vram_budget=budget)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.generate("cat", [1, 2], num_inference_steps=STEPS)
    assert torch.cuda.max_memory_reserved() <= 64 * MIB
    assert measure_process_gpu_bytes(device) <= budget


def test_compiled_kernels_are_exact(cuda_device: FakeCudaDevice | None) -> None:
    assert has_working_kernels(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
def test_probe_decides_about_half_precision(real_gpu: None) -> None:
    result = probe_half_precision(torch.device("cuda"), torch.float16)
    assert result.speedup > 0
    assert result.is_accurate or choose_precision(None, torch.device("cuda")).dtype is torch.float32


@pytest.mark.gpu
def test_noise_is_the_same_as_on_this_gpu(real_gpu: None) -> None:
    generator, ours = torch.Generator("cuda").manual_seed(1234), CudaNoiseGenerator(1234)
    for shape in ((4, 64, 64), (4, 64, 64), (4, 96, 96)):
        expected = torch.randn(shape, generator=generator, device="cuda").cpu()
        torch.testing.assert_close(ours.randn(shape), expected, rtol=0, atol=1e-5)
