"""Whether a packed model's pictures are as recognisable as the float model's: pairs of the same prompts and seeds.

    python -m training.retrieval FLOAT_FOLDER PACKED_FOLDER [--seeds 2] [--build FOLDER]

The judge is that of `training.score`, which knows nothing of either model: a picture is recognised when, of all real
drawings, the nearest one bears the name that was asked for. Printed are both rates and their difference with a 95 %
interval of the paired differences (normal approximation).
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinysd_batch import TinySD
from training import data
from training.score import HERE, features

BATCH = 32
SEED = 5000


def recognised(
    model: TinySD, asked: list[data.Picture], seed: int, real: npt.NDArray[np.float32], names: list[str]
) -> npt.NDArray[np.bool_]:
    """For each prompt whether its drawing is nearest to one of its name."""
    found = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        prompts = [f"{picture.concept}, {picture.style} style" for picture in part]
        seeds = list(range(seed + start, seed + start + len(part)))
        drawn = features(model.generate(prompts, seeds, sampler="ddim", output_type="np").images)
        nearest = ((drawn[:, None] - real[None]) ** 2).sum(axis=2).argmin(axis=1)
        found += [names[row] == picture.concept for row, picture in zip(nearest, part, strict=True)]
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("floats", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="where training kept the drawings")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each name and style")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, pictures = data.read(arguments.build)
    real, names = features(images.astype(np.float32) / 255), [picture.concept for picture in pictures]
    models = [TinySD.from_pretrained(folder, device="cpu") for folder in (arguments.floats, arguments.packed)]
    pairs = []
    for number in range(arguments.seeds):
        seed = SEED + 10_000 * number
        pairs.append(np.stack([recognised(model, pictures, seed, real, names) for model in models]))
        floats, packed = np.concatenate(pairs, axis=1).astype(float)
        lost = floats - packed
        spread = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
        print(
            f"{len(lost):,} pairs: float {floats.mean():.1%}, packed {packed.mean():.1%}; "
            f"lost {lost.mean():.1%} ({lost.mean() - spread:.1%} to {lost.mean() + spread:.1%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
