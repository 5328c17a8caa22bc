"""Combine images into a contact sheet, or grid, with a caption below each."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageDraw

from tinysd_batch.images import open_image
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.records import Status
from tinysd_batch.report.fonts import Font, choose_font
from tinysd_batch.report.formatting import to_one_line
from tinysd_batch.settings.limits import MAX_GRID_IMAGES, MAX_SIDE_PX
from tinysd_batch.settings.schema import IMAGE_SETTINGS
from tinysd_batch.storage.atomic import write_atomically

CELL_PX = 128
CAPTION_PX = 18
GAP_PX = 8
FONT_SIZES_PX = (11, 10, 9)  # the first in which a caption fits; one that fits in none is shortened
CONTACT_SHEET_FILE = "contact_sheet.png"
CAPTION_SETTINGS = {
    name: each for name, each in IMAGE_SETTINGS.items() if each.is_column and not each.value_type.is_text
}
CAPTION_COLUMNS = [*CAPTION_SETTINGS, "seed"]


@dataclass(frozen=True, slots=True)
class SheetImage:
    """An image of the sheet."""

    path: Path
    caption: str


def write_contact_sheet(job_folder: Path, n_rows: int = 0) -> Path | None:
    """Write `contact_sheet.png` with the job's first 100 images. Return its path, or None if there are no images."""
    table = ResultsTable(job_folder).read_newest(["row", "index", "status", "file_name", "prompt", *CAPTION_COLUMNS])
    rows = (row for batch in table.to_batches(MAX_GRID_IMAGES) for row in batch.to_pylist())
    saved = (row for row in rows if row["status"] == Status.OK and is_in_images_folder(row["file_name"]))
    first = list(islice(saved, MAX_GRID_IMAGES))
    images = [
        SheetImage(job_folder / row["file_name"], caption)
        for row, caption in zip(first, make_captions(first), strict=True)
    ]
    return write_grid([image for image in images if image.path.is_file()], job_folder / CONTACT_SHEET_FILE, n_rows)


def is_in_images_folder(file_name: str | None) -> bool:
    """Whether a file name from the table, which is untrusted, stays inside the job's `images` folder."""
    parts = PurePosixPath(file_name or "").parts
    return parts[:1] == ("images",) and ".." not in parts


def make_captions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return each image's prompt or, if all prompts are equal, the settings that differ."""
    if len({row["prompt"] for row in rows}) > 1:
        return [to_one_line(row["prompt"] or "", 200) for row in rows]
    values = [read_settings(row) for row in rows]
    shown = [name for name in CAPTION_SETTINGS if len({settings[name] for settings in values}) > 1]
    if not shown:
        return [format_seed(row["seed"]) for row in rows]
    return [", ".join(format_setting(name, settings[name]) for name in shown) for settings in values]


def read_settings(row: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a row; a table that is older than a setting has null for it."""
    return {name: setting.default if row[name] is None else row[name] for name, setting in CAPTION_SETTINGS.items()}


def format_seed(seed: int) -> str:
    """Return `seed 7`, or only the number if it has up to 19 digits and fills the cell."""
    return f"seed {seed}" if seed < 10**12 else f"{seed}"


def format_setting(name: str, value: Any) -> str:
    if name == "sampler" or value is None:
        return to_one_line(str(value))
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def write_grid(images: Sequence[SheetImage], path: Path, n_rows: int = 0) -> Path | None:
    """Write the images as one, in `n_rows` rows (0: chosen automatically). Return None if there are no images."""
    if not images:
        return None
    buffer = io.BytesIO()
    render_sheet(images, n_rows).save(buffer, "PNG")
    write_atomically(buffer.getvalue(), path)
    return path


def render_sheet(images: Sequence[SheetImage], n_rows: int = 0) -> Image.Image:
    columns = -(-len(images) // n_rows) if n_rows else choose_columns(len(images))
    rows = -(-len(images) // columns)
    width, height = CELL_PX + GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (columns * width + GAP_PX, rows * height + GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for number, sheet_image in enumerate(images):
        x, y = GAP_PX + number % columns * width, GAP_PX + number // columns * height
        try:
            with open_image(sheet_image.path) as image:
                if max(image.size) > MAX_SIDE_PX:
                    continue
                fitted = fit_to_cell(image.convert("RGB"))
        except OSError:
            continue  # the cell of a damaged image stays empty
        sheet.paste(fitted, (x + (CELL_PX - fitted.width) // 2, y + (CELL_PX - fitted.height) // 2))
        text, font = fit_caption(sheet_image.caption)
        draw.text((x + CELL_PX // 2, y + CELL_PX + CAPTION_PX // 2), text, "black", font, anchor="mm")
    return sheet


def choose_columns(n_images: int) -> int:
    """Choose the number of columns that makes the sheet a little wider than high."""
    return next(
        columns for columns in range(1, n_images + 1) if columns * columns * 2 >= n_images * 3 or columns == n_images
    )


def fit_to_cell(image: Image.Image) -> Image.Image:
    """Scale an image to the cell, keeping its aspect ratio."""
    scale = CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def fit_caption(caption: str) -> tuple[str, Font]:
    """Return as much of a caption as fits below a cell, and its font."""
    for size in FONT_SIZES_PX:
        font = choose_font(caption, size)
        if font.getlength(caption) <= CELL_PX:
            return caption, font
    font = choose_font(caption, FONT_SIZES_PX[0])
    return shorten_to_cell(caption, font), font


def shorten_to_cell(text: str, font: Font) -> str:
    while text and font.getlength(text + "…") > CELL_PX:
        text = text[:-1]
    return text.rstrip() + "…"
