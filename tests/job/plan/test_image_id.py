"""Every input that determines the pixels changes the image_id, and nothing else does."""

import hashlib
import json
import unicodedata
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.support.planning import SETTINGS
from tinysd_batch.job.plan.image_id import compute_image_id
from tinysd_batch.settings.schema import IMAGE_SETTINGS
from tinysd_batch.text import fold_widths

INPUTS: dict[str, Any] = {
    "model_digest": "00" * 16,
    "prompt": "red apple",
    "seed": 7,
    "precision": "auto",
}


def image_id(**changes: Any) -> str:
    """Return the id of an image for which these inputs or settings are changed."""
    settings = {name: value for name, value in changes.items() if name in IMAGE_SETTINGS}
    inputs = {name: value for name, value in changes.items() if name not in settings}
    return compute_image_id(settings=replace(SETTINGS, **settings), **{**INPUTS, **inputs})


def test_golden_image_ids() -> None:
    """These must never change: they are in every results table and image file."""
    assert image_id() == "b5ef3a2132275a4ebf6c2e442a15bda6"
    assert image_id(prompt="Zu\u0308rich \N{RED APPLE}") == "f30aad90e19cb13871b28851bcb043cd"


def test_image_ids_ignore_unicode_form_and_number_type() -> None:
    assert image_id(prompt="Z\u00fcrich") == image_id(prompt="Zu\u0308rich")
    assert image_id(noise_seed=7) == image_id()
    assert image_id(scale=7) == image_id(scale=7.0)


def test_full_width_characters_have_their_own_image_ids() -> None:
    """Since 0.2.0 they are read as half-width, so their pixels changed; full-width blanks never made a difference."""
    full_width = "a:1 b\uff1a1\uff0cc"
    id_before_0_2_0 = "84a2a8e3690706a86e95aabdba640383"
    assert image_id(prompt=full_width) not in (id_before_0_2_0, image_id(prompt="a:1 b:1,c"))
    assert image_id(prompt=full_width) == "3d64b692351ceaac3f7574b42ea1fc7c"
    assert image_id(negative_prompt="red\u3000apple") == "2534ebed171e442325d73f0236928910"


def test_everything_that_determines_pixels_changes_the_image_id() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"model_digest": "11" * 16},
        {"prompt": "x"},
        {"negative_prompt": "x"},
        {"seed": 8},
        {"scale": 7.0},
        {"precision": "full"},
        {"prompt_syntax": "none"},
        {"long_prompts": True},
        {"noise_seed": 8},
        {"width": 256},
        {"height": 256},
        {"steps": 51},
        {"sampler": "ddim"},
        {"eta": 0.1},
    ]
    assert len({image_id(**variant) for variant in variants}) == len(variants)


PROMPTS = st.text(max_size=20) | st.sampled_from(
    ["", '"', "\\", "a\n", "Zu\u0308rich", "\uff21", "\U0001f34e", '","seed":1']
)


@given(PROMPTS, PROMPTS, st.integers(0, 2**63 - 1), st.none() | st.integers(0, 2**63 - 1), st.integers(1, 12))
def test_the_id_is_the_digest_of_the_sorted_json(
    prompt: str, negative_prompt: str, seed: int, noise_seed: int | None, clip_skip: int
) -> None:
    """What images share is encoded once; the text that is hashed is the same as without that."""
    inputs = {
        "version": 1, "model": INPUTS["model_digest"], "precision": "auto", "rng": "cpu", "prompt_syntax": "seed",
        "prompt": unicodedata.normalize("NFC", prompt), "seed": seed, "width": 512, "height": 512, "steps": 50,
        "negative_prompt": unicodedata.normalize("NFC", negative_prompt), "sampler": "plms", "scale": 7.5, "eta": 0.0,
    }  # fmt: skip
    if noise_seed not in (None, seed):
        inputs["noise_seed"] = noise_seed
    if clip_skip != 1:
        inputs["clip_skip"] = clip_skip
    if any(fold_widths(text) != text for text in (prompt, negative_prompt)):
        inputs["widths"] = "folded"
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    expected = hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()
    settings = {"negative_prompt": negative_prompt, "clip_skip": clip_skip}
    assert image_id(prompt=prompt, seed=seed, noise_seed=noise_seed, **settings) == expected
