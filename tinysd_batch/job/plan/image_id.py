"""What makes an image the one it is, as 32 hex digits: equal ids mean equal pixels, up to float rounding."""

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
    """128 bits of BLAKE2b over canonical JSON of everything that decides the pixels.

    Not in it: device, batch size, worker, file format, index, since none of them may change the picture.
    """
    decides = {
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
    # What came later stands only where it has an effect, so that older ids stay what they are.
    if long_prompts:
        decides["long_prompts"] = True
    if noise_seed not in (None, seed):
        decides["noise_seed"] = noise_seed
    if any(fold_widths(each) != each for each in (prompt, negative_prompt)):
        decides["widths"] = "folded"
    text = CANONICAL_JSON.encode(decides)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()
