"""What a worker does when memory does not suffice: the ladder it goes down, and how far each shape took it."""

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
    """A setting of the model that takes less memory and more time."""

    name: str  # as the results table says it in `degraded`
    attribute: str  # of TinySD, dotted
    value: Any

    def resolve_attribute(self, model: object) -> tuple[Any, str]:
        path, _, name = self.attribute.rpartition(".")
        return (attrgetter(path)(model) if path else model), name

    def is_applicable(self, model: object) -> bool:
        """Whether the model knows the setting and has it otherwise."""
        try:
            owner, name = self.resolve_attribute(model)
            return bool(getattr(owner, name) != self.value)
        except AttributeError:
            return False


# Down from the least slow. Halving the batch comes before all of them; a setting that the model does not know is
# passed over.
OOM_FALLBACKS = (
    OomFallback(
        "smaller_parts", "planner.max_chunk_bytes", SMALL_CHUNK_BYTES
    ),  # of attention, feed-forward layers and the VAE
    OomFallback("unet_rows_one_by_one", "unet_bs", 1),
    OomFallback("weights_streamed", "offloader.stream_all_weights", True),
)
BATCH_HALVED, BATCH_SPLIT = "batch_halved", "batch_split"  # for want of memory, and after another failure

ImageShape = tuple[int, int, bool]  # width, height, guided: what decides how much memory an image takes


def get_image_shape(image: ImageRequest) -> ImageShape:
    return image.params.width, image.params.height, image.scale != 1


@dataclass(slots=True)
class MemoryLimits:
    """How one shape fits on this card."""

    max_batch: int | None = None  # images at once
    fallbacks: list[OomFallback] = field(default_factory=list)

    def next_fallback(self, images: int, model: object) -> bool:
        """Go one step down after `images` at once were too many; False at the bottom."""
        if images > 1:
            self.max_batch = images // 2
            return True
        for saving in OOM_FALLBACKS:
            if saving not in self.fallbacks and saving.is_applicable(model):
                self.fallbacks.append(saving)
                return True
        return False

    @contextlib.contextmanager
    def apply(self, model: object) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for saving in self.fallbacks:
                owner, name = saving.resolve_attribute(model)
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, saving.value)
            yield

    def fallback_names(self) -> list[str]:
        """What the results table is told of an image made with these savings."""
        return [saving.name for saving in self.fallbacks]


def split_evenly(images: Sequence[ImageRequest], most: int | None) -> list[Sequence[ImageRequest]]:
    """The images, at most so many together, in parts as equal as may be."""
    if most is None or len(images) <= most:
        return [images]
    count = -(-len(images) // most)
    bounds = [len(images) * number // count for number in range(count + 1)]
    return [images[start:end] for start, end in pairwise(bounds)]
