"""The promise of the same picture for a seed, whatever shares its batch, draws it, or comes before it."""

from pathlib import Path

import pytest

from tests.support.batch_layouts import LAYOUTS, Layout, Pictures, compare, draw
from tinysd_batch.config import Settings

BOUND = 1  # of 255, as README states it


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> Settings:
    return Settings(model=str(tiny_model), steps=6, device="cpu")


@pytest.fixture(scope="module")
def alone(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return draw(LAYOUTS[0], settings, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: layout.name)
def test_company_changes_no_picture(settings: Settings, alone: Pictures, layout: Layout, tmp_path: Path) -> None:
    largest, _ = compare(alone, draw(layout, settings, tmp_path))
    assert largest <= BOUND


@pytest.mark.slow
def test_pictures_are_not_all_alike(alone: Pictures) -> None:
    assert len({picture.tobytes() for picture in alone.values()}) == len(alone)
