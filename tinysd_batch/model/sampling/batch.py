"""A batch of images: its encoded prompts, its noise generators, and its output."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Generator, Tensor

from tinysd_batch.errors import UsageError
from tinysd_batch.images import METADATA_KEY, PILLOW_FORMATS, FileFormat, encode_image, format_webui_parameters
from tinysd_batch.model.arguments import GenerationRequest, Rng
from tinysd_batch.model.sampling.cuda_noise import CudaNoiseGenerator
from tinysd_batch.model.sampling.schedule import NoiseGenerator, StepCallback, sample_noise
from tinysd_batch.model.text.encoder import Conditioning, PromptEncoder
from tinysd_batch.records import ImageRequest, SamplingParams
from tinysd_batch.storage.atomic import write_atomically

OutputType = Literal["pil", "np", "latent"]


@dataclass(slots=True)
class GenerationOutput:
    """The output of `TinySD.generate`. Lists have one entry per image; times are seconds for the whole batch."""

    images: Any  # PIL images; float32 [B, H, W, 3] in 0..1 for "np"; float32 [B, 4, h, w] for "latent"
    n_tokens: list[int | None] = field(default_factory=list)
    truncated: list[str | None] = field(default_factory=list)
    negative_truncated: list[str | None] = field(default_factory=list)
    degraded: list[list[str]] = field(default_factory=list)
    precision: list[str] = field(default_factory=list)  # of the UNet
    text_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    peak_memory_bytes: int = 0
    settings: list[dict[str, Any]] = field(default_factory=list)  # under the names of the results table

    @property
    def seeds(self) -> list[int]:
        return [settings["seed"] for settings in self.settings]

    def save(self, path: str | Path, quality: int = 90) -> list[Path]:
        """Write the images with their settings embedded, as jobs do, and return their paths.

        Args:
            path: a file name ending in .png, .jpg or .webp. Several images get a number each before the suffix.
            quality: of .jpg and .webp, 1 to 100.

        Raises:
            UsageError: the suffix is not supported, or the output is not PIL images.
            StorageError: the disk is full or cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
        if suffix not in PILLOW_FORMATS:
            raise UsageError(f"{path}: images are written as .png, .jpg or .webp")
        if not all(isinstance(image, Image.Image) for image in self.images):
            raise UsageError(f"{path}: only images of output_type pil can be saved")
        paths = [path]
        if len(self.images) > 1:
            paths = [path.with_stem(f"{path.stem}_{number:05d}") for number in range(1, len(self.images) + 1)]
        file_format = FileFormat(suffix, quality)
        for image, settings, image_path in zip(self.images, self.settings, paths, strict=True):
            data = encode_image(image, file_format, format_parameters(settings), {"schema": 1, **settings})
            write_atomically(data, image_path)
        return paths

    def attach_settings(self) -> None:
        """Store its settings in each PIL image's `info`."""
        for image, settings in zip(self.images, self.settings, strict=True):
            image.info |= {"parameters": format_parameters(settings), METADATA_KEY: settings}


def format_parameters(settings: dict[str, Any]) -> str:
    """Format an image's settings as AUTOMATIC1111's web UI does."""
    params = SamplingParams(**{name: settings[name] for name in ("width", "height", "steps", "sampler", "eta")})
    request = ImageRequest(
        index=1,
        row=1,
        sample=1,
        prompt=settings["prompt"] or "",
        negative_prompt=settings["negative_prompt"],
        seed=settings["seed"],
        scale=settings["scale"],
        params=params,
        image_id="",
        file_name="",
    )
    return format_webui_parameters(request, settings["model"], settings["model_digest"], settings["version"])


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A request with its prompts encoded."""

    conditionings: Sequence[Conditioning]  # one per image
    request: GenerationRequest
    callback: StepCallback | None

    def make_generators(self, rows: Sequence[int]) -> list[NoiseGenerator]:
        return [make_generator(self.request.rng, self.request.seeds[row]) for row in rows]

    def prepare_latents(
        self, channels: int, vae_scale_factor: int, rows: Sequence[int], generators: Sequence[NoiseGenerator]
    ) -> Tensor:
        """Return the starting noise [B, C, h, w] of these rows, unit variance.

        The generators are advanced even if the starting noise has a seed of its own: all later noise stays the same.
        """
        request = self.request
        if request.latents is not None:
            return request.latents[list(rows)].float()
        shape = (channels, request.height // vae_scale_factor, request.width // vae_scale_factor)
        noise = sample_noise(generators, shape)
        if request.noise_seeds == request.seeds:
            return noise
        return sample_noise([make_generator(request.rng, request.noise_seeds[row]) for row in rows], shape)


def encode_prompts(encoder: PromptEncoder, request: GenerationRequest) -> list[Conditioning]:
    """Encode the prompts of a request, one conditioning per image."""
    return encoder.encode(
        request.prompts,
        request.negative_prompts,
        request.scales,
        request.syntaxes,
        long_prompts=request.long_prompts,
        prompt_embeds=request.prompt_embeds,
        negative_prompt_embeds=request.negative_prompt_embeds,
    )


def token_columns(conditionings: Sequence[Conditioning]) -> dict[str, Any]:
    """Return the fields of `GenerationOutput` on tokens; None if an embedding was given instead of a prompt."""
    prompts = [conditioning.tokens for conditioning in conditionings]
    negatives = [conditioning.negative_tokens for conditioning in conditionings]
    return {
        "n_tokens": [prompt.n_tokens if prompt else None for prompt in prompts],
        "truncated": [prompt.truncated if prompt else None for prompt in prompts],
        "negative_truncated": [negative.truncated if negative else None for negative in negatives],
    }


def group_rows(conditionings: Sequence[Conditioning]) -> list[list[int]]:
    """Group the batch's rows by what can go through the UNet together."""
    rows: dict[tuple[int, bool], list[int]] = {}
    for row, conditioning in enumerate(conditionings):
        rows.setdefault(conditioning.batch_key, []).append(row)
    return list(rows.values())


def is_invalid_image(pixels: Tensor) -> Tensor:
    """Return which images [B, H, W, 3] are NaN, infinite or a single flat colour: bool [B]."""
    flat = pixels.flatten(1)
    return ~flat.isfinite().all(dim=1) | (flat.amax(dim=1) == flat.amin(dim=1))


def rows_where(mask: Tensor) -> list[int]:
    """Return the rows for which a mask [B] is true."""
    return [row for row, is_true in enumerate(mask.tolist()) if is_true]


def make_generator(rng: Rng, seed: int) -> NoiseGenerator:
    """Return the generator of an image's noise."""
    return CudaNoiseGenerator(int(seed)) if rng == "cuda" else Generator("cpu").manual_seed(int(seed))
