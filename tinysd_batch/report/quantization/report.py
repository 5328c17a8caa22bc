"""The report on a packed model: `report.json` for machines, `index.html` to look at.

Where the float model drew held-out prompts, with `pictures.png` and errors of what the packed one makes of them.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tinysd_batch.quantize.evaluate.compare import Errors
from tinysd_batch.quantize.evaluate.fit_noise_correction import Judged
from tinysd_batch.quantize.evaluate.samples import Pairs
from tinysd_batch.quantize.evaluate.sensitivity import EVERYTHING, Harm
from tinysd_batch.quantize.evaluate.summary import Summary
from tinysd_batch.report.quantization.page import (
    DIFFERENCE_GAIN,
    MOST_SHOWN,
    judgement,
    page,
)
from tinysd_batch.report.quantization.similarity import mean_ssim
from tinysd_batch.storage.atomic import write_atomically

FOLDER = "report"
CELL_PX = 128
GAP_PX = 4


def write_report(
    out: Path, summary: Summary, errors: Errors | None, prompts: Sequence[str], harms: Sequence[Harm] | None = None
) -> Path:
    """Write `report/` into a model folder; its page is returned. Without `errors` nothing was drawn to measure with."""
    folder = out / FOLDER
    if errors is not None:
        write_atomically(png_of(picture_sheet(errors)), folder / "pictures.png")
    return write_content(folder, as_dict(summary, errors, prompts, harms))


def add_samples(page: Path, pairs: Pairs) -> str:
    """Add images by both models to a report that has none; what they look like is returned as a sentence."""
    folder = page.parent
    content: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    psnr = median_psnr_db(pairs)
    content |= {"prompts": pairs.prompts, "median_picture_psnr_db": round(psnr, 2)}
    write_atomically(png_of(picture_sheet(pairs)), folder / "pictures.png")
    write_content(folder, content)
    return judgement(content)


def measure_anew(folder: Path, errors: Errors, harms: Sequence[Harm]) -> Path:
    """Replace what a report tells of held-out drawings; what was told while packing stays. Its page is returned."""
    content: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    content |= errors_as_dict(errors)
    content["sensitivity"] = harms_as_dicts(harms, {one["name"]: one["bytes"] for one in content["classes"]})
    write_atomically(png_of(picture_sheet(errors)), folder / "pictures.png")
    return write_content(folder, content)


def write_content(folder: Path, content: Mapping[str, Any]) -> Path:
    write_atomically((json.dumps(content, indent=1) + "\n").encode(), folder / "report.json")
    write_atomically(page(content).encode(), folder / "index.html")
    return folder / "index.html"


def as_dict(
    summary: Summary, errors: Errors | None, prompts: Sequence[str], harms: Sequence[Harm] | None = None
) -> dict[str, Any]:
    layers = [
        {"name": one.name, "class": one.kind, "weights": one.weights, "bits": one.bits, "bytes": one.bytes,
         "sqnr_db": None if one.sqnr_db is None else round(one.sqnr_db, 2)}
        for one in summary.layers
    ]  # fmt: skip
    sizes = {one.name: one.bytes for one in summary.classes}
    return {
        "name": summary.name, "level": summary.level, "size": summary.size, "unet_bytes": summary.unet_bytes,
        "seconds": round(summary.seconds, 1), "peak_memory_bytes": summary.peak_memory_bytes,
        "device": summary.device, "recipe": summary.recipe,
        **({} if errors is None else errors_as_dict(errors)),
        "noise_correction": None if summary.judged is None else correction_as_dict(summary.judged),
        "prompts": list(prompts),
        "classes": [
            {"name": one.name, "weights": one.weights, "bytes": one.bytes, "bits": round(one.bits, 3)}
            for one in summary.classes
        ],
        "sensitivity": None if harms is None else harms_as_dicts(harms, sizes),
        "layers_sqnr_db_of": "weights" if summary.level == "fast" else "outputs",
        "layers": layers,
    }  # fmt: skip


def errors_as_dict(errors: Errors) -> dict[str, Any]:
    ssim = mean_ssim(errors.floats, errors.packed)
    return {
        "noise_sqnr_db": round(errors.mean_noise_db, 2), "final_latents_sqnr_db": round(errors.final_db, 2),
        "pictures_psnr_db": round(errors.psnr_db, 2), "median_picture_psnr_db": round(median_psnr_db(errors), 2),
        "pictures_ssim": None if ssim is None else round(ssim, 4),
        "along_the_trajectory": [
            {"time": time, "noise_sqnr_db": round(noise, 2), "latents_sqnr_db": round(latents, 2)}
            for time, noise, latents in zip(errors.times, errors.noise_db, errors.latents_db, strict=True)
        ],
    }  # fmt: skip


def median_psnr_db(errors: Errors | Pairs) -> float:
    """Of the median picture: in the error of all together one that became another picture outweighs the rest."""
    wrong = np.square(errors.floats - errors.packed).mean(axis=(1, 2, 3))
    return float(-10 * np.log10(max(1e-20, np.median(wrong))))


def correction_as_dict(judged: Judged) -> dict[str, Any]:
    return {
        "kept": judged.helps, "says": str(judged), "final_latents_sqnr_db_without": round(judged.without_db, 2),
        "final_latents_sqnr_db_with": round(judged.with_db, 2), **judged.correction.model_dump(),
    }  # fmt: skip


def harms_as_dicts(harms: Sequence[Harm], bytes_of: Mapping[str, int]) -> list[dict[str, Any]]:
    """Worst first, with the sorts' bytes as shares of all packed layers'."""
    sizes = {sort: bytes_of[sort] for sort in bytes_of if sort in {harm.sort for harm in harms}}
    sizes[EVERYTHING] = sum(sizes.values())
    return [
        {"class": one.sort, "noise_sqnr_db": round(one.noise_db, 2), "bytes": sizes[one.sort],
         "share_of_bytes": round(sizes[one.sort] / sizes[EVERYTHING], 4)}
        for one in harms
    ]  # fmt: skip


def picture_sheet(errors: Errors | Pairs) -> Image.Image:
    """A row for each of the first pictures: float, packed, difference; several rows side by side."""
    rows = [
        np.concatenate([cell(one) for one in (floats, packed, difference(floats, packed))], axis=1)
        for floats, packed in zip(errors.floats[:MOST_SHOWN], errors.packed[:MOST_SHOWN], strict=True)
    ]
    rows += [np.ones_like(rows[0])] * (len(rows) % 2)
    lines = [np.concatenate([left, np.ones_like(left[:, : 4 * GAP_PX]), right], axis=1)
             for left, right in zip(rows[::2], rows[1::2], strict=True)]  # fmt: skip
    return Image.fromarray((np.concatenate(lines) * 255).round().astype(np.uint8))


def difference(floats: npt.NDArray[np.float32], packed: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Grey where both agree."""
    shown: npt.NDArray[np.float32] = np.clip(0.5 + DIFFERENCE_GAIN / 2 * (packed - floats), 0, 1)
    return shown


def cell(picture: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A picture at the sheet's size, with a margin."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).resize((CELL_PX, CELL_PX))
    pixels = np.asarray(image, dtype=np.float32) / 255
    return np.pad(pixels, ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=1)


def png_of(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


# The page
