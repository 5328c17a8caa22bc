"""A contact sheet, or grid: pictures in one, each with a line below."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageDraw

from tinysd_batch.config import MAX_GRID_IMAGES, MAX_SIDE_PX
from tinysd_batch.images import open_image
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.records import Status
from tinysd_batch.report.fonts import Font, choose_font
from tinysd_batch.report.formatting import to_one_line
from tinysd_batch.storage.atomic import write_atomically

CELL_PX = 128
CAPTION_PX = 18
GAP_PX = 8
FONT_SIZES_PX = (11, 10, 9)  # the largest in which a caption fits; one that fits in none is cut
CONTACT_SHEET_FILE = "contact_sheet.png"
CAPTION_COLUMNS = ("sampler", "steps", "scale", "eta", "seed")


@dataclass(frozen=True, slots=True)
class SheetImage:
    """A picture of the sheet."""

    path: Path
    caption: str


def write_contact_sheet(job_folder: Path, n_rows: int = 0) -> Path | None:
    """Write `contact_sheet.png` with the job's first 100 pictures; None where there are none."""
    rows = ResultsTable(job_folder).read_newest(["row", "index", "status", "file_name", "prompt", *CAPTION_COLUMNS])
    batches = rows.to_batches(MAX_GRID_IMAGES)
    made = (row for batch in batches for row in batch.to_pylist() if row["status"] == Status.OK)
    first = list(islice((row for row in made if is_in_images_folder(row["file_name"])), MAX_GRID_IMAGES))
    shown = [
        SheetImage(job_folder / row["file_name"], text) for row, text in zip(first, make_captions(first), strict=True)
    ]
    return write_grid([one for one in shown if one.path.is_file()], job_folder / CONTACT_SHEET_FILE, n_rows)


def is_in_images_folder(file_name: str | None) -> bool:
    """Whether it lies where this job's pictures do; the table may have come from elsewhere."""
    parts = PurePosixPath(file_name or "").parts
    return parts[:1] == ("images",) and ".." not in parts


def make_captions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each picture's prompt, or where that is always the same, the settings that differ."""
    if len({row["prompt"] for row in rows}) > 1:
        return [to_one_line(row["prompt"] or "", 200) for row in rows]
    differ = [name for name in CAPTION_COLUMNS if len({row[name] for row in rows}) > 1]
    told = [name for name in differ if name != "seed"] or ["seed"]
    if told == ["seed"]:
        return [format_seed(row["seed"]) for row in rows]
    return [", ".join(format_setting(name, row[name]) for name in told) for row in rows]


def format_seed(seed: int) -> str:
    """A seed of up to 19 digits is as wide as a cell."""
    return f"seed {seed}" if seed < 10**12 else f"{seed}"


def format_setting(name: str, value: Any) -> str:
    if name == "sampler" or value is None:
        return to_one_line(str(value))
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def write_grid(shown: Sequence[SheetImage], path: Path, n_rows: int = 0) -> Path | None:
    """Write the pictures as one, in `n_rows` rows (0: as it fits best); None where there are none."""
    if not shown:
        return None
    buffer = io.BytesIO()
    render_sheet(shown, n_rows).save(buffer, "PNG")
    write_atomically(buffer.getvalue(), path)
    return path


def render_sheet(shown: Sequence[SheetImage], n_rows: int = 0) -> Image.Image:
    columns = -(-len(shown) // n_rows) if n_rows else choose_columns(len(shown))
    rows = -(-len(shown) // columns)
    width, height = CELL_PX + GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (columns * width + GAP_PX, rows * height + GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for number, one in enumerate(shown):
        x, y = GAP_PX + number % columns * width, GAP_PX + number // columns * height
        try:
            with open_image(one.path) as picture:
                if max(picture.size) > MAX_SIDE_PX:
                    continue
                fitted = fit_to_cell(picture.convert("RGB"))
        except OSError:
            continue  # a damaged picture leaves its cell empty; the job is done all the same
        sheet.paste(fitted, (x + (CELL_PX - fitted.width) // 2, y + (CELL_PX - fitted.height) // 2))
        text, font = fit_caption(one.caption)
        draw.text((x + CELL_PX // 2, y + CELL_PX + CAPTION_PX // 2), text, "black", font, anchor="mm")
    return sheet


def choose_columns(pictures: int) -> int:
    """A little wider than high."""
    return next(
        columns for columns in range(1, pictures + 1) if columns * columns * 2 >= pictures * 3 or columns == pictures
    )


def fit_to_cell(picture: Image.Image) -> Image.Image:
    """Scaled to the cell, keeping the ratio of its sides."""
    scale = CELL_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def fit_caption(caption: str) -> tuple[str, Font]:
    """As much of it as fits under a cell, and the font for it."""
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
