"""One sentence on how close a packed model's images are to the float model's."""

# The median image's PSNR in dB, and what it looks like side by side.
QUALITY_DESCRIPTIONS = (
    (35.0, "hard to tell from the float model's images"),
    (28.0, "close to the float model's images, small details differ"),
    (22.0, "subject and composition of the float model's images, details differ"),
    (16.0, "subject of the float model's images, often in another composition"),
    (float("-inf"), "often other images than the float model's"),
)


def describe_quality(psnr_db: float) -> str:
    return next(words for least, words in QUALITY_DESCRIPTIONS if psnr_db >= least)
