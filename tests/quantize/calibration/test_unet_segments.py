"""Running the UNet segment by segment."""

from pathlib import Path

import pytest
import torch

from tests.support.models.small_unet import CPU, small_unet
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.quantize.calibration.layerwise import run_segment
from tinysd_batch.quantize.calibration.unet_segments import ForwardState, SegmentedUNet, split_into_segments

SMAPS = Path("/proc/self/smaps")


def test_all_segments_together_are_the_unet() -> None:
    unet = small_unet().eval()
    generator = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 16, 16), (3, 5, 256)))
    timesteps = torch.tensor([1.0, 500.0, 999.0])
    predicted = SegmentedUNet(unet.config, unet.state_dict(), CPU).predict(latents, timesteps, context, 2)
    with torch.no_grad():
        assert torch.allclose(predicted, unet(latents, timesteps, context).sample, atol=1e-5)
    assert [segment.type for segment in split_into_segments(unet)].count("resnet") == 8


def test_storing_states_as_float16_changes_little() -> None:
    unet = small_unet().eval()
    generator = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 5, 256)))
    segmented = SegmentedUNet(unet.config, unet.state_dict(), CPU)
    predictions = []
    for dtype in (torch.float32, torch.float16):
        state = ForwardState.from_inputs(latents, torch.tensor([1.0, 900.0]), context)
        with torch.no_grad():
            for segment in segmented.segments:
                segmented.load(segment)
                state = run_segment(segment, segmented.unet, state, dtype)
                assert {tensor.dtype for tensor in (state.hidden_states, *state.skips)} == {dtype}
        predictions.append(state.hidden_states.float())
    error = (predictions[0] - predictions[1]).square().sum() / predictions[0].square().sum()
    assert 0 < error < 1e-5


@pytest.mark.skipif(not SMAPS.exists(), reason="needs /proc/self/smaps, which only Linux has")
def test_pages_of_the_float_model_are_released_after_use(tmp_path: Path) -> None:
    unet = small_unet().eval()
    unet.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / WEIGHTS_FILE
    tensors = MappedTensors.read(file)
    segmented = SegmentedUNet(unet.config, tensors, CPU, tensors.release)
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 256)
    expected = unet(latents, 500, context).sample
    assert torch.allclose(segmented.predict(latents, torch.full((2,), 500.0), context, 2), expected, atol=1e-4)
    assert resident_bytes(file) < file.stat().st_size / 10
    assert sum(float(tensor.sum()) for tensor in tensors.values())
    assert resident_bytes(file) > file.stat().st_size / 2  # otherwise the first figure would prove nothing


def resident_bytes(file: Path) -> int:
    """Return how much of a file's mapping is in this process's memory."""
    _, _, mapping = SMAPS.read_text().partition(str(file))
    return int(mapping.partition("Rss:")[2].split()[0]) * 1024
