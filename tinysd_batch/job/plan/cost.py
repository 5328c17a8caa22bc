"""Estimate the cost of generating images, as megapixels through the UNet: equal costs take a worker equally long."""

from tinysd_batch.records import ImageRequest, MicroBatch

DECODE_COST_IN_UNET_PASSES = 4  # decoding takes about as long as 4 passes through the UNet
TWO_PASS_SAMPLERS = ("heun", "dpm2", "dpm2_a")  # samplers that call the UNet twice per step


def estimate_batch_cost(batch: MicroBatch) -> float:
    """Return the cost of all images of the batch, including those that are not wanted."""
    return sum(estimate_image_cost(image) for image in batch.images)


def estimate_image_cost(image: ImageRequest) -> float:
    settings = image.settings
    passes = settings.steps * (2 if settings.sampler in TWO_PASS_SAMPLERS else 1) * (2 if settings.is_guided else 1)
    return settings.width * settings.height * (passes + DECODE_COST_IN_UNET_PASSES) / 1e6
