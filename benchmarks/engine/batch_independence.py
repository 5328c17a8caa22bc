"""How much an image depends on what it is generated with: the same images in other micro-batches, workers and orders.

Run: python -m benchmarks.engine.batch_independence [--model FOLDER] [--steps N]

All samplers, with eta 0.5 where it has an effect; prompts, negative prompts and scales are mixed. Each batch layout
generates the same 144 images and is compared with the first: the largest difference of any channel, in levels of 255,
and how many images differ at all.
"""

import argparse
import tempfile
from pathlib import Path

from tests.support.models.batch_layouts import LAYOUTS, ImagesById, compare_images, generate_with_layout
from tests.support.settings import make_settings
from tinysd_batch.settings.sampler_names import SAMPLERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    settings = make_settings(model=arguments.model, steps=arguments.steps, device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        first: ImagesById = {}
        for number, layout in enumerate(LAYOUTS):
            images = generate_with_layout(layout, settings, Path(scratch) / str(number))
            if not first:
                first = images
                print(f"{len(first)} images, {arguments.steps} steps, {len(SAMPLERS)} samplers, eta 0 and 0.5")
                continue
            largest, differing = compare_images(first, images)
            print(f"{layout.name:<40} largest difference {largest} of 255, in {differing} of {len(first)} images")


if __name__ == "__main__":
    main()
