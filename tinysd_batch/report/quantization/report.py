"""Write the report on a packed model: `report.json` for programs, `index.html` for people.

If images were generated, it also has `pictures.png`, which compares them with the float model's.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinysd_batch.quantize.evaluate.compare import ModelComparison
from tinysd_batch.quantize.evaluate.fit_noise_correction import CorrectionEvaluation
from tinysd_batch.quantize.evaluate.samples import ImagePairs
from tinysd_batch.quantize.evaluate.sensitivity import ALL_LAYERS, LayerTypeSensitivity
from tinysd_batch.quantize.evaluate.summary import QuantizationSummary
from tinysd_batch.report.quantization.page import DIFFERENCE_GAIN, MAX_SHOWN_PAIRS, describe_psnr, render_page
from tinysd_batch.report.quantization.similarity import ImageArray, mean_ssim
from tinysd_batch.storage.atomic import write_atomically

REPORT_FOLDER = "report"
PAIR_CELL_PX = 128
PAIR_GAP_PX = 4


def write_report(
    out: Path,
    summary: QuantizationSummary,
    comparison: ModelComparison | None,
    prompts: Sequence[str],
    sensitivities: Sequence[LayerTypeSensitivity] | None = None,
) -> Path:
    """Write `report/` into a model folder.

    Args:
        out: The model folder.
        summary: Describes the packed model.
        comparison: Images and errors; None if no images were generated.
        prompts: The prompts of the images.
        sensitivities: The error that each layer type causes by itself.

    Returns:
        The path of the HTML page.
    """
    folder = out / REPORT_FOLDER
    if comparison is not None:
        write_atomically(encode_png(render_comparison_sheet(comparison)), folder / "pictures.png")
    return write_content(folder, report_as_dict(summary, comparison, prompts, sensitivities))


def add_samples(page: Path, pairs: ImagePairs) -> str:
    """Add images of both models to a report without images. Return a sentence about their quality."""
    folder = page.parent
    content: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    content |= {"prompts": pairs.prompts, "median_picture_psnr_db": round(compute_median_psnr_db(pairs), 2)}
    write_atomically(encode_png(render_comparison_sheet(pairs)), folder / "pictures.png")
    write_content(folder, content)
    return describe_psnr(content)


def update_measurements(
    folder: Path, comparison: ModelComparison, sensitivities: Sequence[LayerTypeSensitivity]
) -> Path:
    """Replace the measurements on held-out images in an existing report, and return the path of its page."""
    content: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    content |= comparison_as_dict(comparison)
    bytes_by_type = {entry["name"]: entry["bytes"] for entry in content["classes"]}
    content["sensitivity"] = sensitivity_as_dicts(sensitivities, bytes_by_type)
    write_atomically(encode_png(render_comparison_sheet(comparison)), folder / "pictures.png")
    return write_content(folder, content)


def write_content(folder: Path, content: Mapping[str, Any]) -> Path:
    write_atomically((json.dumps(content, indent=1) + "\n").encode(), folder / "report.json")
    write_atomically(render_page(content).encode(), folder / "index.html")
    return folder / "index.html"


def report_as_dict(
    summary: QuantizationSummary,
    comparison: ModelComparison | None,
    prompts: Sequence[str],
    sensitivities: Sequence[LayerTypeSensitivity] | None = None,
) -> dict[str, Any]:
    """Return the content of `report.json`, whose keys do not change between versions."""
    correction = summary.noise_correction
    bytes_by_type = {layer_type.name: layer_type.bytes for layer_type in summary.layer_types}
    return {
        "name": summary.name,
        "level": summary.level,
        "size": summary.size,
        "unet_bytes": summary.unet_bytes,
        "seconds": round(summary.duration_s, 1),
        "peak_memory_bytes": summary.peak_memory_bytes,
        "device": summary.device,
        "recipe": summary.recipe,
        **({} if comparison is None else comparison_as_dict(comparison)),
        "noise_correction": None if correction is None else correction_as_dict(correction),
        "prompts": list(prompts),
        "classes": [
            {
                "name": layer_type.name,
                "weights": layer_type.weights,
                "bytes": layer_type.bytes,
                "bits": round(layer_type.bits, 3),
            }
            for layer_type in summary.layer_types
        ],
        "sensitivity": None if sensitivities is None else sensitivity_as_dicts(sensitivities, bytes_by_type),
        "layers_sqnr_db_of": "weights" if summary.level == "fast" else "outputs",
        "layers": [
            {
                "name": layer.name,
                "class": layer.layer_type,
                "weights": layer.weights,
                "bits": layer.bits,
                "bytes": layer.bytes,
                "sqnr_db": None if layer.sqnr_db is None else round(layer.sqnr_db, 2),
            }
            for layer in summary.layers
        ],
    }


def comparison_as_dict(comparison: ModelComparison) -> dict[str, Any]:
    ssim = mean_ssim(comparison.float_images, comparison.packed_images)
    trajectory = zip(comparison.times, comparison.noise_sqnr_db, comparison.latents_sqnr_db, strict=True)
    return {
        "noise_sqnr_db": round(comparison.mean_noise_sqnr_db, 2),
        "final_latents_sqnr_db": round(comparison.final_latents_sqnr_db, 2),
        "pictures_psnr_db": round(comparison.psnr_db, 2),
        "median_picture_psnr_db": round(compute_median_psnr_db(comparison), 2),
        "pictures_ssim": None if ssim is None else round(ssim, 4),
        "along_the_trajectory": [
            {"time": timestep, "noise_sqnr_db": round(noise, 2), "latents_sqnr_db": round(latents, 2)}
            for timestep, noise, latents in trajectory
        ],
    }


def compute_median_psnr_db(images: ModelComparison | ImagePairs) -> float:
    """Compute the PSNR of the median image. In a mean error, one completely different image would outweigh the rest."""
    errors = np.square(images.float_images - images.packed_images).mean(axis=(1, 2, 3))
    return float(-10 * np.log10(max(1e-20, np.median(errors))))


def correction_as_dict(evaluation: CorrectionEvaluation) -> dict[str, Any]:
    return {
        "kept": evaluation.is_improvement,
        "says": str(evaluation),
        "final_latents_sqnr_db_without": round(evaluation.sqnr_db_without, 2),
        "final_latents_sqnr_db_with": round(evaluation.sqnr_db_with, 2),
        **evaluation.correction.model_dump(),
    }


def sensitivity_as_dicts(
    sensitivities: Sequence[LayerTypeSensitivity], bytes_by_type: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the entries in order (worst first), with each type's share of the bytes of all packed layers."""
    packed_types = {sensitivity.layer_type for sensitivity in sensitivities}
    sizes = {layer_type: n_bytes for layer_type, n_bytes in bytes_by_type.items() if layer_type in packed_types}
    sizes[ALL_LAYERS] = sum(sizes.values())
    return [
        {
            "class": sensitivity.layer_type,
            "noise_sqnr_db": round(sensitivity.noise_sqnr_db, 2),
            "bytes": sizes[sensitivity.layer_type],
            "share_of_bytes": round(sizes[sensitivity.layer_type] / sizes[ALL_LAYERS], 4),
        }
        for sensitivity in sensitivities
    ]


def render_comparison_sheet(images: ModelComparison | ImagePairs) -> Image.Image:
    """Render the first images, each as float, packed and difference, in two columns."""
    pairs = zip(images.float_images[:MAX_SHOWN_PAIRS], images.packed_images[:MAX_SHOWN_PAIRS], strict=True)
    rows = [
        np.concatenate(
            [render_cell(image) for image in (float_image, packed_image, render_difference(float_image, packed_image))],
            axis=1,
        )
        for float_image, packed_image in pairs
    ]
    rows += [np.ones_like(rows[0])] * (len(rows) % 2)
    lines = [
        np.concatenate([left, np.ones_like(left[:, : 4 * PAIR_GAP_PX]), right], axis=1)
        for left, right in zip(rows[::2], rows[1::2], strict=True)
    ]
    return Image.fromarray((np.concatenate(lines) * 255).round().astype(np.uint8))


def render_difference(float_image: ImageArray, packed_image: ImageArray) -> ImageArray:
    """Return the amplified difference [H, W, 3]; grey where both agree."""
    difference: ImageArray = np.clip(0.5 + DIFFERENCE_GAIN / 2 * (packed_image - float_image), 0, 1)
    return difference


def render_cell(image: ImageArray) -> ImageArray:
    """Scale an image [H, W, 3] to the sheet's cell, and add a margin."""
    bitmap = Image.fromarray((image * 255).round().astype(np.uint8)).resize((PAIR_CELL_PX, PAIR_CELL_PX))
    pixels = np.asarray(bitmap, dtype=np.float32) / 255
    return np.pad(pixels, ((0, PAIR_GAP_PX), (0, PAIR_GAP_PX), (0, 0)), constant_values=1)


def encode_png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
