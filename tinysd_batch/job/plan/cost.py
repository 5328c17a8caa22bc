"""Count the work of a micro-batch in passes through the UNet."""

from tinysd_batch.records import ImageRequest, MicroBatch

DECODE_PASSES = 4  # decoding takes as long as so many passes through the UNet, about

TWO_PASSES = ("heun", "dpm2", "dpm2_a")  # samplers that ask the UNet twice a step


def work_of(batch: MicroBatch) -> float:
    """Megapixels through the UNet for all images of the batch, those that ride along too."""
    return sum(work_of_image(image) for image in batch.images)


def work_of_image(image: ImageRequest) -> float:
    params = image.params
    passes = params.steps * (2 if params.sampler in TWO_PASSES else 1) * (1 if image.scale == 1 else 2)
    return params.width * params.height * (passes + DECODE_PASSES) / 1e6
