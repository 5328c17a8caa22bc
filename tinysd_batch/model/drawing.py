"""A batch of images: what is asked of it, where its noise comes from, and what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Generator, Tensor

from tinysd_batch.errors import UsageError
from tinysd_batch.model.philox import CudaNoise
from tinysd_batch.model.samplers import Callback, Noise, draw_noise
from tinysd_batch.model.text import Condition

OutputType = Literal["pil", "np", "latent"]
Rng = Literal["cpu", "cuda"]


@dataclass(slots=True)
class Generated:
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


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is asked of a batch, besides its prompts checked and filled in."""

    conditions: Sequence[Condition]
    seeds: Sequence[int]
    height: int
    width: int
    steps: int
    sampler: str
    eta: float
    noise_seed: int | Sequence[int] | None
    rng: Rng
    latents: Tensor | None
    callback: Callback | None

    def generators(self, rows: Sequence[int]) -> list[Noise]:
        return [new_generator(self.rng, self.seeds[row]) for row in rows]

    def starting_noise(self, channels: int, factor: int, rows: Sequence[int], generators: Sequence[Noise]) -> Tensor:
        """Unit noise [B, C, h, w]. With a seed of its own the generators' first draw is left out, not put off."""
        if self.latents is not None:
            return self.latents[list(rows)].float()
        shape = (channels, self.height // factor, self.width // factor)
        own = draw_noise(generators, shape)
        if self.noise_seed is None:
            return own
        seeds = spread(self.noise_seed, len(self.seeds))
        return draw_noise([new_generator(self.rng, seeds[row]) for row in rows], shape)


def batch_size(deciding: Mapping[str, object], others: Mapping[str, object]) -> int:
    """The longest of the arguments that decide it. Raises UsageError for one that goes with neither one nor all."""
    size = max(length(value) for value in deciding.values())
    for name, value in {**deciding, **others}.items():
        if (count := length(value)) not in (1, size):
            raise UsageError(f"{name}: {count} given for a batch of {size}; give one, or one each")
    return size


def length(value: object) -> int:
    """How many images an argument speaks of; 1 for single values."""
    if isinstance(value, Tensor):
        return value.shape[0]
    return len(value) if isinstance(value, Sequence) and not isinstance(value, str) else 1


def spread(value: Any, size: int) -> list[Any]:
    """A list of `size` values from one value, or from one each."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return values * size if len(values) == 1 else values


def rows_together(conditions: Sequence[Condition]) -> list[list[int]]:
    """The batch's rows, those together that can go through the UNet in one batch."""
    rows: dict[tuple[int, bool], list[int]] = {}
    for row, condition in enumerate(conditions):
        rows.setdefault(condition.kind, []).append(row)
    return list(rows.values())


def rows_that(which: Tensor) -> list[int]:
    """The rows for which a truth value [B] holds."""
    return [row for row, holds in enumerate(which.tolist()) if holds]


def new_generator(rng: Rng, seed: int) -> Noise:
    """Where an image's noise comes from."""
    return CudaNoise(int(seed)) if rng == "cuda" else Generator("cpu").manual_seed(int(seed))
