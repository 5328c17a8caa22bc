"""A batch of images: its encoded prompts, its noise generators, and its output."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from tinysd_batch.errors import UsageError
from tinysd_batch.images import (
    METADATA_KEY,
    PILLOW_FORMATS,
    FileFormat,
    ModelLabel,
    describe_request,
    encode_image,
    format_webui_parameters,
)
from tinysd_batch.model.arguments import TensorArguments
from tinysd_batch.model.sampling.cuda_noise import CudaNoiseGenerator
from tinysd_batch.model.sampling.schedule import NoiseGenerator, StepCallback, sample_noise
from tinysd_batch.model.text.encoder import Conditioning
from tinysd_batch.records import ImageRequest
from tinysd_batch.settings.schema import ImageSettings
from tinysd_batch.storage.atomic import write_atomically

OutputType = Literal["pil", "np", "latent"]


@dataclass(slots=True)
class ImageOutput:
    """An image and how it was generated. Times are its share of the seconds of its batch."""

    request: ImageRequest
    image: Any  # a PIL image; float32 [H, W, 3] in 0..1 for "np"; float32 [4, h, w] for "latent"
    n_tokens: int | None  # None if an embedding was given instead of a prompt
    truncated: str | None
    negative_truncated: str | None
    degraded: list[str]
    precision: str  # of the UNet
    text_s: float
    denoise_s: float
    decode_s: float
    peak_memory_bytes: int


@dataclass(slots=True)
class GenerationOutput:
    """The output of `TinySD.generate`. Lists have one entry per image; times are seconds for the whole batch."""

    images: Any  # PIL images; float32 [B, H, W, 3] in 0..1 for "np"; float32 [B, 4, h, w] for "latent"
    outputs: list[ImageOutput]
    label: ModelLabel
    settings: list[dict[str, Any]] = field(default_factory=list)  # under the names of the results table

    @classmethod
    def from_outputs(cls, outputs: list[ImageOutput], label: ModelLabel, output_type: OutputType) -> Self:
        """Combine the outputs. Arrays and latents of different sizes stay a list."""
        images: Any = [output.image for output in outputs]
        if output_type != "pil" and len({image.shape for image in images}) == 1:
            images = np.stack(images) if output_type == "np" else torch.stack(images)
        settings = [describe_request(output.request, label) for output in outputs]
        for description, output in zip(settings, outputs, strict=True):
            if output.n_tokens is None:
                description["prompt"] = None
        generation = cls(images, outputs, label, settings)
        if output_type == "pil":
            generation.attach_settings()
        return generation

    @property
    def n_tokens(self) -> list[int | None]:
        return [output.n_tokens for output in self.outputs]

    @property
    def truncated(self) -> list[str | None]:
        return [output.truncated for output in self.outputs]

    @property
    def negative_truncated(self) -> list[str | None]:
        return [output.negative_truncated for output in self.outputs]

    @property
    def degraded(self) -> list[list[str]]:
        return [output.degraded for output in self.outputs]

    @property
    def precision(self) -> list[str]:
        return [output.precision for output in self.outputs]

    @property
    def text_s(self) -> float:
        return sum(output.text_s for output in self.outputs)

    @property
    def denoise_s(self) -> float:
        return sum(output.denoise_s for output in self.outputs)

    @property
    def decode_s(self) -> float:
        return sum(output.decode_s for output in self.outputs)

    @property
    def peak_memory_bytes(self) -> int:
        return max(output.peak_memory_bytes for output in self.outputs)

    @property
    def seeds(self) -> list[int]:
        return [output.request.seed for output in self.outputs]

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
        for output, settings, image_path in zip(self.outputs, self.settings, paths, strict=True):
            parameters = format_webui_parameters(output.request, self.label)
            data = encode_image(output.image, file_format, parameters, {"schema": 1, **settings})
            write_atomically(data, image_path)
        return paths

    def attach_settings(self) -> None:
        """Store its settings in each PIL image's `info`."""
        for output, settings in zip(self.outputs, self.settings, strict=True):
            output.image.info |= {
                "parameters": format_webui_parameters(output.request, self.label),
                METADATA_KEY: settings,
            }


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Images of one micro-batch, with their prompts encoded."""

    requests: Sequence[ImageRequest]
    conditionings: Sequence[Conditioning]  # one per image
    tensors: TensorArguments
    callback: StepCallback | None

    @property
    def settings(self) -> ImageSettings:
        """The settings of the first image; what the batch shares is the same for all."""
        return self.requests[0].settings

    def make_generators(self, rows: Sequence[int]) -> list[NoiseGenerator]:
        return [make_generator(self.requests[row].settings.rng, self.requests[row].seed) for row in rows]

    def prepare_latents(
        self, channels: int, vae_scale_factor: int, rows: Sequence[int], generators: Sequence[NoiseGenerator]
    ) -> Tensor:
        """Return the starting noise [B, C, h, w] of these rows, unit variance.

        The generators are advanced even if the starting noise has a seed of its own: all later noise stays the same.
        """
        if self.tensors.latents is not None:
            return self.tensors.latents[list(rows)].float()
        shape = (channels, self.settings.height // vae_scale_factor, self.settings.width // vae_scale_factor)
        noise = sample_noise(generators, shape)
        requests = [self.requests[row] for row in rows]
        if all(request.noise_seed is None for request in requests):
            return noise
        return sample_noise(
            [make_generator(request.settings.rng, request.initial_noise_seed) for request in requests], shape
        )


def group_by_batch_key(requests: Sequence[ImageRequest]) -> list[list[int]]:
    """Group images, by their position, that can be in one micro-batch."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(request.settings.batch_key, []).append(position)
    return list(groups.values())


def describe_tokens(conditioning: Conditioning) -> dict[str, Any]:
    """Return the fields of `ImageOutput` on tokens; None if an embedding was given instead of a prompt."""
    prompt, negative = conditioning.tokens, conditioning.negative_tokens
    return {
        "n_tokens": prompt.n_tokens if prompt else None,
        "truncated": prompt.truncated if prompt else None,
        "negative_truncated": negative.truncated if negative else None,
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


def make_generator(rng: str, seed: int) -> NoiseGenerator:
    """Return the generator of an image's noise."""
    return CudaNoiseGenerator(int(seed)) if rng == "cuda" else Generator("cpu").manual_seed(int(seed))
