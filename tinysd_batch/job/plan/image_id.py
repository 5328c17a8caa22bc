"""Compute the `image_id` of an image, 32 hex digits. Equal ids mean equal pixels, except for float rounding."""

import hashlib
import json
import unicodedata
from functools import lru_cache
from typing import Any

from tinysd_batch.settings.schema import IMAGE_SETTINGS, ImageSettings
from tinysd_batch.text import fold_widths

IMAGE_ID_VERSION = 1
encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode
PER_IMAGE = ("prompt", "seed")  # in the order of the canonical JSON, which sorts its keys


def compute_image_id(
    *,
    model_digest: str,
    precision: str,
    prompt: str,
    seed: int,
    settings: ImageSettings,
    noise_seed: int | None = None,
) -> str:
    """Return 128 bits of BLAKE2b over the canonical JSON of everything that determines the pixels.

    Device, batch size, worker, file format and index are not included, since none of them may change the pixels. A file
    is included by its digest, never by its path, as the model is.
    """
    folded = any(fold_widths(text) != text for text in (prompt, settings.negative_prompt))
    before_prompt, before_seed, end = encode_shared_inputs(
        model_digest, precision, settings, None if noise_seed == seed else noise_seed, folded
    )
    normalized_prompt = encode(unicodedata.normalize("NFC", prompt))
    text = f"{before_prompt}{normalized_prompt}{before_seed}{seed}{end}"
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


@lru_cache(1024)  # images mostly differ in prompt and seed only
def encode_shared_inputs(
    model_digest: str, precision: str, settings: ImageSettings, noise_seed: int | None, folded: bool
) -> tuple[str, str, str]:
    """Return the canonical JSON around the values of prompt and seed: what is before, between and after them."""
    inputs = {
        "version": IMAGE_ID_VERSION,
        "model": model_digest,
        "precision": precision,
        "prompt": None,
        "seed": None,
        **list_canonical_settings(settings),
    }
    if noise_seed is not None:
        inputs["noise_seed"] = noise_seed
    if folded:
        inputs["widths"] = "folded"
    names = sorted(inputs)
    members = [f"{encode(name)}:{'' if name in PER_IMAGE else encode(inputs[name])}" for name in names]
    after_prompt, after_seed = (names.index(name) + 1 for name in PER_IMAGE)
    return (
        "{" + ",".join(members[:after_prompt]),
        "," + ",".join(members[after_prompt:after_seed]),
        "," + ",".join(members[after_seed:]) + "}",
    )


def list_canonical_settings(settings: ImageSettings) -> dict[str, Any]:
    """Return the canonical values by name.

    Settings that were added later are included only if they have an effect, so that earlier ids stay valid.
    """
    return {
        name: setting.value_type.canonical(value)
        for name, setting in IMAGE_SETTINGS.items()
        if (value := getattr(settings, name)) != setting.default or setting.is_always_recorded
    }
