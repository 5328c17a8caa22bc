"""Describe in words how close a packed model's images are to the float model's."""

# PSNR of the median image in dB, and how it looks beside the float model's.
QUALITY_DESCRIPTIONS = (
    (35.0, "hard to distinguish from the float model's images"),
    (28.0, "close to the float model's images, small details differ"),
    (22.0, "subject and composition of the float model's images, details differ"),
    (16.0, "subject of the float model's images, often in another composition"),
    (float("-inf"), "often other images than the float model's"),
)


def describe_quality(psnr_db: float) -> str:
    return next(description for minimum_db, description in QUALITY_DESCRIPTIONS if psnr_db >= minimum_db)
