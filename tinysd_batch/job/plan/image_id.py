"""Compute the `image_id` of an image, 32 hex digits. Equal ids mean equal pixels, except for float rounding."""

import hashlib
import json
import unicodedata
from functools import lru_cache
from typing import Any

from tinysd_batch.settings.schema import IMAGE_SETTINGS, ImageSettings
from tinysd_batch.text import fold_widths

IMAGE_ID_VERSION = 1
CANONICAL_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


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
    inputs = {
        "version": IMAGE_ID_VERSION,
        "model": model_digest,
        "precision": precision,
        "prompt": unicodedata.normalize("NFC", prompt),
        "seed": seed,
        **list_canonical_settings(settings),
    }
    if noise_seed not in (None, seed):
        inputs["noise_seed"] = noise_seed
    if any(fold_widths(text) != text for text in (prompt, settings.negative_prompt)):
        inputs["widths"] = "folded"
    text = CANONICAL_JSON.encode(inputs)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


@lru_cache(1024)
def list_canonical_settings(settings: ImageSettings) -> dict[str, Any]:
    """Return the canonical values by name.

    Settings that were added later are included only if they have an effect, so that earlier ids stay valid.
    """
    return {
        name: setting.value_type.canonical(value)
        for name, setting in IMAGE_SETTINGS.items()
        if (value := getattr(settings, name)) != setting.default or setting.is_in_every_image_id
    }
