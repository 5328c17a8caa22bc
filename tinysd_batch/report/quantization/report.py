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

from tinysd_batch.quantize.evaluate.compare import ModelComparison
from tinysd_batch.quantize.evaluate.fit_noise_correction import CorrectionEvaluation
from tinysd_batch.quantize.evaluate.samples import ImagePairs
from tinysd_batch.quantize.evaluate.sensitivity import ALL_LAYERS, LayerTypeSensitivity
from tinysd_batch.quantize.evaluate.summary import QuantizationSummary
from tinysd_batch.report.quantization.page import (
    DIFFERENCE_GAIN,
    MAX_SHOWN_PAIRS,
    describe_psnr,
    page,
)
from tinysd_batch.report.quantization.similarity import mean_ssim
from tinysd_batch.storage.atomic import write_atomically

REPORT_FOLDER = "report"
PAIR_CELL_PX = 128
PAIR_GAP_PX = 4


def write_report(
    out: Path,
    summary: QuantizationSummary,
    errors: ModelComparison | None,
    prompts: Sequence[str],
    harms: Sequence[LayerTypeSensitivity] | None = None,
) -> Path:
    """Write `report/` into a model folder; its page is returned. Without `errors` nothing was drawn to measure with."""
    folder = out / REPORT_FOLDER
    if errors is not None:
        write_atomically(encode_png(render_comparison_sheet(errors)), folder / "pictures.png")
    return write_content(folder, report_as_dict(summary, errors, prompts, harms))


def add_samples(page: Path, pairs: ImagePairs) -> str:
    """Add images by both models to a report that has none; what they look like is returned as a sentence."""
    folder = page.parent
    content: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    psnr = compute_median_psnr_db(pairs)
    content |= {"prompts": pairs.prompts, "median_picture_psnr_db": round(psnr, 2)}
    write_atomically(encode_png(render_comparison_sheet(pairs)), folder / "pictures.png")
    write_content(folder, content)
    return describe_psnr(content)


def update_measurements(folder: Path, errors: ModelComparison, harms: Sequence[LayerTypeSensitivity]) -> Path:
    """Replace what a report tells of held-out drawings; what was told while packing stays. Its page is returned."""
    content: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    content |= errors_as_dict(errors)
    content["sensitivity"] = sensitivity_as_dicts(harms, {one["name"]: one["bytes"] for one in content["classes"]})
    write_atomically(encode_png(render_comparison_sheet(errors)), folder / "pictures.png")
    return write_content(folder, content)


def write_content(folder: Path, content: Mapping[str, Any]) -> Path:
    write_atomically((json.dumps(content, indent=1) + "\n").encode(), folder / "report.json")
    write_atomically(page(content).encode(), folder / "index.html")
    return folder / "index.html"


def report_as_dict(
    summary: QuantizationSummary,
    errors: ModelComparison | None,
    prompts: Sequence[str],
    harms: Sequence[LayerTypeSensitivity] | None = None,
) -> dict[str, Any]:
    layers = [
        {"name": one.name, "class": one.layer_type, "weights": one.weights, "bits": one.bits, "bytes": one.bytes,
         "sqnr_db": None if one.sqnr_db is None else round(one.sqnr_db, 2)}
        for one in summary.layers
    ]  # fmt: skip
    sizes = {one.name: one.bytes for one in summary.layer_types}
    return {
        "name": summary.name, "level": summary.level, "size": summary.size, "unet_bytes": summary.unet_bytes,
        "seconds": round(summary.duration_s, 1), "peak_memory_bytes": summary.peak_memory_bytes,
        "device": summary.device, "recipe": summary.recipe,
        **({} if errors is None else errors_as_dict(errors)),
        "noise_correction": None if summary.noise_correction is None else correction_as_dict(summary.noise_correction),
        "prompts": list(prompts),
        "classes": [
            {"name": one.name, "weights": one.weights, "bytes": one.bytes, "bits": round(one.bits, 3)}
            for one in summary.layer_types
        ],
        "sensitivity": None if harms is None else sensitivity_as_dicts(harms, sizes),
        "layers_sqnr_db_of": "weights" if summary.level == "fast" else "outputs",
        "layers": layers,
    }  # fmt: skip


def errors_as_dict(errors: ModelComparison) -> dict[str, Any]:
    ssim = mean_ssim(errors.float_images, errors.packed_images)
    return {
        "noise_sqnr_db": round(errors.mean_noise_sqnr_db, 2), "final_latents_sqnr_db": round(errors.final_latents_sqnr_db, 2),
        "pictures_psnr_db": round(errors.psnr_db, 2), "median_picture_psnr_db": round(compute_median_psnr_db(errors), 2),
        "pictures_ssim": None if ssim is None else round(ssim, 4),
        "along_the_trajectory": [
            {"time": time, "noise_sqnr_db": round(noise, 2), "latents_sqnr_db": round(latents, 2)}
            for time, noise, latents in zip(errors.times, errors.noise_sqnr_db, errors.latents_sqnr_db, strict=True)
        ],
    }  # fmt: skip


def compute_median_psnr_db(errors: ModelComparison | ImagePairs) -> float:
    """Of the median picture: in the error of all together one that became another picture outweighs the rest."""
    wrong = np.square(errors.float_images - errors.packed_images).mean(axis=(1, 2, 3))
    return float(-10 * np.log10(max(1e-20, np.median(wrong))))


def correction_as_dict(judged: CorrectionEvaluation) -> dict[str, Any]:
    return {
        "kept": judged.is_improvement, "says": str(judged), "final_latents_sqnr_db_without": round(judged.sqnr_db_without, 2),
        "final_latents_sqnr_db_with": round(judged.sqnr_db_with, 2), **judged.correction.model_dump(),
    }  # fmt: skip


def sensitivity_as_dicts(harms: Sequence[LayerTypeSensitivity], bytes_of: Mapping[str, int]) -> list[dict[str, Any]]:
    """Worst first, with the sorts' bytes as shares of all packed layers'."""
    sizes = {sort: bytes_of[sort] for sort in bytes_of if sort in {harm.layer_type for harm in harms}}
    sizes[ALL_LAYERS] = sum(sizes.values())
    return [
        {"class": one.layer_type, "noise_sqnr_db": round(one.noise_sqnr_db, 2), "bytes": sizes[one.layer_type],
         "share_of_bytes": round(sizes[one.layer_type] / sizes[ALL_LAYERS], 4)}
        for one in harms
    ]  # fmt: skip


def render_comparison_sheet(errors: ModelComparison | ImagePairs) -> Image.Image:
    """A row for each of the first pictures: float, packed, difference; several rows side by side."""
    rows = [
        np.concatenate([render_cell(one) for one in (floats, packed, render_difference(floats, packed))], axis=1)
        for floats, packed in zip(
            errors.float_images[:MAX_SHOWN_PAIRS], errors.packed_images[:MAX_SHOWN_PAIRS], strict=True
        )
    ]
    rows += [np.ones_like(rows[0])] * (len(rows) % 2)
    lines = [np.concatenate([left, np.ones_like(left[:, : 4 * PAIR_GAP_PX]), right], axis=1)
             for left, right in zip(rows[::2], rows[1::2], strict=True)]  # fmt: skip
    return Image.fromarray((np.concatenate(lines) * 255).round().astype(np.uint8))


def render_difference(floats: npt.NDArray[np.float32], packed: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Grey where both agree."""
    shown: npt.NDArray[np.float32] = np.clip(0.5 + DIFFERENCE_GAIN / 2 * (packed - floats), 0, 1)
    return shown


def render_cell(picture: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A picture at the sheet's size, with a margin."""
    image = Image.fromarray((picture * 255).round().astype(np.uint8)).resize((PAIR_CELL_PX, PAIR_CELL_PX))
    pixels = np.asarray(image, dtype=np.float32) / 255
    return np.pad(pixels, ((0, PAIR_GAP_PX), (0, PAIR_GAP_PX), (0, 0)), constant_values=1)


def encode_png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


# The page
