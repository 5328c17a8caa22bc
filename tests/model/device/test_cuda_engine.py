"""The engine on a CUDA device: one that is pretended, and with `pytest -m gpu` a real one, too."""

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
def captures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few steps are captured, too: the pretended card's time is dear."""
    monkeypatch.setattr(pipeline, "MIN_STEPS_TO_CAPTURE", STEPS)


@pytest.mark.parametrize(("dtype", "tolerance"), [("full", 1e-2), ("autocast", 1e-1)])
def test_the_same_picture_as_on_the_cpu(
    card: FakeCudaDevice | None, tiny_model: Path, dtype: str, tolerance: float
) -> None:
    """The embedded model's picture on a real one; the other takes too long for that."""
    model = "embedded" if card is None else tiny_model
    options = {"num_inference_steps": 10 if card is None else STEPS, "output_type": "np"}
    expected = TinySD.from_pretrained(model, device="cpu").generate("red apple", 7, **options).images  # type: ignore[arg-type]
    found = TinySD.from_pretrained(model, device="cuda", dtype=dtype).generate("red apple", 7, **options).images  # type: ignore[arg-type]
    assert abs(found - expected).mean() < tolerance


def test_a_tight_budget_changes_no_bit_and_leaves_the_card_empty(card: FakeCudaDevice | None, tiny_model: Path) -> None:
    roomy = TinySD.from_pretrained(tiny_model, device="cuda", dtype="autocast", vram_budget="4GB")
    tight = TinySD.from_pretrained(tiny_model, device="cuda", dtype="autocast", vram_budget="4GB")
    tight.offloader.stream_all_weights = True
    options = {"num_inference_steps": STEPS, "output_type": "np"}
    pictures = [model.generate("cat", [1, 2], **options).images for model in (roomy, tight)]  # type: ignore[arg-type]
    assert (pictures[0] == pictures[1]).all()
    assert not any(fragment.is_onloaded for fragment in tight.fragments)


@pytest.mark.parametrize("streams", [pytest.param(False, marks=pytest.mark.slow), True])
def test_steps_are_replayed_and_change_no_bit(
    card: FakeCudaDevice | None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cuda", dtype="autocast", vram_budget="4GB")
    model.offloader.stream_all_weights = streams
    replayed: list[CapturedStep] = []
    replay = CapturedStep.replay

    def watched(step: CapturedStep, latents: torch.Tensor) -> torch.Tensor:
        replayed.append(step)
        return replay(step, latents)

    monkeypatch.setattr(CapturedStep, "replay", watched)
    options = {"num_inference_steps": STEPS, "output_type": "latent", "sampler": "ddim"}
    found = model.generate("cat", [1, 2], **options).images  # type: ignore[arg-type]
    assert len(replayed) == STEPS - EAGER_STEPS + 1  # the one that was compared, too
    monkeypatch.setattr(pipeline, "MIN_STEPS_TO_CAPTURE", STEPS + 1)
    assert torch.equal(found, model.generate("cat", [1, 2], **options).images)  # type: ignore[arg-type]
    assert len(replayed) == STEPS - EAGER_STEPS + 1


@pytest.mark.parametrize("dtype", [pytest.param("full", marks=pytest.mark.slow), "autocast"])
def test_a_budget_is_kept(card: FakeCudaDevice | None, tiny_model: Path, dtype: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    number = torch.float32 if dtype == "full" else torch.float16
    budget = measure_cuda_overhead(device, number).context_bytes + 64 * MIB
    model = TinySD.from_pretrained(tiny_model, device=device, dtype=dtype, vram_budget=budget)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.generate("cat", [1, 2], num_inference_steps=STEPS)
    assert torch.cuda.max_memory_reserved() <= 64 * MIB
    assert measure_process_gpu_bytes(device) <= budget


def test_the_card_compiles_kernels_that_unpack_to_the_bit(card: FakeCudaDevice | None) -> None:
    assert has_working_kernels(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
def test_the_probe_tells_whether_half_precision_pays(real_card: None) -> None:
    found = probe_half_precision(torch.device("cuda"), torch.float16)
    assert found.speedup > 0
    assert found.is_accurate or choose_precision(None, torch.device("cuda")).dtype is torch.float32


@pytest.mark.gpu
def test_the_noise_of_this_card(real_card: None) -> None:
    card, ours = torch.Generator("cuda").manual_seed(1234), CudaNoiseGenerator(1234)
    for shape in ((4, 64, 64), (4, 64, 64), (4, 96, 96)):
        expected = torch.randn(shape, generator=card, device="cuda").cpu()
        torch.testing.assert_close(ours.randn(shape), expected, rtol=0, atol=1e-5)
