"""Calibrate the embedded model's UNet from its float weights: the file that ships, and the report on it.

    python -m training.repack [--build FOLDER]
    python -m training.repack --measure           only measure what ships anew, for the report

Needs what is in the repository, no art, and some ten minutes. Stopped at any point, the same command goes on.
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
MOST = 4_721_920  # bytes of the UNet's file: what all layers at 2 bits take in preset tiny's groups


def float_folder(folder: Path) -> Path:
    """The embedded model with the float UNet it is made from, in a folder; as it is if it is there."""
    if not folder.exists():
        shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("unet", "README.md"))
        shutil.copytree(WEIGHTS / "unet", folder / "unet")
    return folder


def repack(build: Path) -> None:
    """Replace the UNet that ships, its report and the digests."""
    calibrated, floats = build / "calibrated", build / "floats"
    shutil.rmtree(calibrated, ignore_errors=True)
    shutil.rmtree(floats, ignore_errors=True)
    float_folder(floats)
    quantize_and_report(
        floats, calibrated, SourceOptions(), "calib", RECIPE, "cpu", SizeTarget(max_bytes=MOST), noise_correction=True
    )
    for made, place in ((calibrated / "unet", EMBEDDED / "unet"), (calibrated / "report", REPORT)):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made, place)
    write_digests()


def measure_shipped(build: Path) -> None:
    """Bring the report's errors, pictures and sensitivity up to what is measured now."""
    recipe, cpu = read_recipe(RECIPE), torch.device("cpu")
    floats = float_folder(build / "floats")
    part = open_source(floats, SourceOptions()).unet()
    held = generate_held_out_trajectories(SegmentedUNet(part.config, part.tensors, cpu, part.release), floats, recipe)
    errors = compare_models(EMBEDDED, held, recipe.seed + HELD_OUT_SEED_OFFSET, recipe.scale, cpu)
    update_measurements(REPORT, errors, measure_sensitivity(part, EMBEDDED / "unet", held, recipe.scale, cpu))


def write_digests() -> None:
    """The sha256 of all weight files, here and in the package."""
    digests = {
        str(path.relative_to(HERE.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in (EMBEDDED, WEIGHTS)
        for path in sorted(folder.rglob("*.safetensors"))
    }
    (HERE / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="where the work is kept")
    parser.add_argument("--measure", action="store_true")
    given = parser.parse_args()
    (measure_shipped if given.measure else repack)(given.build)


if __name__ == "__main__":
    main()
