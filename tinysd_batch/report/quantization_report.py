"""The report on a packed model: `report.json` for machines, `index.html` to look at.

Where the float model drew held-out prompts, with `pictures.png` and errors of what the packed one makes of them.
"""

import html
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
from tinysd_batch.report.judgement import judge
from tinysd_batch.report.similarity import HOW_TO_GET, mean_ssim
from tinysd_batch.storage.atomic import write_atomically

FOLDER = "report"
MOST_SHOWN = 16
CELL_PX = 128
BAR_REM = 16  # the longest
GAP_PX = 4
DIFFERENCE_GAIN = 3  # differences are shown so many times as large
NOT_GENERATED = "No image was generated to compare with the float model."
ONLY_SAMPLES = "Compared with the float model on {} images; <code>--recipe</code> measures more."
LAYERS_OF = {
    "outputs": "Of each layer's output on held-out prompts, in the packed model, against the float model's.",
    "weights": "Of each layer's weights: packed without data, nothing is known of its outputs.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th { text-align: left } th, td { padding: .15rem .8rem .15rem 0 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% }
.bar { display: inline-block; height: .7rem; background: #4a7bb5 } h1 { font-size: 1.5rem } h2 { font-size: 1.15rem }
"""


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


def judgement(content: Mapping[str, Any]) -> str:
    """`PSNR 30.9 dB: close to the float model's images, small details differ`"""
    psnr = content["median_picture_psnr_db"]
    return f"PSNR {psnr:.1f} dB: {judge(psnr)}"


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


def page(content: Mapping[str, Any]) -> str:
    title = html.escape(f"{content['name']}: level {content['level']}, {content['size']}")
    classes = [
        (one["name"], f"{one['weights'] / 1e6:,.2f} M", f"{one['bits']:.2f}", f"{one['bytes']:,}")
        for one in content["classes"]
    ]
    worst = sorted((one for one in content["layers"] if one["sqnr_db"] is not None), key=lambda one: one["sqnr_db"])
    layers = [(one["name"], one["class"], f"{one['bits']}", f"{one['sqnr_db']:.1f}") for one in worst]
    measured, compared = "noise_sqnr_db" in content, "median_picture_psnr_db" in content
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{how_measured(content)}
Decibels are signal to noise: power of what is wanted over power of the difference; larger is better, 10 more is a tenth
of the error.</p>
{table((), facts(content))}
{pictures(content) if compared else ""}<h2>Bytes by sort of layer</h2>
{table(("layers", "weights", "bits each", "bytes"), classes)}
{sensitivity(content["sensitivity"]) if content["sensitivity"] else ""}\
{along_the_trajectory(content) if measured else ""}<h2>Layers, worst first</h2>
<p>{LAYERS_OF[content["layers_sqnr_db_of"]]}</p>
{table(("layer", "sort", "bits", "dB"), layers)}
</body></html>
"""


def how_measured(content: Mapping[str, Any]) -> str:
    if "noise_sqnr_db" in content:
        return f"Measured on {len(content['prompts'])} prompts and seeds that calibration never saw."
    return ONLY_SAMPLES.format(len(content["prompts"])) if "median_picture_psnr_db" in content else NOT_GENERATED


def facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    minutes, seconds = divmod(round(content["seconds"]), 60)
    found = [("UNet on disk", f"{content['unet_bytes'] / 1e6:,.1f} MB")]
    if "noise_sqnr_db" in content:
        correction, ssim = content["noise_correction"], content["pictures_ssim"]
        found += [
            ("guided noise prediction, mean over times, not corrected", f"{content['noise_sqnr_db']:.2f} dB"),
            ("final latents", f"{content['final_latents_sqnr_db']:.2f} dB"),
            ("noise correction", correction["says"] if correction else "not measured"),
            ("pictures (PSNR)", f"{content['pictures_psnr_db']:.2f} dB"),
            ("the median picture (PSNR)", f"{content['median_picture_psnr_db']:.2f} dB"),
            (
                "pictures (SSIM, 1 is equal)",
                HOW_TO_GET if ssim is None else f"{ssim:.4f}",
            ),
        ]
    elif "median_picture_psnr_db" in content:
        found += [("the median picture (PSNR)", f"{content['median_picture_psnr_db']:.2f} dB")]
    return [
        *found,
        ("time", f"{minutes}:{seconds:02} on {content['device']}"),
        ("peak memory, with mapped files", f"{content['peak_memory_bytes'] / 1e9:.2f} GB"),
    ]


def pictures(content: Mapping[str, Any]) -> str:
    return f"""<h2>Pictures</h2>
<p><strong>{html.escape(judgement(content))}.</strong></p>
<p>Float, packed, and {DIFFERENCE_GAIN} times the difference (grey: none).</p>
<p><img src="pictures.png" alt="Held-out prompts drawn by the float and by the packed model"></p>
<p>{html.escape("; ".join(content["prompts"][:MOST_SHOWN]))}</p>
"""


def sensitivity(harms: Sequence[Mapping[str, Any]]) -> str:
    most = max(power_of_error(one) for one in harms)
    rows = [
        (one["class"], f"{one['noise_sqnr_db']:.1f}", f"{100 * one['share_of_bytes']:.1f} %",
         bar(power_of_error(one) / most))
        for one in harms
    ]  # fmt: skip
    return f"""<h2>What each sort of layer harms alone</h2>
<p>The guided noise prediction at some points of held-out drawings, with the layers of one sort packed and all others as
floats, worst first. A calibrated layer makes up for errors of those before it: alone it may look worse than it is.</p>
{table(("packed layers", "noise dB", "of the bytes", Markup("error")), rows)}
"""


def power_of_error(harm: Mapping[str, Any]) -> float:
    return float(10 ** (-harm["noise_sqnr_db"] / 10))


class Markup(str):
    """Words that are HTML already."""

    __slots__ = ()


def bar(share: float) -> Markup:
    return Markup(f'<span class="bar" style="width: {BAR_REM * share:.2f}rem"></span>')


def along_the_trajectory(content: Mapping[str, Any]) -> str:
    rows = [
        (f"{one['time']:.0f}", f"{one['noise_sqnr_db']:.1f}", f"{one['latents_sqnr_db']:.1f}")
        for one in content["along_the_trajectory"]
    ]
    return f"""<h2>Along the trajectory</h2>
<p>Noise: predicted where the float model went, not corrected. Latents: after the step, each model on its own way.</p>
{table(("time", "noise dB", "latents dB"), rows)}
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is words, the others are numbers, or markup."""
    top = "".join(cell_of("th", at, name) for at, name in enumerate(head))
    body = "".join("<tr>" + "".join(cell_of("td", at, text) for at, text in enumerate(row)) + "</tr>\n" for row in rows)
    return f"<table><tr>{top}</tr>\n{body}</table>"


def cell_of(tag: str, column: int, text: str) -> str:
    if isinstance(text, Markup):
        return f"<{tag}>{text}</{tag}>"
    return f"<{tag}{number_class(column)}>{html.escape(text)}</{tag}>"


def number_class(column: int) -> str:
    return ' class="number"' if column else ""
