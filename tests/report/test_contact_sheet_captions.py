"""Captions below the images of a contact sheet."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinysd_batch.report import fonts
from tinysd_batch.report.contact_sheet import (
    CAPTION_SETTINGS,
    CELL_PX,
    FONT_SIZES_PX,
    SheetImage,
    fit_caption,
    make_captions,
    render_sheet,
)
from tinysd_batch.report.fonts import choose_font, has_character, load_bundled_font


def row(**values: Any) -> dict[str, Any]:
    return {"prompt": "cat", "seed": 1, **dict.fromkeys(CAPTION_SETTINGS), "steps": 20, "scale": 7.5, **values}


def test_seeds_are_written_in_full() -> None:
    """Seeds used to be shown as 1.23457e+08."""
    assert make_captions([row(seed=123456789), row(seed=2**31 + 1)]) == ["seed 123456789", "seed 2147483649"]
    assert make_captions([row(seed=2**63 - 1), row(seed=5)]) == ["9223372036854775807", "seed 5"]
    assert make_captions([row(steps=20, scale=7.5), row(steps=1000, scale=7.25)]) == [
        "steps 20, scale 7.5", "steps 1000, scale 7.25",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 123456789, 10**12, 2**63 - 1])
def test_seed_is_never_shortened(seed: int) -> None:
    (caption, _) = make_captions([row(seed=seed), row(seed=7)])
    text, font = fit_caption(caption)
    assert str(seed) in text
    assert font.getlength(text) <= CELL_PX


@pytest.mark.parametrize(
    "text",
    ["éèêàçñßøåœÿ", "ĄąŁłŐőŞşȚțĞğİıŽž", "ΑαΩωώϊ", "ЖжЁёЇїҐґўӘә", "“quotes” „unten“ — … • €", "Ảẵ ½ ² → ≤ №"],
)  # fmt: skip
def test_european_scripts_are_in_the_bundled_font(text: str) -> None:
    assert [character for character in text if not has_character(load_bundled_font(11), character)] == []


def test_characters_without_a_font_appear_as_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system font that lacks them, too, does not replace the bundled one."""
    assert not has_character(load_bundled_font(11), "猫")
    for font_file in (None, "/no/such/font.ttf", __file__):
        monkeypatch.setattr(fonts, "find_system_font", lambda _, font_file=font_file: font_file)
        assert choose_font("猫 cat", 11) is load_bundled_font(11)


def test_without_fontconfig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    fonts.find_system_font.cache_clear()
    assert fonts.find_system_font("猫") is None
    fonts.find_system_font.cache_clear()


def test_sheet_with_many_scripts(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "x.png")
    texts = ["é", "猫", "\N{CAT}", "a\u0301", "\u200b", "\0\x1b[31m", "", "long " * 99]
    sheet = render_sheet([SheetImage(tmp_path / "x.png", text) for text in texts], 1)
    assert sheet.width > len(texts) * CELL_PX


def test_long_captions_are_shortened_at_the_normal_size() -> None:
    text, font = fit_caption("a very long prompt that fits under no image of the sheet")
    assert text.endswith("…")
    assert font.size == FONT_SIZES_PX[0]
    assert font.getlength(text) <= CELL_PX
