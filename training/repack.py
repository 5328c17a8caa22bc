"""Calibrate the embedded model's UNet from its float weights: the file that ships, and the report on it.

    python -m training.repack [--build FOLDER]
    python -m training.repack --measure           only update the measurements in the report

Needs only files of the repository and about ten minutes, no art. After a stop the same command resumes.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch

from tinysd_batch.cli.quantize import quantize_and_report
from tinysd_batch.quantize.calibration.trajectories import HELD_OUT_SEED_OFFSET, generate_held_out_trajectories
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.evaluate.compare import compare_models
from tinysd_batch.quantize.evaluate.sensitivity import measure_sensitivity
from tinysd_batch.quantize.presets import SizeTarget
from tinysd_batch.quantize.recipe import read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.report.quantization.report import update_measurements

HERE = Path(__file__).parent
EMBEDDED = HERE.parent / "tinysd_batch" / "embedded" / "model"
WEIGHTS, REPORT = HERE / "weights", HERE / "report"
RECIPE = HERE.parent / "configs" / "quantize" / "embedded.toml"
MAX_UNET_BYTES = 4_721_920  # size of the UNet's file with all layers at 2 bits and preset tiny's group sizes


def float_folder(folder: Path) -> Path:
    """Write the embedded model with its float UNet to a folder, unless the folder exists."""
    if not folder.exists():
        shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("unet", "README.md"))
        shutil.copytree(WEIGHTS / "unet", folder / "unet")
    return folder


def repack(build: Path) -> None:
    """Replace the UNet that ships, the report on it and the digests."""
    calibrated, floats = build / "calibrated", build / "floats"
    shutil.rmtree(calibrated, ignore_errors=True)
    shutil.rmtree(floats, ignore_errors=True)
    float_folder(floats)
    quantize_and_report(
        floats,
        calibrated,
        SourceOptions(),
        "calib",
        RECIPE,
        "cpu",
        SizeTarget(max_bytes=MAX_UNET_BYTES),
        noise_correction=True,
    )
    for source, target in ((calibrated / "unet", EMBEDDED / "unet"), (calibrated / "report", REPORT)):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    write_digests()


def update_shipped_report(build: Path) -> None:
    """Measure the model that ships, and update errors, images and sensitivity in its report."""
    recipe, cpu = read_recipe(RECIPE), torch.device("cpu")
    folder = float_folder(build / "floats")
    component = open_source(folder, SourceOptions()).unet()
    unet = SegmentedUNet(component.config, component.tensors, cpu, component.release)
    held_out = generate_held_out_trajectories(unet, folder, recipe)
    comparison = compare_models(EMBEDDED, held_out, recipe.seed + HELD_OUT_SEED_OFFSET, recipe.scale, cpu)
    sensitivities = measure_sensitivity(component, EMBEDDED / "unet", held_out, recipe.scale, cpu)
    update_measurements(REPORT, comparison, sensitivities)


def write_digests() -> None:
    """Write the SHA-256 of all weight files, here and in the package."""
    digests = {
        str(path.relative_to(HERE.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in (EMBEDDED, WEIGHTS)
        for path in sorted(folder.rglob("*.safetensors"))
    }
    (HERE / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder for intermediate results")
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    (update_shipped_report if arguments.measure else repack)(arguments.build)


if __name__ == "__main__":
    main()
