"""Recipes for calibration."""

from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tinysd_batch.errors import UsageError
from tinysd_batch.quantize.recipe import Recipe, read_recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts = ['a', 'b']", "held_out"),
        ("prompts = ['a', 'b']\nheld_out = ['b', 'c']", "'b' is in both prompts and held_out"),
        ("prompts = ['a', 'b']\nheld_out = ['c', 'd']\nstep = 3", "step = '3'"),
        ("prompts = ['a', 'b']\nheld_out = ['c', 'd']\ndamping = 0.0", "damping = '0.0'"),
        ("prompts = [", "not valid TOML"),
    ],
)
def test_recipe_errors_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"recipe\.toml: .*" + message):
        read_recipe(path)


def test_shipped_recipes_are_valid() -> None:
    assert isinstance(read_recipe(None), Recipe)
    for path in (ROOT / "configs" / "quantize").glob("*.toml"):
        assert len(read_recipe(path).prompts) > 100
