"""A classifier that judges drawings: a small convolutional network trained on the real drawings alone.

    python -m training.judge [--build FOLDER] [--minutes 12]

It never sees what a model drew, and shares nothing with the embedded model but the real drawings, which it learns by
their names as `training.data` rendered them, changed a little each time: moved, turned, scaled, mirrored, blurred, with
noise, in other light and colours. A picture is recognised when the name that it finds likeliest is the one asked for.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import checkpoints, data

HERE = Path(__file__).parent
FILE = "judge.pt"
WIDTHS = (32, 64, 128, 256)
BATCH = 64
LEARNING_RATE = 2e-3
SMOOTHING = 0.1  # of the labels
TURN, SHIFT, SCALE, SHEAR = math.radians(12), 0.12, 0.15, 0.1  # at most; shift as a share of half the picture
LIGHT, TINT = 0.15, 0.1  # of all channels, of each
NOISE, BLUR = 0.08, 1.0  # standard deviation of noise, share of a 3x3 mean
CHECKED = 2_000  # changed real drawings that the judge is tried on in the end
TELL_EVERY_S = 60.0


class Judge:
    """Which name a picture shows."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        self.network = network.eval()
        self.names = names

    @torch.no_grad()
    def names_of(self, pictures: npt.NDArray[np.float32]) -> list[str]:
        """The likeliest name of each picture [N, 64, 64, 3] in 0..1."""
        likeliest = self.network(to_tensor(pictures)).argmax(dim=1)
        return [self.names[one] for one in likeliest.tolist()]


def new_network(classes: int) -> nn.Module:
    """Pictures [N, 3, 64, 64] in -1..1 to [N, classes]; batch norms, as its batches are of one kind."""
    layers: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    layers += [nn.Conv2d(before, before, 3, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * before, classes)
    )


def to_tensor(pictures: npt.NDArray[np.float32]) -> Tensor:
    """[N, H, W, 3] in 0..1 to [N, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


def changed(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in -1..1, each changed in ways that leave it what it is."""
    moved = F.grid_sample(pictures - 1, grids(len(pictures), pictures.shape), align_corners=False) + 1  # white outside
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moved = torch.lerp(moved, blurred, BLUR * torch.rand(len(pictures), 1, 1, 1))
    contrast = 1 + LIGHT * spread(len(pictures), 1) + TINT * spread(len(pictures), 3)
    moved = moved * contrast + LIGHT * spread(len(pictures), 1) + TINT * spread(len(pictures), 3)
    return (moved + NOISE * torch.rand(len(pictures), 1, 1, 1) * torch.randn_like(moved)).clamp(-1, 1)


def grids(count: int, shape: torch.Size) -> Tensor:
    """Where each pixel of a changed picture comes from."""
    turn, shear = TURN * spread(count), SHEAR * spread(count)
    across, down = 1 + SCALE * spread(count), 1 + SCALE * spread(count)
    mirror = (torch.rand(count) < 0.5).float() * 2 - 1
    top = torch.stack([mirror * across * turn.cos(), shear - turn.sin(), SHIFT * spread(count)], dim=1)
    bottom = torch.stack([mirror * turn.sin(), down * turn.cos(), SHIFT * spread(count)], dim=1)
    return F.affine_grid(torch.stack([top, bottom], dim=1), [count, *shape[1:]], align_corners=False)


def spread(count: int, channels: int | None = None) -> Tensor:
    """Numbers in -1..1, [count] or [count, channels, 1, 1]."""
    return torch.rand(count, *(() if channels is None else (channels, 1, 1))) * 2 - 1


def read_drawings(build: Path) -> tuple[Tensor, Tensor, list[str]]:
    """All real drawings [N, 3, H, W], the number of each one's name [N], and the names."""
    images, pictures = data.read(build)
    names = sorted({picture.concept for picture in pictures})
    numbers = torch.tensor([names.index(picture.concept) for picture in pictures])
    return to_tensor(images.astype(np.float32) / 255), numbers, names


def train(build: Path, minutes: float) -> None:
    """Train for so many minutes of this process's time, and save `judge.pt`."""
    drawings, numbers, names = read_drawings(build)
    torch.manual_seed(0)
    network = new_network(len(names))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    started, told, step, running = time.process_time(), 0.0, 0, 0.0
    while (progress := (time.process_time() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * progress))
        rows = torch.randint(len(drawings), (BATCH,))
        loss = F.cross_entropy(network(changed(drawings[rows])), numbers[rows], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        running = 0.98 * running + 0.02 * loss.item() if step > 1 else loss.item()
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            print(f"judge step {step}  {progress:.0%}  loss {running:.3f}", flush=True)
    checkpoints.save({"network": network.state_dict(), "names": names}, build / FILE)
    check(network.eval(), drawings, numbers)


@torch.no_grad()
def check(network: nn.Module, drawings: Tensor, numbers: Tensor) -> None:
    plain = (network(drawings).argmax(dim=1) == numbers).float().mean()
    rows = torch.randint(len(drawings), (CHECKED,))
    others = (network(changed(drawings[rows])).argmax(dim=1) == numbers[rows]).float().mean()
    print(
        f"the judge names {plain:.1%} of {len(drawings)} real drawings rightly, "
        f"{others:.1%} of {CHECKED:,} that were changed",
        flush=True,
    )


def read(build: Path) -> Judge:
    """The judge that was trained; the process ends with a word where there is none."""
    state: dict[str, Any] | None = checkpoints.load(build / FILE)
    if state is None:
        raise SystemExit(f"{build / FILE}: not there; python -m training.judge --build {build} makes it")
    network = new_network(len(state["names"]))
    network.load_state_dict(state["network"])
    return Judge(network, state["names"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="where training kept the drawings")
    parser.add_argument("--minutes", type=float, default=12.0, help="of the processor's time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.build, arguments.minutes)


if __name__ == "__main__":
    main()
