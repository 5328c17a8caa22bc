"""Check the arguments of `TinySD.generate`, resolve their aliases and spread them over the images of a batch."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tinysd_batch.errors import UsageError
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.records import ImageRequest
from tinysd_batch.settings.declaration import Setting
from tinysd_batch.settings.schema import IMAGE_SETTINGS, SETTINGS, ImageSettings, override
from tinysd_batch.settings.sources import suggest_name
from tinysd_batch.settings.value_types import SEEDS, PromptText
from tinysd_batch.text import excerpt, has_surrogates, show_value
from tinysd_batch.values import is_missing_number

Rng = Literal["cpu", "cuda"]
# Names of the command line, of manifests and of other programs for the arguments of `generate`.
ALIAS_TO_NAME = {
    alias: setting.generate_name
    for name, setting in SETTINGS.items()
    for alias in (setting.generate_name, name, *setting.aliases)
}
NON_REQUEST_ARGUMENTS = ("output_type", "callback", "progress")  # arguments of `generate` that are not in requests
REPLACEMENTS = {
    "generator": "seed",
    "scheduler": "sampler",
    "callback_on_step_end": "callback",
    "n_iter": "num_images_per_prompt",
    "precision": "dtype of TinySD.from_pretrained",
}
RANDOM_SEED_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class TensorArguments:
    """Tensors given to `generate` that replace the noise or the encoded prompts of a batch."""

    latents: Tensor | None = None  # [B, 4, h, w]
    prompt_embeds: Tensor | None = None  # [B or 1, T, D]
    negative_prompt_embeds: Tensor | None = None  # [B or 1, T, D]

    def select(self, rows: Sequence[int]) -> "TensorArguments":
        """Return the tensors of these images."""
        return TensorArguments(
            None if self.latents is None else self.latents[list(rows)],
            select_embeddings(self.prompt_embeds, rows),
            select_embeddings(self.negative_prompt_embeds, rows),
        )


def select_embeddings(embeddings: Tensor | None, rows: Sequence[int]) -> Tensor | None:
    return embeddings if embeddings is None or len(embeddings) == 1 else embeddings[list(rows)]


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
    return suggest_name(name, [*names, *ALIAS_TO_NAME, *NON_REQUEST_ARGUMENTS])


def is_same_value(first: Any, second: Any) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return bool(first == second)
    return to_list(first) == to_list(second)


def build_requests(model: ModelInfo, arguments: Mapping[str, Any], *, normalize: bool) -> list[ImageRequest]:
    """Build the requests from `generate`'s arguments; missing ones get the model's defaults.

    Raises:
        UsageError: an argument is invalid, or does not fit the others.
    """
    prompt, seed, noise_seed = (arguments.get(name) for name in ("prompt", "seed", "noise_seed"))
    embeds = arguments.get("prompt_embeds")
    if embeds is None and prompt is None:
        raise UsageError("prompt: give text, a list of texts, or prompt_embeds")
    settings = {name: each for name, each in IMAGE_SETTINGS.items() if each.generate_name in arguments}
    batch = compute_batch_size(
        {"prompt": prompt, "seed": seed, "prompt_embeds": embeds},
        {
            "noise_seed": noise_seed,
            "negative_prompt_embeds": arguments.get("negative_prompt_embeds"),
            **{each.generate_name: arguments[each.generate_name] for each in settings.values()},
        },
    )
    n_images = parse_argument(SETTINGS["n_samples"], arguments.get("num_images_per_prompt", 1), model)

    def per_image(values: Iterable[Any]) -> list[Any]:
        return [value for value in broadcast(list(values), batch) for _ in range(n_images)]

    own = {
        name: per_image(
            parse_argument(each, value, model, normalize) for value in to_list(arguments[each.generate_name])
        )
        for name, each in settings.items()
    }
    texts = to_list("" if prompt is None else prompt)
    prompts = per_image(check_prompt_text("prompt", text, normalize) for text in texts)
    seeds = noise_seeds = resolve_seeds(seed, batch, n_images)
    if noise_seed is not None:
        noise_seeds = per_image(parse_seed("noise_seed", each) for each in to_list(noise_seed))
    defaults = get_default_settings(model)
    return [
        ImageRequest(
            prompts[image],
            seeds[image],
            override(defaults, tuple((name, values[image]) for name, values in own.items())),
            None if noise_seeds[image] == seeds[image] else noise_seeds[image],
        )
        for image in range(len(seeds))
    ]


def get_default_settings(model: ModelInfo) -> ImageSettings:
    """Return the settings of an image for which nothing is given."""
    defaults = {name: getattr(model, each.model_default) for name, each in IMAGE_SETTINGS.items() if each.model_default}
    return ImageSettings(**defaults)


def build_tensors(arguments: Mapping[str, Any], n_requests: int) -> TensorArguments:
    """Check the tensors among `generate`'s arguments, and repeat embeddings for each prompt's images.

    Raises UsageError if their number does not fit.
    """
    latents = arguments.get("latents")
    if latents is not None and len(latents) != n_requests:
        raise UsageError(f"latents: {len(latents)} given for {n_requests} images; give one each")
    return TensorArguments(
        latents,
        repeat_embeddings(arguments.get("prompt_embeds"), n_requests),
        repeat_embeddings(arguments.get("negative_prompt_embeds"), n_requests),
    )


def parse_argument(setting: Setting, value: Any, model: ModelInfo, normalize: bool = True) -> Any:
    """Parse the value of a setting, whose name in the message is `generate`'s. Raises UsageError."""
    if isinstance(setting.value_type, PromptText):
        return check_prompt_text(setting.generate_name, value, normalize)
    try:
        return setting.value_type.for_model(model).parse(value)
    except ValueError as error:
        raise UsageError(f"{setting.generate_name} = {show_value(value)}: {error}") from None


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
    """Parse a seed, which may be a float such as 3.0. Raises UsageError."""
    try:
        return SEEDS.parse(value)
    except ValueError as error:
        raise UsageError(f"{name} = {show_value(value)}: {error}") from None


def check_prompt_text(name: str, value: Any, normalize: bool) -> str:
    """Return a prompt, without invisible characters if `normalize`. Raises UsageError."""
    if isinstance(value, str) and has_surrogates(value):
        raise UsageError(f"{name}: contains half a character (an unpaired surrogate), which is not valid text")
    try:
        text = PromptText().parse(value)
    except ValueError as error:
        raise UsageError(f"{name} = {show_value(value)}: {error}") from None
    return text if normalize else str(value)


def repeat_embeddings(embeddings: Tensor | None, n_requests: int) -> Tensor | None:
    """Repeat embeddings [B, T, D] for each prompt's images; [1, T, D] is for all rows anyway."""
    if embeddings is None or len(embeddings) == 1:
        return embeddings
    return embeddings.repeat_interleave(n_requests // len(embeddings), dim=0)


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
