"""The records that travel between manifest, plan, worker and results. Plain data: no library, no behaviour."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """What became of an image, or of a manifest row that is none."""

    OK = "ok"
    FAILED = "failed"
    INVALID = "invalid"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What all images of one micro-batch share, besides guidance being on or off."""

    width: int  # pixels
    height: int  # pixels
    steps: int
    sampler: str
    eta: float


@dataclass(frozen=True, slots=True)
class Row:
    """A valid line of the manifest with every setting filled in; `seed` is None where the manifest gives none."""

    number: int  # from 1, not counting the header
    prompt: str
    negative_prompt: str
    seed: int | None
    scale: float
    n_iter: int
    n_samples: int
    params: SamplingParams
    prompt_syntax: str = "seed"
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # columns we do not know, kept for the results


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A line of the manifest that cannot be made, and every reason why."""

    number: int
    reason: str
    prompt: str | None = None
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    line: int | None = None  # of the file, from 1, where the row starts; None where a file has no lines


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One prompt with one seed."""

    index: int  # the image's number in the job, from 1
    row: int
    sample: int  # the image's number within its row, from 1
    prompt: str
    negative_prompt: str
    seed: int
    scale: float
    params: SamplingParams
    image_id: str  # 32 hex digits
    file_name: str  # relative to the job folder, POSIX
    prompt_syntax: str = "seed"
    noise_seed: int | None = None  # of the starting noise, where it is not `seed`
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Images that go through the model together.

    `wanted` names the indexes still to be made. The others ride along, so that a resumed run puts an image through the
    model in the same company as an uninterrupted one, and both give the same pixels.
    """

    images: tuple[ImageRequest, ...]
    wanted: frozenset[int]


@dataclass(slots=True)
class ImageResult:
    """What became of one image. Times in seconds, memory in bytes."""

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
    truncated: str | None = None  # the part of the prompt that the text encoder never saw
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
