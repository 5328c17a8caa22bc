"""Encode images as PNG, JPEG or WebP files with their settings stored inside, and read them back.

Each file has two metadata entries: `parameters`, in the format of AUTOMATIC1111's web UI, which most viewers read, and
`tinysd`, our JSON. A PNG stores both as text chunks. JPEG and WebP store `parameters` as EXIF UserComment, where other
programs look for it, and our JSON as EXIF MakerNote.
"""

import io
import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from tinysd_batch.records import ImageRequest
from tinysd_batch.settings.schema import IMAGE_SETTINGS
from tinysd_batch.text import make_value_storable

METADATA_KEY = "tinysd"
PILLOW_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
END_MARKERS = {"png": b"IEND\xaeB`\x82", "jpg": b"\xff\xd9"}
PNG_COMPRESSION = 6
MAX_READABLE_PX = 8192  # per side; our images are never larger
MAX_EXIF_BYTES = 65_000  # limit of a JPEG segment
COMMENT_ENCODINGS = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}
SAMPLER_LABELS = {  # as in the web UI
    "plms": "PLMS", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "dpm2": "DPM2",
    "dpm2_a": "DPM2 a", "lms": "LMS", "dpmpp_2m": "DPM++ 2M", "unipc": "UniPC",
}  # fmt: skip
RNG_LABELS = {"cpu": "CPU", "cuda": "NV"}  # as in the web UI: the noise of a CPU, of an NVIDIA GPU


@dataclass(frozen=True, slots=True)
class FileFormat:
    """How images are written."""

    name: str = "png"  # png, jpg or webp
    quality: int = 90  # for jpg and webp, 1 to 100
    with_metadata: bool = True


@dataclass(frozen=True, slots=True)
class ModelLabel:
    """What images say about the program that generated them."""

    model: str
    model_digest: str
    version: str


def describe_request(request: ImageRequest, label: ModelLabel) -> dict[str, Any]:
    """Return everything that determines the image, under the names of the results table."""
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "noise_seed": request.initial_noise_seed,
        **{name: getattr(request.settings, name) for name in IMAGE_SETTINGS},
        **asdict(label),
    }


def format_webui_parameters(request: ImageRequest, label: ModelLabel) -> str:
    """Return the `parameters` entry: prompt, negative prompt, then one line of settings."""
    settings = request.settings
    name = label.model
    values = {
        "Steps": settings.steps,
        "Sampler": SAMPLER_LABELS[settings.sampler],
        "CFG scale": settings.scale,
        "Seed": request.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": label.model_digest[:10],
        "Model": json.dumps(name) if any(character in name for character in ",:\n") else name,
        "RNG": RNG_LABELS[settings.rng],
        "Version": f"tinysd-batch {label.version}",
    }
    for name, setting in IMAGE_SETTINGS.items():
        if setting.webui_label and getattr(settings, name) != setting.default:
            values[setting.webui_label] = getattr(settings, name)
    lines = [request.prompt.replace("\n", " ")]
    if settings.negative_prompt:
        lines.append("Negative prompt: " + settings.negative_prompt.replace("\n", " "))
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items()))
    return "\n".join(lines)


def encode_image(image: Image.Image, file_format: FileFormat, parameters: str, metadata: dict[str, Any]) -> bytes:
    """Encode an image as the bytes of a file."""
    parameters, metadata = make_value_storable(parameters), make_value_storable(metadata)
    options: dict[str, Any] = {"quality": file_format.quality}
    if file_format.name == "png":
        options = {"compress_level": PNG_COMPRESSION}
    if file_format.with_metadata:
        make_metadata = make_png_metadata if file_format.name == "png" else make_exif_metadata
        options |= make_metadata(parameters, metadata)
    buffer = io.BytesIO()
    image.save(buffer, PILLOW_FORMATS[file_format.name], **options)
    return buffer.getvalue()


def make_png_metadata(parameters: str, metadata: dict[str, Any]) -> dict[str, Any]:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters)
    text.add_itxt(METADATA_KEY, json.dumps(metadata, sort_keys=True, ensure_ascii=False))
    return {"pnginfo": text}


def make_exif_metadata(parameters: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return both entries as EXIF. If prompts are too long for it, omit first `parameters`, then our prompts."""
    for comment, entry in iterate_shortened_metadata(parameters, metadata):
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


def iterate_shortened_metadata(parameters: str, metadata: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield parameters, metadata
    yield "", metadata
    yield "", {name: value for name, value in metadata.items() if name not in ("prompt", "negative_prompt")}


def is_complete_file(data: bytes, format_name: str) -> bool:
    """Whether a file has its last bytes, which Pillow does not check: a PNG's IEND chunk, a JPEG's end marker."""
    if format_name == "webp":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return data.endswith(END_MARKERS[format_name])


@contextmanager
def open_image(file: Any, formats: Collection[str] = tuple(PILLOW_FORMATS)) -> Iterator[Image.Image]:
    """Open an untrusted image of these formats (png, jpg, webp). Raises OSError for every error.

    The caller must check `size` before it decodes the pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=[PILLOW_FORMATS[name] for name in formats]) as image:
                yield image
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's parsers raise many types of errors
        raise OSError(f"not a complete image: {error}") from None


def read_metadata(
    data: bytes, size: tuple[int, int] | None = None, formats: Collection[str] = tuple(PILLOW_FORMATS)
) -> tuple[str, dict[str, Any]]:
    """Return `parameters` and our JSON; both empty if the file is damaged or not of `size` (width, height)."""
    try:
        with open_image(io.BytesIO(data), formats) as image:
            if image.size != (size or image.size) or max(image.size) > MAX_READABLE_PX:
                return "", {}
            image.load()
            parameters, metadata_json = extract_metadata(image)
            metadata = json.loads(metadata_json)
    except OSError:
        return "", {}
    return parameters, metadata if isinstance(metadata, dict) else {}


def extract_metadata(image: Image.Image) -> tuple[str, str]:
    """Return `parameters` and our JSON as text."""
    if image.format == "PNG":
        text = getattr(image, "text", {})
        return str(text.get("parameters", "")), str(text.get(METADATA_KEY, "{}"))
    exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    comment, note = exif.get(ExifTags.Base.UserComment, b""), exif.get(ExifTags.Base.MakerNote, b"")
    if not isinstance(comment, bytes) or not isinstance(note, bytes):
        return "", "{}"
    encoding = COMMENT_ENCODINGS.get(comment[:8])
    parameters = comment[8:].decode(encoding, "replace") if encoding else ""
    entries = json.loads(note.decode("ascii", "replace") or "{}")
    return parameters, json.dumps(entries.get(METADATA_KEY, {}) if isinstance(entries, dict) else {})
