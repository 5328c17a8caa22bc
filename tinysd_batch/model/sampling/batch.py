"""A batch of images: what is asked of it, where its noise comes from, and what came of it."""

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
from tinysd_batch.model.text.encoder import Conditioning
from tinysd_batch.records import ImageRequest, SamplingParams
from tinysd_batch.storage.atomic import write_atomically

OutputType = Literal["pil", "np", "latent"]


@dataclass(slots=True)
class GenerationOutput:
    """What `TinySD.generate` made. Lists have one entry per image; times are seconds for the whole batch."""

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
        return [each["seed"] for each in self.settings]

    def save(self, path: str | Path, quality: int = 90) -> list[Path]:
        """Write the images with their settings inside, as jobs do, and return where they are.

        Args:
            path: a name that ends in .png, .jpg or .webp; of several images each gets its number before the suffix.
            quality: of .jpg and .webp, 1 to 100.

        Raises:
            UsageError: the suffix is another one, or the output is not PIL images.
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
        kind = FileFormat(suffix, quality)
        for image, settings, each in zip(self.images, self.settings, paths, strict=True):
            write_atomically(encode_image(image, kind, format_parameters(settings), {"schema": 1, **settings}), each)
        return paths

    def attach_settings(self) -> None:
        """Give each PIL image its settings, in `info`."""
        for image, settings in zip(self.images, self.settings, strict=True):
            image.info |= {"parameters": format_parameters(settings), METADATA_KEY: settings}


def format_parameters(settings: dict[str, Any]) -> str:
    """An image's settings as AUTOMATIC1111's web UI writes them."""
    params = SamplingParams(**{name: settings[name] for name in ("width", "height", "steps", "sampler", "eta")})
    request = ImageRequest(
        1,
        1,
        1,
        settings["prompt"] or "",
        settings["negative_prompt"],
        settings["seed"],
        settings["scale"],
        params,
        "",
        "",
    )
    return format_webui_parameters(request, settings["model"], settings["model_digest"], settings["version"])


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """What is asked of a batch, with its prompts encoded."""

    conditions: Sequence[Conditioning]
    request: GenerationRequest
    callback: StepCallback | None

    def make_generators(self, rows: Sequence[int]) -> list[NoiseGenerator]:
        return [make_generator(self.request.rng, self.request.seeds[row]) for row in rows]

    def prepare_latents(
        self, channels: int, factor: int, rows: Sequence[int], generators: Sequence[NoiseGenerator]
    ) -> Tensor:
        """Unit noise [B, C, h, w]. With a seed of its own the generators' first draw is left out, not put off."""
        request = self.request
        if request.latents is not None:
            return request.latents[list(rows)].float()
        shape = (channels, request.height // factor, request.width // factor)
        own = sample_noise(generators, shape)
        if request.noise_seeds == request.seeds:
            return own
        return sample_noise([make_generator(request.rng, request.noise_seeds[row]) for row in rows], shape)


def group_rows(conditions: Sequence[Conditioning]) -> list[list[int]]:
    """The batch's rows, those together that can go through the UNet in one batch."""
    rows: dict[tuple[int, bool], list[int]] = {}
    for row, condition in enumerate(conditions):
        rows.setdefault(condition.batch_key, []).append(row)
    return list(rows.values())


def is_invalid_image(values: Tensor) -> Tensor:
    """Which of [B, H, W, 3] are NaN, infinite or one flat colour: bool [B]."""
    flat = values.flatten(1)
    return ~flat.isfinite().all(dim=1) | (flat.amax(dim=1) == flat.amin(dim=1))


def rows_where(which: Tensor) -> list[int]:
    """The rows for which a truth value [B] holds."""
    return [row for row, holds in enumerate(which.tolist()) if holds]


def make_generator(rng: Rng, seed: int) -> NoiseGenerator:
    """Where an image's noise comes from."""
    return CudaNoiseGenerator(int(seed)) if rng == "cuda" else Generator("cpu").manual_seed(int(seed))
