"""Tuning what surrounds the codes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.small_unet import small_unet
from tinysd_batch.model.packed.format import GroupWeight
from tinysd_batch.quantize.calibration.distill import DistillationExamples, StudentUNet, distill_unet
from tinysd_batch.quantize.calibration.layerwise import CalibratedLayer
from tinysd_batch.quantize.data_free import quantize_unet
from tinysd_batch.quantize.presets import get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def part() -> SourceComponent:
    unet = small_unet().eval().requires_grad_(False)
    return SourceComponent(dict(unet.config), unet.state_dict(), Path("here"))


@pytest.fixture(scope="module")
def solved(part: SourceComponent) -> dict[str, CalibratedLayer]:
    """The small UNet at level fast."""
    found = {}
    for name, one in quantize_unet(part, get_preset_layouts(small_unet(), "default")).items():
        assert isinstance(one.weight, GroupWeight), name
        bias = part.tensors.get(f"{name}.bias")
        found[name] = CalibratedLayer(one.weight, None if bias is None else bias.half(), 0.0)
    return found


def examples(count: int, seed: int) -> DistillationExamples:
    """What the float UNet says of arbitrary latents."""
    generator = torch.Generator().manual_seed(seed)
    latents, context = (torch.randn(count, *shape, generator=generator) for shape in ((4, 16, 16), (5, 256)))
    times = torch.randint(1000, (count,), generator=generator).float()
    with torch.no_grad():
        noise = small_unet().eval()(latents, times, context).sample
    return DistillationExamples(latents, times, context, noise, torch.ones(count))


@pytest.mark.slow
def test_tuning_lowers_the_error_and_leaves_the_codes(
    part: SourceComponent, solved: dict[str, CalibratedLayer]
) -> None:
    recipe = Recipe(prompts=["a", "b"], held_out=["c", "d"], tune_steps=15, batch=4)
    tuned = distill_unet(part, solved, examples(32, 1), examples(16, 2), recipe, CPU, lambda _: None)
    assert tuned is not None
    assert tuned.error_after < tuned.error_before
    for name, one in tuned.layers.items():
        assert torch.equal(one.weight.qweight, solved[name].weight.qweight), name
    # What was measured is what is stored.
    again = StudentUNet(replace(part, tensors={**part.tensors, **tuned.norms}), tuned.layers, CPU)
    with torch.no_grad():
        assert float(again.weighted_error(examples(16, 2))) == pytest.approx(tuned.error_after, rel=1e-3)


def test_tuning_that_does_not_help_is_not_kept(part: SourceComponent, solved: dict[str, CalibratedLayer]) -> None:
    recipe = Recipe(prompts=["a", "b"], held_out=["c", "d"], tune_steps=2, batch=4)
    perfect = examples(8, 2)
    with torch.no_grad():
        perfect = replace(perfect, noise=StudentUNet(part, solved, CPU).predict(perfect))  # what it says already
    assert distill_unet(part, solved, examples(8, 1), perfect, recipe, CPU, lambda _: None) is None
