"""Check the arguments of `TinySD.generate`, resolve their aliases and spread them over the images of a batch."""

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
# Names of the command line, of manifests and of other programs for the arguments of `generate`.
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
NON_REQUEST_ARGUMENTS = (
    "output_type",
    "callback",
    "progress",
)  # arguments of `generate` that are not part of the request
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
    """A batch of images to generate. Lists have one entry per image."""

    prompts: list[str | None]  # None if an embedding is given
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

    def image_settings(self, model: ModelInfo, version: str) -> list[dict[str, Any]]:
        """Return the settings that determine each image, under the names of the results table."""
        shared = {
            "width": self.width, "height": self.height, "steps": self.steps, "sampler": self.sampler, "eta": self.eta,
            "rng": self.rng, "long_prompts": self.long_prompts, "model": model.name, "model_digest": model.digest,
            "version": version,
        }  # fmt: skip
        names = ("prompt", "negative_prompt", "prompt_syntax", "seed", "noise_seed", "scale")
        per_image = zip(
            self.prompts, self.negative_prompts, self.syntaxes, self.seeds, self.noise_seeds, self.scales, strict=True
        )
        return [{**dict(zip(names, values, strict=True)), **shared} for values in per_image]


def merge_aliases(named: Mapping[str, Any], aliased: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments that are not None under `generate`'s own names.

    Args:
        named: arguments under `generate`'s own names.
        aliased: the other keyword arguments.

    Raises:
        TypeError: a keyword is unknown.
        UsageError: two names of one argument have different values.
    """
    merged = {name: value for name, value in named.items() if value is not None}
    name_used = {name: name for name in merged}
    for alias, value in aliased.items():
        name = ALIAS_TO_NAME.get(alias)
        if name is None:
            raise TypeError(f"generate() got an unexpected keyword argument {alias!r}{suggest_argument(alias, named)}")
        if value is None:
            continue
        if name in merged and not is_same_value(merged[name], value):
            both = f"{name_used[name]} = {excerpt(merged[name])} and {alias} = {excerpt(value)}"
            raise UsageError(f"{both}: two names of one setting; give one of them")
        merged[name], name_used[name] = value, alias
    return merged


def suggest_argument(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message that suggests a valid name; empty if none is similar."""
    if name in REPLACEMENTS:
        return f"; use {REPLACEMENTS[name]}"
    matches = difflib.get_close_matches(name, [*names, *ALIAS_TO_NAME, *NON_REQUEST_ARGUMENTS], n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def is_same_value(first: Any, second: Any) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return bool(first == second)
    return to_list(first) == to_list(second)


def build_request(model: ModelInfo, arguments: Mapping[str, Any], *, normalize: bool) -> GenerationRequest:
    """Build the request from `generate`'s arguments; missing ones get the model's defaults.

    Raises:
        UsageError: an argument is invalid, or does not fit the others.
    """
    prompt, seed = arguments.get("prompt"), arguments.get("seed")
    batch = compute_batch_size(
        {"prompt": prompt, "seed": seed, "prompt_embeds": arguments.get("prompt_embeds")},
        {name: arguments.get(name) for name in ("negative_prompt", "prompt_syntax", "guidance_scale", "noise_seed")},
    )
    images = parse_whole_number("num_images_per_prompt", arguments.get("num_images_per_prompt", 1), 1, 1024)
    if arguments.get("prompt_embeds") is None and prompt is None:
        raise UsageError("prompt: give text, a list of texts, or prompt_embeds")

    def per_image(name: str, default: Any, parse: Callable[[str, Any], Any]) -> list[Any]:
        values = [parse(name, value) for value in to_list(arguments.get(name, default))]
        return [value for value in broadcast(values, batch) for _ in range(images)]

    parse_text = normalize_prompt_text if normalize else check_prompt_text
    seeds = resolve_seeds(seed, batch, images)
    noise_seed = arguments.get("noise_seed")
    return GenerationRequest(
        prompts=per_image("prompt", None, lambda name, value: None if prompt is None else parse_text(name, value)),
        negative_prompts=per_image("negative_prompt", "", parse_text),
        syntaxes=per_image("prompt_syntax", "seed", lambda _, value: value),
        scales=per_image("guidance_scale", model.scale, parse_number),
        seeds=seeds,
        noise_seeds=seeds if noise_seed is None else per_image("noise_seed", None, parse_seed),
        height=parse_side_px("height", arguments.get("height", model.native_px), model.size_multiple_px),
        width=parse_side_px("width", arguments.get("width", model.native_px), model.size_multiple_px),
        steps=parse_whole_number(
            "num_inference_steps", arguments.get("num_inference_steps", model.steps), 1, MAX_STEPS
        ),
        sampler=parse_sampler(arguments.get("sampler", "plms")),
        eta=parse_number("eta", arguments.get("eta", 0.0), 0, 1),
        rng=arguments.get("rng", "cpu"),
        long_prompts=bool(arguments.get("long_prompts")),
        latents=check_latents(arguments.get("latents"), len(seeds)),
        prompt_embeds=repeat_embeddings(arguments.get("prompt_embeds"), images),
        negative_prompt_embeds=repeat_embeddings(arguments.get("negative_prompt_embeds"), images),
    )


def resolve_seeds(seed: Any, batch: int, images: int) -> list[int]:
    """Return one seed per image.

    Args:
        seed: the argument; if missing, a first seed is chosen at random and all images count up from it.
        batch: number of prompts.
        images: images per prompt; their seeds count up from the prompt's seed.
    """
    if is_seed_missing(seed):
        first = secrets.randbelow(RANDOM_SEED_LIMIT)
        return list(range(first, first + batch * images))
    values = (
        secrets.randbelow(RANDOM_SEED_LIMIT) if is_seed_missing(value) else parse_seed("seed", value)
        for value in to_list(seed)
    )
    return [parse_seed("seed", value + image) for value in broadcast(list(values), batch) for image in range(images)]


def is_seed_missing(value: Any) -> bool:
    """Whether a random seed is asked for: None, NaN, or -1 as in AUTOMATIC1111's web UI."""
    if getattr(value, "shape", ()):
        return False
    return is_missing_number(value) or (isinstance(value, int | float | str) and str(value) in ("-1", "-1.0"))


def parse_seed(name: str, value: Any) -> int:
    return parse_whole_number(name, value, 0, MAX_SEED)


def parse_whole_number(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """Parse a whole number, which may be a float such as 3.0. Raises UsageError."""
    try:
        number = parse_integer(value)
    except ValueError as error:
        raise UsageError(f"{name} = {excerpt(value)}: {error}") from None
    if minimum is not None and maximum is not None and not minimum <= number <= maximum:
        raise UsageError(f"{name} = {number}: must be between {minimum} and {maximum}")
    return number


def parse_side_px(name: str, value: Any, multiple_px: int) -> int:
    """Parse a height or width in pixels. Raises UsageError."""
    pixels = parse_whole_number(name, value)
    if pixels <= 0 or pixels % multiple_px:
        raise UsageError(f"{name} = {pixels}: must be a positive multiple of {multiple_px} with this model")
    return pixels


def parse_number(name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """Parse a finite number. Raises UsageError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name} = {excerpt(value)}: a number was expected")
    if not minimum <= number <= maximum:
        raise UsageError(f"{name} = {number:g}: must be between {minimum:g} and {maximum:g}")
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
        raise UsageError(f"{name}: contains half a character (an unpaired surrogate), which is not valid text")
    return value


def normalize_prompt_text(name: str, value: Any) -> str:
    return normalize_text(check_prompt_text(name, value))


def repeat_embeddings(embeddings: Tensor | None, images: int) -> Tensor | None:
    """Repeat embeddings [B, T, D] for each prompt's images; [1, T, D] is for all rows anyway."""
    if embeddings is None or len(embeddings) == 1:
        return embeddings
    return embeddings.repeat_interleave(images, dim=0)


def compute_batch_size(sizing: Mapping[str, object], others: Mapping[str, object]) -> int:
    """Return the length of the longest of the `sizing` arguments.

    Raises:
        UsageError: an argument has neither one entry nor one per image.
    """
    size = max(count_entries(value) for value in sizing.values())
    for name, value in {**sizing, **others}.items():
        if (count := count_entries(value)) not in (1, size) or not count:
            raise UsageError(f"{name}: {count} given for a batch of {size}; give one, or one each")
    return size


def count_entries(value: object) -> int:
    """Return the number of entries of an argument; 1 for single values."""
    return len(value) if isinstance(value, Tensor) and value.dim() > 1 else len(to_list(value))


def to_list(value: Any) -> list[Any]:
    """Convert a list, tuple, range, array or tensor to a list; a single value to a list of one."""
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def broadcast(values: list[Any], size: int) -> list[Any]:
    """Repeat a single value `size` times; longer lists stay."""
    return values * size if len(values) == 1 else values
