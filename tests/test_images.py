"""Image files and the metadata inside them."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import sd_parsers
from PIL import Image

from tests.support.settings import make_image_settings
from tinysd_batch.images import (
    SAMPLER_LABELS,
    FileFormat,
    ModelLabel,
    encode_image,
    format_webui_parameters,
    read_metadata,
)
from tinysd_batch.records import ImageRequest
from tinysd_batch.settings.sampler_names import SAMPLERS

LABEL = ModelLabel("sd, v1", "0123456789abcdef", "0.1.0")


def request(prompt: str, negative: str = "") -> ImageRequest:
    return ImageRequest(prompt, 42, make_image_settings(negative_prompt=negative, width=512, height=768, steps=50))


def test_webui_parameters() -> None:
    text = format_webui_parameters(request("a cat\non a mat", "blurry"), LABEL)
    assert text.splitlines() == [
        "a cat on a mat",
        "Negative prompt: blurry",
        'Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x768, Model hash: 0123456789, Model: "sd, v1", '
        "RNG: CPU, Version: tinysd-batch 0.1.0",
    ]


def pixels(size: int = 32) -> npt.NDArray[np.uint8]:
    """Return a smooth gradient, which lossy formats preserve."""
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    return np.stack([np.broadcast_to(ramp, (size, size)), np.broadcast_to(ramp[:, None], (size, size))] * 2, axis=2)[
        ..., :3
    ].copy()


METADATA = {"image_id": "ab", "prompt": "\N{SNOWMAN}\0", "made": {"degraded": []}}


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_pixels_and_metadata_survive(name: str) -> None:
    data = encode_image(Image.fromarray(pixels()), FileFormat(name, quality=95), "p\N{SNOWMAN}", METADATA)
    with Image.open(io.BytesIO(data)) as image:
        difference = np.abs(np.asarray(image).astype(int) - pixels())
    assert difference.max() <= (0 if name == "png" else 12)
    assert read_metadata(data) == ("p\N{SNOWMAN}", METADATA)


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_metadata_with_names_that_are_not_unicode(name: str) -> None:
    odd = {"model": "mod\udce9", "made": {"device_name": "\ud800", "degraded": ["\udce9"]}}
    parameters, stored = read_metadata(encode_image(Image.fromarray(pixels()), FileFormat(name), "mod\udce9", odd))
    assert (parameters, stored["model"], stored["made"]["degraded"]) == ("mod\\xe9", "mod\\xe9", ["\\xe9"])


@pytest.mark.parametrize("name", ["jpg", "webp"])
def test_higher_quality_gives_larger_files(name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sizes = [len(encode_image(noise, FileFormat(name, quality), "", {})) for quality in (10, 50, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_file_without_metadata(name: str) -> None:
    data = encode_image(Image.fromarray(pixels()), FileFormat(name, with_metadata=False), "secret prompt", METADATA)
    assert read_metadata(data) == ("", {})
    with Image.open(io.BytesIO(data)) as image:
        assert not image.getexif()
        assert not {"parameters", "tinysd", "exif"} & image.info.keys()


@pytest.mark.parametrize("name", ["jpg", "webp"])
@pytest.mark.parametrize("characters", [10, 5_000, 10_000])
def test_prompts_too_long_for_exif_are_omitted(name: str, characters: int) -> None:
    prompt = "\N{SNOWMAN}" * characters
    stored = {"image_id": "ab", "prompt": prompt, "negative_prompt": prompt, "seed": 3}
    _, metadata = read_metadata(encode_image(Image.fromarray(pixels()), FileFormat(name), prompt + prompt, stored))
    assert (metadata["image_id"], metadata["seed"]) == ("ab", 3)
    assert metadata.get("prompt", prompt) == prompt


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_programs_read_the_parameters(
    name: str, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sd-parsers 0.6 caches by the image's memory address, which the next image may have, too.
    monkeypatch.setattr("sd_parsers.extractors._jpeg_usercomment._image_id", None)
    settings = make_image_settings(
        negative_prompt="blurry: yes", width=512, height=768, steps=50, sampler=sampler, eta=0.5
    )
    parameters = format_webui_parameters(ImageRequest("a cat, (big:1.2), 16:9", 42, settings), LABEL)
    path = tmp_path / f"image.{name}"
    path.write_bytes(encode_image(Image.fromarray(pixels()), FileFormat(name), parameters, METADATA))
    parsed = sd_parsers.ParserManager().parse(path)
    assert parsed is not None
    (parsed_sampler,) = parsed.samplers
    assert [prompt.value for prompt in parsed.prompts] == ["a cat, (big:1.2), 16:9"]
    assert [prompt.value for prompt in parsed.negative_prompts] == ["blurry: yes"]
    assert parsed_sampler.name == SAMPLER_LABELS[sampler]
    assert (
        parsed_sampler.parameters["seed"],
        parsed_sampler.parameters["steps"],
        parsed_sampler.parameters["cfg_scale"],
    ) == ("42", "50", "7.5")


def test_foreign_and_damaged_files_have_no_metadata() -> None:
    data = encode_image(Image.new("RGB", (8, 8)), FileFormat(), "", {"image_id": "ab"})
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    files = b"", data[: len(data) // 2], plain.getvalue()
    assert [read_metadata(file)[1] for file in files] == [{}, {}, {}]
