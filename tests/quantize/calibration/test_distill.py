"""Distillation of a calibrated UNet."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.models.small_unet import CPU, small_unet
from tinysd_batch.model.packed.format import GroupWeight
from tinysd_batch.quantize.calibration.distill import DistillationExamples, StudentUNet, distill_unet
from tinysd_batch.quantize.calibration.layerwise import CalibratedLayer
from tinysd_batch.quantize.data_free import quantize_unet
from tinysd_batch.quantize.presets import get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent


@pytest.fixture(scope="module")
def component() -> SourceComponent:
    unet = small_unet().eval().requires_grad_(False)
    return SourceComponent(dict(unet.config), unet.state_dict(), Path("here"))


@pytest.fixture(scope="module")
def layers(component: SourceComponent) -> dict[str, CalibratedLayer]:
    """Quantize the small UNet without data."""
    quantized = {}
    for name, layer in quantize_unet(component, get_preset_layouts(small_unet(), "default")).items():
        assert isinstance(layer.weight, GroupWeight), name
        bias = component.tensors.get(f"{name}.bias")
        quantized[name] = CalibratedLayer(layer.weight, None if bias is None else bias.half(), 0.0)
    return quantized


def make_examples(count: int, seed: int) -> DistillationExamples:
    """Return random latents with the float UNet's predictions."""
    generator = torch.Generator().manual_seed(seed)
    latents, context = (torch.randn(count, *shape, generator=generator) for shape in ((4, 16, 16), (5, 256)))
    times = torch.randint(1000, (count,), generator=generator).float()
    with torch.no_grad():
        noise = small_unet().eval()(latents, times, context).sample
    return DistillationExamples(latents, times, context, noise, torch.ones(count))


@pytest.mark.slow
def test_distillation_lowers_the_error_and_keeps_the_codes(
    component: SourceComponent, layers: dict[str, CalibratedLayer]
) -> None:
    recipe = Recipe(prompts=["a", "b"], held_out=["c", "d"], tune_steps=15, batch=4)
    distilled = distill_unet(component, layers, make_examples(32, 1), make_examples(16, 2), recipe, CPU, lambda _: None)
    assert distilled is not None
    assert distilled.error_after < distilled.error_before
    for name, layer in distilled.layers.items():
        assert torch.equal(layer.weight.qweight, layers[name].weight.qweight), name
    # The error was measured with the values that are stored.
    stored = replace(component, tensors={**component.tensors, **distilled.norms})
    with torch.no_grad():
        error = float(StudentUNet(stored, distilled.layers, CPU).weighted_error(make_examples(16, 2)))
    assert error == pytest.approx(distilled.error_after, rel=1e-3)


def test_distillation_that_does_not_help_is_discarded(
    component: SourceComponent, layers: dict[str, CalibratedLayer]
) -> None:
    recipe = Recipe(prompts=["a", "b"], held_out=["c", "d"], tune_steps=2, batch=4)
    perfect = make_examples(8, 2)
    with torch.no_grad():  # the student predicts these targets already
        perfect = replace(perfect, noise=StudentUNet(component, layers, CPU).predict(perfect))
    assert distill_unet(component, layers, make_examples(8, 1), perfect, recipe, CPU, lambda _: None) is None
