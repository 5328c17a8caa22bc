"""Check whether a packed model's images are as recognizable as the float model's: pairs of the same prompts and seeds.

    python -m training.retrieval FLOAT_FOLDER PACKED_FOLDER... [--seeds 2] [--steps 10] [--build FOLDER] [--out FOLDER]

Two classifiers decide, neither of which has seen a generated image: that of `training.judge`, trained on the real
images, and the nearest real image by the features of `training.score`. An image is recognized if the classifier returns
the name in its prompt. For each packed model both rates are printed, and their difference with a 95 % interval of the
paired differences (normal approximation). Images are kept in --out and generated only once.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinysd_batch import TinySD
from training import data, judge
from training.score import HERE, compute_features

BATCH = 32
SEED = 5000
Images = npt.NDArray[np.float32]  # [N, 64, 64, 3] in 0..1
Recognize = Callable[[Images], list[str]]


def generate_images(model: TinySD, emojis: list[data.Emoji], seed: int, steps: int) -> Images:
    """Generate an image of each emoji; the first has this seed, the others those that follow."""
    batches = []
    for start in range(0, len(emojis), BATCH):
        batch = emojis[start : start + BATCH]
        prompts = [f"{emoji.concept}, {emoji.style} style" for emoji in batch]
        seeds = list(range(seed + start, seed + start + len(batch)))
        output = model.generate(prompts, seeds, sampler="ddim", num_inference_steps=steps, output_type="np")
        batches.append(output.images)
    return np.concatenate(batches)


def generate_or_load(folder: Path, emojis: list[data.Emoji], seed: int, steps: int, out: Path) -> Images:
    """Generate the images, or load what an earlier call generated with the same model."""
    model = TinySD.from_pretrained(folder, device="cpu")
    file = out / f"{model.info.digest}-{seed}-{steps}-{len(emojis)}.npz"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        images = (generate_images(model, emojis, seed, steps) * 255).round().astype(np.uint8)
        np.savez_compressed(file, pictures=images)
    return np.load(file)["pictures"].astype(np.float32) / 255


def make_nearest_classifier(real_images: npt.NDArray[np.uint8], emojis: list[data.Emoji]) -> Recognize:
    """Make a classifier that returns the name of the nearest real image."""
    real_features = compute_features(real_images.astype(np.float32) / 255)

    def recognize(images: Images) -> list[str]:
        distances = ((features - real_features) ** 2 for features in compute_features(images))
        return [emojis[int(distance.sum(axis=1).argmin())].concept for distance in distances]

    return recognize


def format_comparison(float_hits: npt.NDArray[np.bool_], packed_hits: npt.NDArray[np.bool_]) -> str:
    """Format both rates and their difference; hits [N] say which images were recognized."""
    lost = float_hits.astype(float) - packed_hits
    interval = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
    return (
        f"{len(lost):,} pairs: float {float_hits.mean():.1%}, packed {packed_hits.mean():.1%}; "
        f"lost {lost.mean():.1%} ({lost.mean() - interval:.1%} to {lost.mean() + interval:.1%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("floats", type=Path)
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder with the images of training")
    parser.add_argument("--out", type=Path, default=Path("outputs/retrieval"), help="folder for generated images")
    parser.add_argument("--seeds", type=int, default=2, help="images of each name and style")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real_images, emojis = data.read_dataset(arguments.build)
    classifiers: dict[str, Recognize] = {
        "classifier": judge.read_classifier(arguments.build).recognize,
        "nearest image": make_nearest_classifier(real_images, emojis),
    }
    concepts = np.array([emoji.concept for emoji in emojis])
    seeds = [SEED + 10_000 * number for number in range(arguments.seeds)]
    hits: dict[Path, dict[str, npt.NDArray[np.bool_]]] = {}
    for folder in (arguments.floats, *arguments.packed):
        image_sets = [generate_or_load(folder, emojis, seed, arguments.steps, arguments.out) for seed in seeds]
        hits[folder] = {
            name: np.concatenate([np.array(recognize(images)) == concepts for images in image_sets])
            for name, recognize in classifiers.items()
        }
        for name in classifiers if folder != arguments.floats else ():
            line = format_comparison(hits[arguments.floats][name], hits[folder][name])
            print(f"{folder.name}, {name}: {line}", flush=True)


if __name__ == "__main__":
    main()
