"""Pictures as files: PNG, JPEG or WebP bytes with what made them written inside.

Two entries: `parameters`, as AUTOMATIC1111's web UI writes it and most viewers read it, and `tinysd`, our JSON. A PNG
holds both as text; JPEG and WebP hold them as EXIF UserComment, where others look for the first, and MakerNote.
"""

import io
import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from tinysd_batch.records import ImageRequest
from tinysd_batch.text import make_value_storable

METADATA_KEY = "tinysd"
PILLOW_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
END_MARKERS = {"png": b"IEND\xaeB`\x82", "jpg": b"\xff\xd9"}
PNG_COMPRESSION = 6
MAX_READABLE_PX = 8192  # a side; nobody's pictures of ours are larger
MAX_EXIF_BYTES = 65_000  # a JPEG's segment holds no more
COMMENT_ENCODINGS = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}
SAMPLER_LABELS = {  # as the web UI spells them
    "plms": "PLMS", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "dpm2": "DPM2",
    "dpm2_a": "DPM2 a", "lms": "LMS", "dpmpp_2m": "DPM++ 2M", "unipc": "UniPC",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileFormat:
    """How pictures are written."""

    name: str = "png"  # png, jpg or webp
    quality: int = 90  # of jpg and webp, 1 to 100
    with_metadata: bool = True


def format_webui_parameters(request: ImageRequest, model_name: str, model_digest: str, version: str) -> str:
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


def encode_image(image: Image.Image, kind: FileFormat, parameters: str, ours: dict[str, Any]) -> bytes:
    """The picture as a file's bytes."""
    parameters, ours = make_value_storable(parameters), make_value_storable(ours)
    options: dict[str, Any] = {"quality": kind.quality}
    if kind.name == "png":
        options = {"compress_level": PNG_COMPRESSION}
    if kind.with_metadata:
        options |= make_png_metadata(parameters, ours) if kind.name == "png" else make_exif_metadata(parameters, ours)
    buffer = io.BytesIO()
    image.save(buffer, PILLOW_FORMATS[kind.name], **options)
    return buffer.getvalue()


def make_png_metadata(parameters: str, ours: dict[str, Any]) -> dict[str, Any]:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters)
    text.add_itxt(METADATA_KEY, json.dumps(ours, sort_keys=True, ensure_ascii=False))
    return {"pnginfo": text}


def make_exif_metadata(parameters: str, ours: dict[str, Any]) -> dict[str, Any]:
    """Both entries as EXIF. Where prompts are too long for it, first `parameters` and then our prompts are left out."""
    for comment, entry in iterate_shortened_metadata(parameters, ours):
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif).update(
            {
                ExifTags.Base.UserComment: b"UNICODE\0" + comment.encode("utf-16-be", "replace"),
                ExifTags.Base.MakerNote: json.dumps({METADATA_KEY: entry}, sort_keys=True).encode("ascii"),
            }
        )
        data = exif.tobytes()
        if len(data) <= MAX_EXIF_BYTES:
            return {"exif": data}
    return {}


def iterate_shortened_metadata(parameters: str, ours: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield parameters, ours
    yield "", ours
    yield "", {name: value for name, value in ours.items() if name not in ("prompt", "negative_prompt")}


def is_complete_file(data: bytes, kind: str) -> bool:
    """Whether a file's last bytes are there, which Pillow does not ask for: a PNG's IEND, a JPEG's end mark."""
    if kind == "webp":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return data.endswith(END_MARKERS[kind])


@contextmanager
def open_image(file: Any, kinds: Collection[str] = tuple(PILLOW_FORMATS)) -> Iterator[Image.Image]:
    """A picture of these formats (png, jpg, webp) that anybody may have made. Raises OSError for whatever is wrong.

    Before its pixels are unpacked, `size` must be looked at.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=[PILLOW_FORMATS[kind] for kind in kinds]) as image:
                yield image
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - on malformed files Pillow raises whatever its parsers meet
        raise OSError(f"no whole picture: {error}") from None


def read_metadata(
    data: bytes, size: tuple[int, int] | None = None, kinds: Collection[str] = tuple(PILLOW_FORMATS)
) -> tuple[str, dict[str, Any]]:
    """`parameters` and our JSON; both empty where the file is not a whole picture, or not of `size` (width, height)."""
    try:
        with open_image(io.BytesIO(data), kinds) as image:
            if image.size != (size or image.size) or max(image.size) > MAX_READABLE_PX:
                return "", {}
            image.load()
            parameters, ours = extract_metadata(image)
            found = json.loads(ours)
    except OSError:
        return "", {}
    return parameters, found if isinstance(found, dict) else {}


def extract_metadata(image: Image.Image) -> tuple[str, str]:
    if image.format == "PNG":
        text = getattr(image, "text", {})
        return str(text.get("parameters", "")), str(text.get(METADATA_KEY, "{}"))
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    comment, note = exif.get(ExifTags.Base.UserComment, b""), exif.get(ExifTags.Base.MakerNote, b"")
    if not isinstance(comment, bytes) or not isinstance(note, bytes):
        return "", "{}"
    encoding = COMMENT_ENCODINGS.get(comment[:8])
    parameters = comment[8:].decode(encoding, "replace") if encoding else ""
    found = json.loads(note.decode("ascii", "replace") or "{}")
    return parameters, json.dumps(found.get(METADATA_KEY, {}) if isinstance(found, dict) else {})
