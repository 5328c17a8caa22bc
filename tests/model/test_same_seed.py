"""The promise of the same picture for a seed, whatever shares its batch, draws it, or comes before it."""

from pathlib import Path

import pytest

from tests.support.batch_layouts import LAYOUTS, BatchLayout, ImagesById, compare_images, generate_with_layout
from tinysd_batch.config import Settings

BOUND = 1  # of 255, as README states it


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> Settings:
    return Settings(model=str(tiny_model), steps=6, device="cpu")


@pytest.fixture(scope="module")
def alone(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> ImagesById:
    return generate_with_layout(LAYOUTS[0], settings, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: layout.name)
def test_company_changes_no_picture(settings: Settings, alone: ImagesById, layout: BatchLayout, tmp_path: Path) -> None:
    largest, _ = compare_images(alone, generate_with_layout(layout, settings, tmp_path))
    assert largest <= BOUND


@pytest.mark.slow
def test_pictures_are_not_all_alike(alone: ImagesById) -> None:
    assert len({picture.tobytes() for picture in alone.values()}) == len(alone)
