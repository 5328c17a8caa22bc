"""Train a classifier of emoji images: a small convolutional network that sees the real images only.

    python -m training.judge [--build FOLDER] [--minutes 12]

It never sees a generated image, and shares nothing with the embedded model but the real images of `training.data`. It
learns their names from augmented copies: moved, rotated, scaled, mirrored, blurred, with noise, in other brightness and
colours. An image is recognized if the likeliest name is the one in its prompt.
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
LABEL_SMOOTHING = 0.1
ROTATION, SHIFT, SCALE, SHEAR = math.radians(12), 0.12, 0.15, 0.1  # maxima; shift as a share of half the image
BRIGHTNESS, TINT = 0.15, 0.1  # maximum change of all channels, of each channel
NOISE, BLUR = 0.08, 1.0  # maxima: standard deviation of noise, share of a 3x3 mean
CHECKED = 2_000  # augmented images on which the classifier is tested at the end
PROGRESS_INTERVAL_S = 60.0


class EmojiClassifier:
    """Recognizes which emoji an image shows."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        self.network = network.eval()
        self.names = names

    @torch.no_grad()
    def recognize(self, images: npt.NDArray[np.float32]) -> list[str]:
        """Return the likeliest name of each image [N, 64, 64, 3] in 0..1."""
        labels = self.network(to_tensor(images)).argmax(dim=1)
        return [self.names[label] for label in labels.tolist()]


def build_network(classes: int) -> nn.Module:
    """Build a network from images [N, 3, 64, 64] in -1..1 to logits [N, classes]."""
    layers: list[nn.Module] = []
    channels = 3
    for width in WIDTHS:
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * channels, classes)
    )


def to_tensor(images: npt.NDArray[np.float32]) -> Tensor:
    """Convert [N, H, W, 3] in 0..1 to [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1


def augment(images: Tensor) -> Tensor:
    """Change each image [N, 3, H, W] in -1..1 at random without changing what it shows."""
    count = len(images)
    moved = F.grid_sample(images - 1, make_affine_grids(count, images.shape), align_corners=False) + 1  # white outside
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moved = torch.lerp(moved, blurred, BLUR * torch.rand(count, 1, 1, 1))
    contrast = 1 + BRIGHTNESS * random_offsets(count, 1) + TINT * random_offsets(count, 3)
    moved = moved * contrast + BRIGHTNESS * random_offsets(count, 1) + TINT * random_offsets(count, 3)
    return (moved + NOISE * torch.rand(count, 1, 1, 1) * torch.randn_like(moved)).clamp(-1, 1)


def make_affine_grids(count: int, shape: torch.Size) -> Tensor:
    """Make random sampling grids that rotate, shear, scale, mirror and shift."""
    angle, shear = ROTATION * random_offsets(count), SHEAR * random_offsets(count)
    scale_x, scale_y = 1 + SCALE * random_offsets(count), 1 + SCALE * random_offsets(count)
    mirror = (torch.rand(count) < 0.5).float() * 2 - 1
    top = torch.stack([mirror * scale_x * angle.cos(), shear - angle.sin(), SHIFT * random_offsets(count)], dim=1)
    bottom = torch.stack([mirror * angle.sin(), scale_y * angle.cos(), SHIFT * random_offsets(count)], dim=1)
    return F.affine_grid(torch.stack([top, bottom], dim=1), [count, *shape[1:]], align_corners=False)


def random_offsets(count: int, channels: int | None = None) -> Tensor:
    """Return random numbers in -1..1, [count] or [count, channels, 1, 1]."""
    return torch.rand(count, *(() if channels is None else (channels, 1, 1))) * 2 - 1


def read_training_set(build: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Read all real images [N, 3, H, W], their labels [N], and the name of each label."""
    images, emojis = data.read_dataset(build)
    names = sorted({emoji.concept for emoji in emojis})
    labels = torch.tensor([names.index(emoji.concept) for emoji in emojis])
    return to_tensor(images.astype(np.float32) / 255), labels, names


def train(build: Path, minutes: float) -> None:
    """Train for this many minutes of CPU time, and save `judge.pt`."""
    images, labels, names = read_training_set(build)
    torch.manual_seed(0)
    network = build_network(len(names))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    started_at, reported_at, step, mean_loss = time.process_time(), 0.0, 0, 0.0
    while (progress := (time.process_time() - started_at) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * progress))
        rows = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(network(augment(images[rows])), labels[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        mean_loss = 0.98 * mean_loss + 0.02 * loss.item() if step > 1 else loss.item()
        if time.monotonic() - reported_at > PROGRESS_INTERVAL_S:
            reported_at = time.monotonic()
            print(f"judge step {step}  {progress:.0%}  loss {mean_loss:.3f}", flush=True)
    checkpoints.save({"network": network.state_dict(), "names": names}, build / FILE)
    print_accuracy(network.eval(), images, labels)


@torch.no_grad()
def print_accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    accuracy = (network(images).argmax(dim=1) == labels).float().mean()
    rows = torch.randint(len(images), (CHECKED,))
    augmented_accuracy = (network(augment(images[rows])).argmax(dim=1) == labels[rows]).float().mean()
    print(
        f"the classifier recognizes {accuracy:.1%} of {len(images)} real images, "
        f"{augmented_accuracy:.1%} of {CHECKED:,} augmented ones",
        flush=True,
    )


def read_classifier(build: Path) -> EmojiClassifier:
    """Read the trained classifier. Raises SystemExit with advice if there is none."""
    state: dict[str, Any] | None = checkpoints.load(build / FILE)
    if state is None:
        raise SystemExit(f"{build / FILE}: missing; python -m training.judge --build {build} creates it")
    network = build_network(len(state["names"]))
    network.load_state_dict(state["network"])
    return EmojiClassifier(network, state["names"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder with the images of training")
    parser.add_argument("--minutes", type=float, default=12.0, help="CPU time to train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.build, arguments.minutes)


if __name__ == "__main__":
    main()
