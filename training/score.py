"""Score how often a model generates what its prompt names: `python -m training.score [--model FOLDER]`.

Each concept is generated in each of its styles. An image is right if the nearest of all real images (squared distance
of pixels, averaged to 4x4 blocks) shows that concept, and near if one of the five nearest does. Pairs of concept and
style that were held out from training are scored separately. Chance is 0.4 %.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinysd_batch import TinySD
from training import data

HERE = Path(__file__).parent
BATCH = 16
SEED = 1000


def compute_features(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Average images [N, 64, 64, 3] in 0..1 over blocks of 4x4 pixels, [N, 768]."""
    blocks = images.reshape(len(images), 16, 4, 16, 4, 3).mean(axis=(2, 4))
    return blocks.reshape(len(images), -1)


def generate_images(model: TinySD, emojis: list[data.Emoji]) -> npt.NDArray[np.float32]:
    batches = []
    for start in range(0, len(emojis), BATCH):
        batch = emojis[start : start + BATCH]
        prompts = [f"{emoji.concept}, {emoji.style} style" for emoji in batch]
        seeds = list(range(SEED + start, SEED + start + len(batch)))
        batches.append(model.generate(prompts, seeds, output_type="np").images)
    return np.concatenate(batches)


def print_score(
    name: str, model: TinySD, emojis: list[data.Emoji], real_features: npt.NDArray[np.float32], concepts: list[str]
) -> None:
    features = compute_features(generate_images(model, emojis))
    distances = ((features[:, None] - real_features[None]) ** 2).sum(axis=2)
    nearest = np.argsort(distances, axis=1)[:, :5]
    right = [concepts[indexes[0]] == emoji.concept for indexes, emoji in zip(nearest, emojis, strict=True)]
    near = [
        emoji.concept in {concepts[index] for index in indexes} for indexes, emoji in zip(nearest, emojis, strict=True)
    ]
    print(
        f"{name:<24} {len(emojis):4} images   right {np.mean(right):4.0%}   among five {np.mean(near):4.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder with the images of training")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--every", type=int, default=4, help="generate only every Nth of the pairs used in training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real_images, emojis = data.read_dataset(arguments.build)
    real_features = compute_features(real_images.astype(np.float32) / 255)
    concepts = [emoji.concept for emoji in emojis]
    model = TinySD.from_pretrained(arguments.model, device="cpu")
    trained = [emoji for emoji in emojis if not emoji.held_out][:: arguments.every]
    print_score("pairs used in training", model, trained, real_features, concepts)
    print_score("held-out pairs", model, [emoji for emoji in emojis if emoji.held_out], real_features, concepts)


if __name__ == "__main__":
    main()
