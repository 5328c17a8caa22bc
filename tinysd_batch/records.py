"""Records passed between manifest, plan, workers, model and results. Plain data."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tinysd_batch.settings.schema import ImageSettings


class Status(StrEnum):
    """The outcome of an image, or of an invalid manifest row."""

    OK = "ok"
    FAILED = "failed"
    INVALID = "invalid"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Row:
    """A valid row of the manifest. Its settings are complete; `seed` is None if the manifest has none."""

    number: int  # from 1, not counting the header
    prompt: str
    settings: ImageSettings
    seed: int | None = None
    n_iter: int = 1
    n_samples: int = 1
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # unknown columns, copied to the results

    @property
    def n_images(self) -> int:
        return self.n_iter * self.n_samples


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A row of the manifest that cannot be generated, and all reasons."""

    number: int
    reason: str
    prompt: str | None = None
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    line: int | None = None  # of the file where the row starts, from 1; None if the format has no lines


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One prompt with one seed: the record of an image from the manifest to its metadata."""

    prompt: str
    seed: int
    settings: ImageSettings
    noise_seed: int | None = None  # of the initial noise, if it is not `seed`
    image_id: str = ""  # 32 hex digits
    index: int = 1  # the image's number in the job, from 1
    row: int = 1
    sample: int = 1  # the image's number within its row, from 1
    file_name: str = ""  # relative to the job folder, POSIX
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def initial_noise_seed(self) -> int:
        return self.seed if self.noise_seed is None else self.noise_seed


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Images generated in one model call.

    `wanted` has the indexes that are still to be generated. The others are generated again and discarded, so that a
    resumed run has the same micro-batches as an uninterrupted one, and both produce the same pixels.
    """

    images: tuple[ImageRequest, ...]
    wanted: frozenset[int]


@dataclass(slots=True)
class ImageResult:
    """The result of one image."""

    index: int
    status: Status
    file_name: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    error_class: str | None = None
    error_message: str | None = None
    attempts: int = 1
    degraded: list[str] = field(default_factory=list)
    n_tokens: int | None = None
    truncated: str | None = None  # the part of the prompt beyond the model's token limit
    negative_truncated: str | None = None
    precision: str | None = None
    device_name: str | None = None
    worker: str | None = None
    node: str | None = None
    text_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    peak_memory_bytes: int | None = None
    started_at: float | None = None  # seconds since the epoch
    finished_at: float | None = None
