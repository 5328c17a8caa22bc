"""What `TinySD.generate` is given, under all its names, checked and spread over the images of a batch."""

import difflib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tinysd_batch.config import MAX_SEED, MAX_STEPS, find_sampler
from tinysd_batch.errors import UsageError
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.text import excerpt, has_surrogates, normalize_text
from tinysd_batch.values import is_missing_number, parse_integer

Rng = Literal["cpu", "cuda"]
# What the command line, manifests and other programs call the arguments of `generate`.
ALIASES = {
    "num_inference_steps": ("steps", "ddim_steps"),
    "guidance_scale": ("scale", "cfg_scale", "cfg"),
    "height": ("H",),
    "width": ("W",),
    "num_images_per_prompt": ("n_samples", "num_images", "batch_size"),
    "sampler": ("sampler_name",),
    "eta": ("ddim_eta",),
    "negative_prompt": ("negative",),
}
ALIAS_TO_NAME = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
NON_REQUEST_ARGUMENTS = ("output_type", "callback", "progress")  # which decide nothing about the request
REPLACEMENTS = {
    "generator": "seed",
    "scheduler": "sampler",
    "callback_on_step_end": "callback",
    "n_iter": "num_images_per_prompt",
    "precision": "dtype of TinySD.from_pretrained",
}
RANDOM_SEED_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A batch to generate. Lists have one entry per image."""

    prompts: list[str | None]  # None where an embedding is given
    negative_prompts: list[str]
    syntaxes: list[str]
    scales: list[float]
    seeds: list[int]
    noise_seeds: list[int]
    height: int
    width: int
    steps: int
    sampler: str
    eta: float
    rng: Rng
    long_prompts: bool
    latents: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None

    def settings(self, model: ModelInfo, version: str) -> list[dict[str, Any]]:
        """What decided each image, under the names of the results table."""
        shared = {
            "width": self.width, "height": self.height, "steps": self.steps, "sampler": self.sampler, "eta": self.eta,
            "rng": self.rng, "long_prompts": self.long_prompts, "model": model.name, "model_digest": model.digest,
            "version": version,
        }  # fmt: skip
        each = zip(
            self.prompts, self.negative_prompts, self.syntaxes, self.seeds, self.noise_seeds, self.scales, strict=True
        )
        names = ("prompt", "negative_prompt", "prompt_syntax", "seed", "noise_seed", "scale")
        return [{**dict(zip(names, values, strict=True)), **shared} for values in each]


def merge_aliases(given: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not None, under `generate`'s own names, from its own (`given`) and other keywords.

    Raises:
        TypeError: a keyword is not known.
        UsageError: two names of one argument have different values.
    """
    merged = {name: value for name, value in given.items() if value is not None}
    spelled = {name: name for name in merged}
    for alias, value in others.items():
        name = ALIAS_TO_NAME.get(alias)
        if name is None:
            raise TypeError(f"generate() got an unexpected keyword argument {alias!r}{suggest_argument(alias, given)}")
        if value is None:
            continue
        if name in merged and not is_same_value(merged[name], value):
            shown = f"{spelled[name]} = {excerpt(merged[name])} and {alias} = {excerpt(value)}"
            raise UsageError(f"{shown}: two names of one setting; give one of them")
        merged[name], spelled[name] = value, alias
    return merged


def suggest_argument(name: str, known: Iterable[str]) -> str:
    if name in REPLACEMENTS:
        return f"; use {REPLACEMENTS[name]}"
    alike = difflib.get_close_matches(name, [*known, *ALIAS_TO_NAME, *NON_REQUEST_ARGUMENTS], n=1)
    return f"; did you mean {alike[0]}?" if alike else ""


def is_same_value(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    return to_list(one) == to_list(other)


def build_request(model: ModelInfo, given: Mapping[str, Any], *, normalize: bool) -> GenerationRequest:
    """The batch that these arguments ask for, with the model's own values where nothing is said. Raises UsageError."""
    prompt, seed = given.get("prompt"), given.get("seed")
    batch = compute_batch_size(
        {"prompt": prompt, "seed": seed, "prompt_embeds": given.get("prompt_embeds")},
        {name: given.get(name) for name in ("negative_prompt", "prompt_syntax", "guidance_scale", "noise_seed")},
    )
    images = parse_whole_number("num_images_per_prompt", given.get("num_images_per_prompt", 1), 1, 1024)
    if given.get("prompt_embeds") is None and prompt is None:
        raise UsageError("prompt: give text, a list of texts, or prompt_embeds")

    def each(name: str, default: Any, read: Callable[[str, Any], Any]) -> list[Any]:
        values = [read(name, value) for value in to_list(given.get(name, default))]
        return [value for value in broadcast(values, batch) for _ in range(images)]

    read_text = normalize_prompt_text if normalize else check_prompt_text
    seeds = resolve_seeds(seed, batch, images)
    noise_seed = given.get("noise_seed")
    return GenerationRequest(
        prompts=each("prompt", None, lambda name, value: None if prompt is None else read_text(name, value)),
        negative_prompts=each("negative_prompt", "", read_text),
        syntaxes=each("prompt_syntax", "seed", lambda _, value: value),
        scales=each("guidance_scale", model.scale, parse_number),
        seeds=seeds,
        noise_seeds=seeds if noise_seed is None else each("noise_seed", None, parse_seed),
        height=parse_side_px("height", given.get("height", model.native_px), model.size_multiple_px),
        width=parse_side_px("width", given.get("width", model.native_px), model.size_multiple_px),
        steps=parse_whole_number("num_inference_steps", given.get("num_inference_steps", model.steps), 1, MAX_STEPS),
        sampler=parse_sampler(given.get("sampler", "plms")),
        eta=parse_number("eta", given.get("eta", 0.0), 0, 1),
        rng=given.get("rng", "cpu"),
        long_prompts=bool(given.get("long_prompts")),
        latents=check_latents(given.get("latents"), len(seeds)),
        prompt_embeds=repeat_embeddings(given.get("prompt_embeds"), images),
        negative_prompt_embeds=repeat_embeddings(given.get("negative_prompt_embeds"), images),
    )


def resolve_seeds(seed: Any, batch: int, images: int) -> list[int]:
    """A seed per image. Those of one prompt follow each other; without any, one is drawn and all follow it."""
    if is_seed_missing(seed):
        first = secrets.randbelow(RANDOM_SEED_LIMIT)
        return list(range(first, first + batch * images))
    values = (
        secrets.randbelow(RANDOM_SEED_LIMIT) if is_seed_missing(value) else parse_seed("seed", value)
        for value in to_list(seed)
    )
    return [parse_seed("seed", value + image) for value in broadcast(list(values), batch) for image in range(images)]


def is_seed_missing(value: Any) -> bool:
    """Whether a seed is to be drawn: None, NaN, or -1 as in AUTOMATIC1111's web UI."""
    if getattr(value, "shape", ()):
        return False
    return is_missing_number(value) or (isinstance(value, int | float | str) and str(value) in ("-1", "-1.0"))


def parse_seed(name: str, value: Any) -> int:
    return parse_whole_number(name, value, 0, MAX_SEED)


def parse_whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number, also one written as a float. Raises UsageError."""
    try:
        number = parse_integer(value)
    except ValueError as error:
        raise UsageError(f"{name} = {excerpt(value)}: {error}") from None
    if least is not None and most is not None and not least <= number <= most:
        raise UsageError(f"{name} = {number}: must be between {least} and {most}")
    return number


def parse_side_px(name: str, value: Any, step: int) -> int:
    """Pixels of a side. Raises UsageError."""
    pixels = parse_whole_number(name, value)
    if pixels <= 0 or pixels % step:
        raise UsageError(f"{name} = {pixels}: must be a positive multiple of {step} with this model")
    return pixels


def parse_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number. Raises UsageError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name} = {excerpt(value)}: a number was expected")
    if not least <= number <= most:
        raise UsageError(f"{name} = {number:g}: must be between {least:g} and {most:g}")
    return number


def check_latents(latents: Tensor | None, images: int) -> Tensor | None:
    if latents is not None and len(latents) != images:
        raise UsageError(f"latents: {len(latents)} given for {images} images; give one each")
    return latents


def parse_sampler(value: Any) -> str:
    try:
        return find_sampler(str(value))
    except ValueError as error:
        raise UsageError(f"sampler = {excerpt(value)}: {error}") from None


def check_prompt_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} = {excerpt(value)}: text was expected")
    if has_surrogates(value):
        raise UsageError(f"{name}: holds half a character, which is no valid text")
    return value


def normalize_prompt_text(name: str, value: Any) -> str:
    return normalize_text(check_prompt_text(name, value))


def repeat_embeddings(embeddings: Tensor | None, images: int) -> Tensor | None:
    """Embeddings [B, T, D] for so many images each; [1, T, D] stands for all rows anyway."""
    if embeddings is None or len(embeddings) == 1:
        return embeddings
    return embeddings.repeat_interleave(images, dim=0)


def compute_batch_size(deciding: Mapping[str, object], others: Mapping[str, object]) -> int:
    """The longest of the arguments that decide it. Raises UsageError for one that goes with neither one nor all."""
    size = max(count_entries(value) for value in deciding.values())
    for name, value in {**deciding, **others}.items():
        if (count := count_entries(value)) not in (1, size) or not count:
            raise UsageError(f"{name}: {count} given for a batch of {size}; give one, or one each")
    return size


def count_entries(value: object) -> int:
    """How many images an argument is for; 1 for single values."""
    return len(value) if isinstance(value, Tensor) and value.dim() > 1 else len(to_list(value))


def to_list(value: Any) -> list[Any]:
    """A list, tuple, range, array or tensor of values as a list; a single value as a list of one."""
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def broadcast(values: list[Any], size: int) -> list[Any]:
    """`size` values from one, or from one each."""
    return values * size if len(values) == 1 else values
