"""How often the model draws what it is asked for: `python -m training.score [--model FOLDER]`.

Each name is drawn in each of its styles; the drawing counts as right when, of all real drawings, the nearest one
(squared distance of pixels, averaged to 4x4 blocks) is of that name, and as near when one of the five nearest is. Pairs
of name and style that training never saw are counted apart. Chance is 0.4 %.
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


def features(pictures: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Pictures [N, 64, 64, 3] in 0..1 as averages of 4x4 pixels, [N, 768]."""
    blocks = pictures.reshape(len(pictures), 16, 4, 16, 4, 3).mean(axis=(2, 4))
    return blocks.reshape(len(pictures), -1)


def draw(model: TinySD, pictures: list[data.Picture]) -> npt.NDArray[np.float32]:
    drawn = []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        prompts = [f"{picture.concept}, {picture.style} style" for picture in part]
        seeds = list(range(SEED + start, SEED + start + len(part)))
        drawn.append(model.generate(prompts, seeds, output_type="np").images)
    return np.concatenate(drawn)


def report(
    name: str, model: TinySD, asked: list[data.Picture], real: npt.NDArray[np.float32], names: list[str]
) -> None:
    distances = ((features(draw(model, asked))[:, None] - real[None]) ** 2).sum(axis=2)
    nearest = np.argsort(distances, axis=1)[:, :5]
    right = [names[row[0]] == picture.concept for row, picture in zip(nearest, asked, strict=True)]
    near = [picture.concept in {names[one] for one in row} for row, picture in zip(nearest, asked, strict=True)]
    print(
        f"{name:<24} {len(asked):4} drawings   right {np.mean(right):4.0%}   among five {np.mean(near):4.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="where training kept the drawings")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--every", type=int, default=4, help="of the pairs that training saw, draw every so manieth")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, pictures = data.read(arguments.build)
    real, names = features(images.astype(np.float32) / 255), [picture.concept for picture in pictures]
    model = TinySD.from_pretrained(arguments.model, device="cpu")
    seen = [picture for picture in pictures if not picture.held_out][:: arguments.every]
    report("pairs that it learnt", model, seen, real, names)
    report("pairs it never saw", model, [picture for picture in pictures if picture.held_out], real, names)


if __name__ == "__main__":
    main()
