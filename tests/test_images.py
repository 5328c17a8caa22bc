import io

import numpy as np
from PIL import Image

from tinysd_batch.images import encode_png, parameters_text, read_metadata
from tinysd_batch.records import ImageRequest, SamplingParams


def request(prompt: str, negative: str = "") -> ImageRequest:
    params = SamplingParams(width=512, height=768, steps=50, sampler="plms", eta=0.0)
    return ImageRequest(1, 1, 1, prompt, negative, 42, 7.5, params, "ab" * 16, "images/00000/seed_42_00001.png")


def test_parameters_as_other_tools_read_them() -> None:
    text = parameters_text(request("a cat\non a mat", "blurry"), "sd, v1", "0123456789abcdef", "0.1.0")
    assert text.splitlines() == [
        "a cat on a mat",
        "Negative prompt: blurry",
        'Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x768, Model hash: 0123456789, Model: "sd, v1", '
        "RNG: CPU, Version: tinysd-batch 0.1.0",
    ]


def test_pixels_and_metadata_survive() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = encode_png(Image.fromarray(pixels), "p\N{SNOWMAN}", {"image_id": "ab", "prompt": "\N{SNOWMAN}\0"})
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert image.text["parameters"] == "p\N{SNOWMAN}"  # type: ignore[attr-defined]
    assert read_metadata(data) == {"image_id": "ab", "prompt": "\N{SNOWMAN}\0"}


def test_files_that_are_not_ours_have_no_metadata() -> None:
    data = encode_png(Image.new("RGB", (8, 8)), "", {"image_id": "ab"})
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    assert read_metadata(b"") == read_metadata(data[: len(data) // 2]) == read_metadata(plain.getvalue()) == {}
