"""Pictures as files: PNG bytes with what made them written inside.

Two text entries: `parameters`, as AUTOMATIC1111's web UI writes it and most viewers read it, and `tinysd`, our JSON.
"""

import io
import json
from typing import Any

from PIL import Image, PngImagePlugin

from tinysd_batch.records import ImageRequest

OUR_KEY = "tinysd"
SAMPLER_LABELS = {  # as the web UI spells them
    "plms": "PLMS", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "dpm2": "DPM2",
    "dpm2_a": "DPM2 a", "lms": "LMS", "dpmpp_2m": "DPM++ 2M", "unipc": "UniPC",
}  # fmt: skip


def parameters_text(request: ImageRequest, model_name: str, model_digest: str, version: str) -> str:
    """The `parameters` entry: prompt, negative prompt, then one line of settings."""
    params = request.params
    settings = {
        "Steps": params.steps,
        "Sampler": SAMPLER_LABELS[params.sampler],
        "CFG scale": request.scale,
        "Seed": request.seed,
        "Size": f"{params.width}x{params.height}",
        "Model hash": model_digest[:10],
        "Model": json.dumps(model_name) if any(mark in model_name for mark in ",:\n") else model_name,
        "RNG": "CPU",
        "Version": f"tinysd-batch {version}",
    }
    if params.eta:
        settings["Eta"] = params.eta
    lines = [request.prompt.replace("\n", " ")]
    if request.negative_prompt:
        lines.append("Negative prompt: " + request.negative_prompt.replace("\n", " "))
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def encode_png(image: Image.Image, parameters: str, ours: dict[str, Any]) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters)
    text.add_itxt(OUR_KEY, json.dumps(ours, sort_keys=True, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text, compress_level=6)
    return buffer.getvalue()


def read_metadata(data: bytes) -> dict[str, Any]:
    """Our JSON out of a PNG's bytes; empty where there is none or the file is not a whole picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            found = json.loads(getattr(image, "text", {}).get(OUR_KEY, "{}"))
    except (OSError, SyntaxError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
