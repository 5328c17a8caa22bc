"""Count the work of a micro-batch in passes through the UNet."""

from tinysd_batch.records import ImageRequest, MicroBatch

DECODE_COST_IN_UNET_PASSES = 4  # decoding takes as long as so many passes through the UNet, about

TWO_PASS_SAMPLERS = ("heun", "dpm2", "dpm2_a")  # samplers that ask the UNet twice a step


def estimate_batch_cost(batch: MicroBatch) -> float:
    """Megapixels through the UNet for all images of the batch, those that ride along too."""
    return sum(estimate_image_cost(image) for image in batch.images)


def estimate_image_cost(image: ImageRequest) -> float:
    params = image.params
    passes = params.steps * (2 if params.sampler in TWO_PASS_SAMPLERS else 1) * (1 if image.scale == 1 else 2)
    return params.width * params.height * (passes + DECODE_COST_IN_UNET_PASSES) / 1e6
