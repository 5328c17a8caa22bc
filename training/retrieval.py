"""Whether packed models' pictures are as recognisable as the float model's: pairs of the same prompts and seeds.

    python -m training.retrieval FLOAT_FOLDER PACKED_FOLDER... [--seeds 2] [--steps 10] [--build FOLDER] [--out FOLDER]

Two judges, neither of which has seen what a model drew: the classifier of `training.judge`, trained on the real
drawings, and the nearest of all real drawings by the features of `training.score`. A picture is recognised when the
judge says the name that was asked for. Printed for each packed model are both rates and their difference with a 95 %
interval of the paired differences (normal approximation). Pictures are kept in --out, and drawn once only.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinysd_batch import TinySD
from training import data, judge
from training.score import HERE, features

BATCH = 32
SEED = 5000
Pictures = npt.NDArray[np.float32]  # [N, 64, 64, 3] in 0..1
NamesOf = Callable[[Pictures], list[str]]


def draw(model: TinySD, asked: list[data.Picture], seed: int, steps: int) -> Pictures:
    """A picture of each name in its style; the first has this seed, the others those that follow."""
    drawn = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        prompts = [f"{picture.concept}, {picture.style} style" for picture in part]
        seeds = list(range(seed + start, seed + start + len(part)))
        made = model.generate(prompts, seeds, sampler="ddim", num_inference_steps=steps, output_type="np")
        drawn.append(made.images)
    return np.concatenate(drawn)


def drawn_once(folder: Path, asked: list[data.Picture], seed: int, steps: int, out: Path) -> Pictures:
    """The same, or what an earlier call drew with this very model."""
    model = TinySD.from_pretrained(folder, device="cpu")
    file = out / f"{model.info.digest}-{seed}-{steps}-{len(asked)}.npz"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, pictures=(draw(model, asked, seed, steps) * 255).round().astype(np.uint8))
    return np.load(file)["pictures"].astype(np.float32) / 255


def nearest_drawing(images: npt.NDArray[np.uint8], pictures: list[data.Picture]) -> NamesOf:
    """The judge that says the name of the real drawing that is nearest."""
    real = features(images.astype(np.float32) / 255)

    def names_of(drawn: Pictures) -> list[str]:
        distances = ((row - real) ** 2 for row in features(drawn))
        return [pictures[int(one.sum(axis=1).argmin())].concept for one in distances]

    return names_of


def compare(floats: npt.NDArray[np.bool_], packed: npt.NDArray[np.bool_]) -> str:
    """Both rates, and what was lost, of pairs [N] that were recognised or not."""
    lost = floats.astype(float) - packed
    spread = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
    return (
        f"{len(lost):,} pairs: float {floats.mean():.1%}, packed {packed.mean():.1%}; "
        f"lost {lost.mean():.1%} ({lost.mean() - spread:.1%} to {lost.mean() + spread:.1%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("floats", type=Path)
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="where training kept the drawings")
    parser.add_argument("--out", type=Path, default=Path("outputs/retrieval"), help="where pictures are kept")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each name and style")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, pictures = data.read(arguments.build)
    judges: dict[str, NamesOf] = {
        "classifier": judge.read(arguments.build).names_of,
        "nearest drawing": nearest_drawing(images, pictures),
    }
    asked = np.array([picture.concept for picture in pictures])
    seeds = [SEED + 10_000 * number for number in range(arguments.seeds)]
    found: dict[Path, dict[str, npt.NDArray[np.bool_]]] = {}
    for folder in (arguments.floats, *arguments.packed):
        drawn = [drawn_once(folder, pictures, seed, arguments.steps, arguments.out) for seed in seeds]
        found[folder] = {
            name: np.concatenate([np.array(names_of(some)) == asked for some in drawn])
            for name, names_of in judges.items()
        }
        for name in judges if folder != arguments.floats else ():
            line = compare(found[arguments.floats][name], found[folder][name])
            print(f"{folder.name}, {name}: {line}", flush=True)


if __name__ == "__main__":
    main()
