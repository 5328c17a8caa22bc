"""The report on a packed model as an HTML page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tinysd_batch.report.quality_text import describe_quality
from tinysd_batch.report.quantization.similarity import INSTALL_HINT

MAX_SHOWN_PAIRS = 16


DIFFERENCE_GAIN = 3  # differences are shown so many times as large


def describe_psnr(content: Mapping[str, Any]) -> str:
    """`PSNR 30.9 dB: close to the float model's images, small details differ`"""
    psnr = content["median_picture_psnr_db"]
    return f"PSNR {psnr:.1f} dB: {describe_quality(psnr)}"


MAX_BAR_REM = 16  # the longest

NO_IMAGES_NOTE = "No image was generated to compare with the float model."

SAMPLES_NOTE = "Compared with the float model on {} images; <code>--recipe</code> measures more."

LAYER_SQNR_NOTES = {
    "outputs": "Of each layer's output on held-out prompts, in the packed model, against the float model's.",
    "weights": "Of each layer's weights: packed without data, nothing is known of its outputs.",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th { text-align: left } th, td { padding: .15rem .8rem .15rem 0 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% }
.bar { display: inline-block; height: .7rem; background: #4a7bb5 } h1 { font-size: 1.5rem } h2 { font-size: 1.15rem }
"""


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
<p>{describe_measurement(content)}
Decibels are signal to noise: power of what is wanted over power of the difference; larger is better, 10 more is a tenth
of the error.</p>
{render_table((), list_facts(content))}
{render_images_section(content) if compared else ""}<h2>Bytes by sort of layer</h2>
{render_table(("layers", "weights", "bits each", "bytes"), classes)}
{render_sensitivity_section(content["sensitivity"]) if content["sensitivity"] else ""}\
{render_trajectory_section(content) if measured else ""}<h2>Layers, worst first</h2>
<p>{LAYER_SQNR_NOTES[content["layers_sqnr_db_of"]]}</p>
{render_table(("layer", "sort", "bits", "dB"), layers)}
</body></html>
"""


def describe_measurement(content: Mapping[str, Any]) -> str:
    if "noise_sqnr_db" in content:
        return f"Measured on {len(content['prompts'])} prompts and seeds that calibration never saw."
    return SAMPLES_NOTE.format(len(content["prompts"])) if "median_picture_psnr_db" in content else NO_IMAGES_NOTE


def list_facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
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
                INSTALL_HINT if ssim is None else f"{ssim:.4f}",
            ),
        ]
    elif "median_picture_psnr_db" in content:
        found += [("the median picture (PSNR)", f"{content['median_picture_psnr_db']:.2f} dB")]
    return [
        *found,
        ("time", f"{minutes}:{seconds:02} on {content['device']}"),
        ("peak memory, with mapped files", f"{content['peak_memory_bytes'] / 1e9:.2f} GB"),
    ]


def render_images_section(content: Mapping[str, Any]) -> str:
    return f"""<h2>Pictures</h2>
<p><strong>{html.escape(describe_psnr(content))}.</strong></p>
<p>Float, packed, and {DIFFERENCE_GAIN} times the difference (grey: none).</p>
<p><img src="pictures.png" alt="Held-out prompts drawn by the float and by the packed model"></p>
<p>{html.escape("; ".join(content["prompts"][:MAX_SHOWN_PAIRS]))}</p>
"""


def render_sensitivity_section(harms: Sequence[Mapping[str, Any]]) -> str:
    most = max(compute_error_power(one) for one in harms)
    rows = [
        (one["class"], f"{one['noise_sqnr_db']:.1f}", f"{100 * one['share_of_bytes']:.1f} %",
         render_bar(compute_error_power(one) / most))
        for one in harms
    ]  # fmt: skip
    return f"""<h2>What each sort of layer harms alone</h2>
<p>The guided noise prediction at some points of held-out drawings, with the layers of one sort packed and all others as
floats, worst first. A calibrated layer makes up for errors of those before it: alone it may look worse than it is.</p>
{render_table(("packed layers", "noise dB", "of the bytes", HtmlMarkup("error")), rows)}
"""


def compute_error_power(harm: Mapping[str, Any]) -> float:
    return float(10 ** (-harm["noise_sqnr_db"] / 10))


class HtmlMarkup(str):
    """Words that are HTML already."""

    __slots__ = ()


def render_bar(share: float) -> HtmlMarkup:
    return HtmlMarkup(f'<span class="bar" style="width: {MAX_BAR_REM * share:.2f}rem"></span>')


def render_trajectory_section(content: Mapping[str, Any]) -> str:
    rows = [
        (f"{one['time']:.0f}", f"{one['noise_sqnr_db']:.1f}", f"{one['latents_sqnr_db']:.1f}")
        for one in content["along_the_trajectory"]
    ]
    return f"""<h2>Along the trajectory</h2>
<p>Noise: predicted where the float model went, not corrected. Latents: after the step, each model on its own way.</p>
{render_table(("time", "noise dB", "latents dB"), rows)}
"""


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is words, the others are numbers, or markup."""
    top = "".join(render_table_cell("th", at, name) for at, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(render_table_cell("td", at, text) for at, text in enumerate(row)) + "</tr>\n" for row in rows
    )
    return f"<table><tr>{top}</tr>\n{body}</table>"


def render_table_cell(tag: str, column: int, text: str) -> str:
    if isinstance(text, HtmlMarkup):
        return f"<{tag}>{text}</{tag}>"
    return f"<{tag}{number_class_attribute(column)}>{html.escape(text)}</{tag}>"


def number_class_attribute(column: int) -> str:
    return ' class="number"' if column else ""
