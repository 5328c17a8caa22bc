"""Compute the `image_id` of an image, 32 hex digits. Equal ids mean equal pixels, except for float rounding."""

import hashlib
import json
import unicodedata

from tinysd_batch.records import SamplingParams
from tinysd_batch.text import fold_widths

IMAGE_ID_VERSION = 1
CANONICAL_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def compute_image_id(
    *,
    model_digest: str,
    prompt: str,
    negative_prompt: str,
    seed: int,
    scale: float,
    params: SamplingParams,
    precision: str,
    prompt_syntax: str = "seed",
    long_prompts: bool = False,
    noise_seed: int | None = None,
    rng: str = "cpu",
) -> str:
    """Return 128 bits of BLAKE2b over the canonical JSON of everything that determines the pixels.

    Device, batch size, worker, file format and index are not included, since none of them may change the pixels.
    """
    inputs = {
        "version": IMAGE_ID_VERSION,
        "model": model_digest,
        "prompt": unicodedata.normalize("NFC", prompt),
        "negative_prompt": unicodedata.normalize("NFC", negative_prompt),
        "prompt_syntax": prompt_syntax,
        "seed": seed,
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "sampler": params.sampler,
        "scale": float(scale),
        "eta": float(params.eta),
        "precision": precision,
        "rng": rng,
    }
    # Settings that were added later are included only if they have an effect, so that earlier ids stay valid.
    if long_prompts:
        inputs["long_prompts"] = True
    if noise_seed not in (None, seed):
        inputs["noise_seed"] = noise_seed
    if any(fold_widths(text) != text for text in (prompt, negative_prompt)):
        inputs["widths"] = "folded"
    text = CANONICAL_JSON.encode(inputs)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()
