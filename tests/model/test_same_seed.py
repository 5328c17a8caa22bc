"""A seed gives the same image, whatever its batch, its worker, and the images before it."""

from pathlib import Path

import pytest

from tests.support.models.batch_layouts import LAYOUTS, BatchLayout, ImagesById, compare_images, generate_with_layout
from tests.support.settings import make_settings
from tinysd_batch.settings.schema import Settings

MAX_DIFFERENCE = 1  # of 255, as the README states


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> Settings:
    return make_settings(model=str(tiny_model), steps=6, device="cpu")


@pytest.fixture(scope="module")
def alone(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> ImagesById:
    return generate_with_layout(LAYOUTS[0], settings, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: layout.name)
def test_the_batch_layout_changes_no_image(
    settings: Settings, alone: ImagesById, layout: BatchLayout, tmp_path: Path
) -> None:
    largest, _ = compare_images(alone, generate_with_layout(layout, settings, tmp_path))
    assert largest <= MAX_DIFFERENCE


@pytest.mark.slow
def test_images_are_all_different(alone: ImagesById) -> None:
    assert len({image.tobytes() for image in alone.values()}) == len(alone)
