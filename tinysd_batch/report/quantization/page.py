"""Render the report on a packed model as an HTML page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tinysd_batch.report.quality_text import describe_quality
from tinysd_batch.report.quantization.similarity import INSTALL_HINT

MAX_SHOWN_PAIRS = 16
MAX_BAR_REM = 16
DIFFERENCE_GAIN = 3  # differences are amplified to be visible
NO_IMAGES_NOTE = "No image was generated to compare with the float model."
SAMPLES_NOTE = "Compared with the float model on {} images; <code>--recipe</code> measures more."
LAYER_SQNR_NOTES = {
    "outputs": "Error of each layer's output on held-out prompts, in the packed model, compared with the float model.",
    "weights": "Error of each layer's weights: without calibration data, its outputs were not measured.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th { text-align: left } th, td { padding: .15rem .8rem .15rem 0 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% }
.bar { display: inline-block; height: .7rem; background: #4a7bb5 } h1 { font-size: 1.5rem } h2 { font-size: 1.15rem }
"""


class HtmlMarkup(str):
    """Text that is HTML already and must not be escaped."""

    __slots__ = ()


def describe_psnr(content: Mapping[str, Any]) -> str:
    """Return `PSNR 30.9 dB: close to the float model's images, small details differ`."""
    psnr_db = content["median_picture_psnr_db"]
    return f"PSNR {psnr_db:.1f} dB: {describe_quality(psnr_db)}"


def render_page(content: Mapping[str, Any]) -> str:
    """Render the content of a `report.json`."""
    title = html.escape(f"{content['name']}: level {content['level']}, {content['size']}")
    layer_types = [
        (entry["name"], f"{entry['weights'] / 1e6:,.2f} M", f"{entry['bits']:.2f}", f"{entry['bytes']:,}")
        for entry in content["classes"]
    ]
    measured_layers = [layer for layer in content["layers"] if layer["sqnr_db"] is not None]
    layers = [
        (layer["name"], layer["class"], f"{layer['bits']}", f"{layer['sqnr_db']:.1f}")
        for layer in sorted(measured_layers, key=lambda layer: layer["sqnr_db"])
    ]
    has_comparison, has_images = "noise_sqnr_db" in content, "median_picture_psnr_db" in content
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{describe_measurement(content)}
Decibels are a signal-to-noise ratio: power of the float model's values over power of the difference. Larger is better;
10 dB more is a tenth of the error power.</p>
{render_table((), list_facts(content))}
{render_images_section(content) if has_images else ""}<h2>Bytes by layer type</h2>
{render_table(("layers", "weights", "bits each", "bytes"), layer_types)}
{render_sensitivity_section(content["sensitivity"]) if content["sensitivity"] else ""}\
{render_trajectory_section(content) if has_comparison else ""}<h2>Layers, worst first</h2>
<p>{LAYER_SQNR_NOTES[content["layers_sqnr_db_of"]]}</p>
{render_table(("layer", "type", "bits", "dB"), layers)}
</body></html>
"""


def describe_measurement(content: Mapping[str, Any]) -> str:
    if "noise_sqnr_db" in content:
        return f"Measured on {len(content['prompts'])} prompts and seeds that calibration did not use."
    return SAMPLES_NOTE.format(len(content["prompts"])) if "median_picture_psnr_db" in content else NO_IMAGES_NOTE


def list_facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the first table: label and value."""
    minutes, seconds = divmod(round(content["seconds"]), 60)
    facts = [("UNet on disk", f"{content['unet_bytes'] / 1e6:,.1f} MB")]
    if "noise_sqnr_db" in content:
        correction, ssim = content["noise_correction"], content["pictures_ssim"]
        facts += [
            ("guided noise prediction, mean over timesteps, not corrected", f"{content['noise_sqnr_db']:.2f} dB"),
            ("final latents", f"{content['final_latents_sqnr_db']:.2f} dB"),
            ("noise correction", correction["says"] if correction else "not measured"),
            ("images (PSNR)", f"{content['pictures_psnr_db']:.2f} dB"),
            ("median image (PSNR)", f"{content['median_picture_psnr_db']:.2f} dB"),
            ("images (SSIM, 1 is equal)", INSTALL_HINT if ssim is None else f"{ssim:.4f}"),
        ]
    elif "median_picture_psnr_db" in content:
        facts += [("median image (PSNR)", f"{content['median_picture_psnr_db']:.2f} dB")]
    return [
        *facts,
        ("time", f"{minutes}:{seconds:02} on {content['device']}"),
        ("peak memory, including mapped files", f"{content['peak_memory_bytes'] / 1e9:.2f} GB"),
    ]


def render_images_section(content: Mapping[str, Any]) -> str:
    return f"""<h2>Images</h2>
<p><strong>{html.escape(describe_psnr(content))}.</strong></p>
<p>Float, packed, and {DIFFERENCE_GAIN} times the difference (grey: none).</p>
<p><img src="pictures.png" alt="Images of held-out prompts by the float and by the packed model"></p>
<p>{html.escape("; ".join(content["prompts"][:MAX_SHOWN_PAIRS]))}</p>
"""


def render_sensitivity_section(sensitivities: Sequence[Mapping[str, Any]]) -> str:
    max_power = max(compute_error_power(entry) for entry in sensitivities)
    rows = [
        (
            entry["class"],
            f"{entry['noise_sqnr_db']:.1f}",
            f"{100 * entry['share_of_bytes']:.1f} %",
            render_bar(compute_error_power(entry) / max_power),
        )
        for entry in sensitivities
    ]
    return f"""<h2>Sensitivity by layer type</h2>
<p>Error of the guided noise prediction at some timesteps of held-out images, with the layers of one type packed and all
others as floats, worst first. A calibrated layer compensates errors of the layers before it, so by itself it may look
worse than it is.</p>
{render_table(("packed layers", "noise dB", "of the bytes", HtmlMarkup("error")), rows)}
"""


def compute_error_power(entry: Mapping[str, Any]) -> float:
    """Convert dB to the power of the error, relative to the signal."""
    return float(10 ** (-entry["noise_sqnr_db"] / 10))


def render_bar(fraction: float) -> HtmlMarkup:
    return HtmlMarkup(f'<span class="bar" style="width: {MAX_BAR_REM * fraction:.2f}rem"></span>')


def render_trajectory_section(content: Mapping[str, Any]) -> str:
    rows = [
        (f"{point['time']:.0f}", f"{point['noise_sqnr_db']:.1f}", f"{point['latents_sqnr_db']:.1f}")
        for point in content["along_the_trajectory"]
    ]
    return f"""<h2>Along the trajectory</h2>
<p>Noise: predicted at the float model's latents, not corrected. Latents: after the step, each model on its own
trajectory.</p>
{render_table(("timestep", "noise dB", "latents dB"), rows)}
"""


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a table. The first column is text, the others are numbers or `HtmlMarkup`."""
    head_cells = "".join(render_table_cell("th", column, text) for column, text in enumerate(head))
    body = "".join(
        "<tr>" + "".join(render_table_cell("td", column, text) for column, text in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    return f"<table><tr>{head_cells}</tr>\n{body}</table>"


def render_table_cell(tag: str, column: int, text: str) -> str:
    if isinstance(text, HtmlMarkup):
        return f"<{tag}>{text}</{tag}>"
    return f"<{tag}{number_class_attribute(column)}>{html.escape(text)}</{tag}>"


def number_class_attribute(column: int) -> str:
    return ' class="number"' if column else ""
