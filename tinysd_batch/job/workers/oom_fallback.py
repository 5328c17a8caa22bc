"""What a worker does when its device runs out of memory: OOM fallbacks, remembered for each image shape."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any

from tinysd_batch.model.chunking import SMALL_CHUNK_BYTES
from tinysd_batch.records import ImageRequest


@dataclass(frozen=True, slots=True)
class OomFallback:
    """A value of a model attribute that trades time for memory."""

    name: str  # as the results table has it in `degraded`
    attribute: str  # dotted path, from TinySD
    value: Any

    def resolve_attribute(self, model: object) -> tuple[Any, str]:
        """Return the object that has the attribute, and the attribute's last name."""
        path, _, name = self.attribute.rpartition(".")
        return (attrgetter(path)(model) if path else model), name

    def is_applicable(self, model: object) -> bool:
        """Whether the model has the attribute, with another value."""
        try:
            owner, name = self.resolve_attribute(model)
            return bool(getattr(owner, name) != self.value)
        except AttributeError:
            return False


# From the one that costs the least time. Halving the batch comes before all of them. A fallback whose attribute the
# model does not have is skipped. The first makes attention, feed-forward layers and the VAE use smaller chunks.
OOM_FALLBACKS = (
    OomFallback("smaller_parts", "planner.max_chunk_bytes", SMALL_CHUNK_BYTES),
    OomFallback("unet_rows_one_by_one", "unet_bs", 1),
    OomFallback("weights_streamed", "offloader.stream_all_weights", True),
)
BATCH_HALVED, BATCH_SPLIT = "batch_halved", "batch_split"  # after out-of-memory, and after another failure

ImageShape = tuple[int, int, bool]  # width, height, guided: what determines the memory that an image needs


def get_image_shape(image: ImageRequest) -> ImageShape:
    return image.settings.width, image.settings.height, image.settings.is_guided


@dataclass(slots=True)
class MemoryLimits:
    """What makes images of one shape fit the device's memory."""

    max_batch: int | None = None  # images per micro-batch; None: no limit is known
    fallbacks: list[OomFallback] = field(default_factory=list)

    def next_fallback(self, images: int, model: object) -> bool:
        """Add a fallback after `images` in one batch did not fit. Return False if there is none left."""
        if images > 1:
            self.max_batch = images // 2
            return True
        for fallback in OOM_FALLBACKS:
            if fallback not in self.fallbacks and fallback.is_applicable(model):
                self.fallbacks.append(fallback)
                return True
        return False

    @contextlib.contextmanager
    def apply(self, model: object) -> Iterator[None]:
        """Set the model's attributes as the fallbacks have them, and restore them at the end."""
        with contextlib.ExitStack() as stack:
            for fallback in self.fallbacks:
                owner, name = fallback.resolve_attribute(model)
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, fallback.value)
            yield

    def fallback_names(self) -> list[str]:
        """Return the `degraded` values of an image that was generated with these fallbacks."""
        return [fallback.name for fallback in self.fallbacks]


def split_evenly(images: Sequence[ImageRequest], max_batch: int | None) -> list[Sequence[ImageRequest]]:
    """Split the images into as few batches as `max_batch` allows, of sizes that differ by one at most."""
    if max_batch is None or len(images) <= max_batch:
        return [images]
    count = -(-len(images) // max_batch)
    bounds = [len(images) * number // count for number in range(count + 1)]
    return [images[start:end] for start, end in pairwise(bounds)]
