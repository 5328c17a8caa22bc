"""Quantizers on the same model, measured on the same held-out prompts: one table, one sheet of pictures.

    python -m benchmarks.quantize.compare_quantizers                       the embedded model's float weights
    python -m benchmarks.quantize.compare_quantizers --model MINE          a checkpoint or float folder of your own
        --recipe FILE     prompts to calibrate and to measure with (default: configs/quantize/embedded.toml; for --model
                          the one that ships for SD v1)
        --peers PYTHON    interpreter of an environment with torch, diffusers, hqq, optimum-quanto and sdnq; without it
                          they are not measured
        --prompts N       measure on the first N held-out prompts only
        --only A,B        these methods only

Every method packs the same layers; first and last layer, time embedding, norms and biases are float16 in all. Each is
asked for what its weights are worth as floats, and these are measured by the same engine: decibels of signal to noise
of the guided noise prediction (mean over times) and of the final latents, PSNR and, with torchmetrics, SSIM of the
pictures, all against the float model. Results are kept in --out, so that a second call measures only what is missing.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import adaround
from tests.support.paths import ROOT
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.packed.format import from_matrix, to_matrix
from tinysd_batch.quantize.bit_allocation import select_smallest_layouts
from tinysd_batch.quantize.calibrated import quantize_with_calibration
from tinysd_batch.quantize.calibration.trajectories import (
    HELD_OUT_SEED_OFFSET,
    Trajectories,
    generate_trajectories,
    select_spaced_inputs,
)
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.convert import convert_model
from tinysd_batch.quantize.data_free import quantize_model
from tinysd_batch.quantize.evaluate.compare import ModelComparison, compare_models
from tinysd_batch.quantize.layers import get_layer
from tinysd_batch.quantize.presets import SizeTarget, compute_unet_bytes, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.report.quantization.similarity import mean_ssim
from training.repack import EMBEDDED as SHIPPED
from training.repack import float_folder

CPU = torch.device("cpu")
Method = Callable[["QuantizerBenchmark", Path], int]  # makes a model folder, returns the bytes of the layers it packed
EMBEDDED = "embedded-floats"  # the folder of the embedded model's float weights
TINY_STABLE_DIFFUSION_BYTES, QUANTO_BYTES = 3_875_232, 4_218_368  # of the layers that these methods pack in it
IMAGES_IN_SHEET = 10  # pictures of each method in the sheet
ADAROUND_PROMPTS = 32


@dataclass(frozen=True)
class QuantizerBenchmark:
    """What all methods share."""

    floats: Path  # a float model folder
    out: Path
    recipe: Recipe
    held_out: Trajectories
    names: list[str]  # layers to pack
    peers: Path | None


class MethodUnavailable(Exception):  # noqa: N818 - an answer, no error
    """Why a method is not in the table."""


# The methods


def data_free(size: SizeTarget) -> Method:
    def run_method(bench: QuantizerBenchmark, folder: Path) -> int:
        quantize_model(bench.floats, folder, SourceOptions(), lambda _: None, size)
        return count_packed_bytes(folder, bench.names)

    return run_method


def calibrated(size: SizeTarget, *, distill: bool = False) -> Method:
    def run_method(bench: QuantizerBenchmark, folder: Path) -> int:
        quantize_with_calibration(bench.floats, folder, SourceOptions(), bench.recipe, CPU, log, size=size, distill=distill)
        return count_packed_bytes(folder, bench.names)

    return run_method


def distilled(size: SizeTarget) -> Method:
    return calibrated(size, distill=True)


def at_preset_size(level: Callable[[SizeTarget], Method], preset: str) -> Method:
    """A level of ours at a target size: the bytes of a preset's file, spent by error per byte."""

    def run_method(bench: QuantizerBenchmark, folder: Path) -> int:
        part = open_source(bench.floats, SourceOptions()).unet()
        unet = SegmentedUNet(part.config, part.tensors, CPU).unet
        most = compute_unet_bytes(unet, get_preset_layouts(unet, preset))
        return level(SizeTarget(max_bytes=most))(bench, folder)

    return run_method


def at_layer_bytes(level: Callable[[SizeTarget], Method], most: int) -> Method:
    """A level of ours, its packed layers of at most so many bytes: those of another method on the embedded model."""

    def run_method(bench: QuantizerBenchmark, folder: Path) -> int:
        if bench.floats.name != EMBEDDED:
            raise MethodUnavailable("only with the embedded model")
        part = open_source(bench.floats, SourceOptions()).unet()
        unet = SegmentedUNet(part.config, part.tensors, CPU).unet
        least = select_smallest_layouts(unet, bench.recipe.block)
        packed = sum(layout.nbytes(*to_matrix(get_layer(unet, name).weight).shape) for name, layout in least.items())
        return level(SizeTarget(max_bytes=compute_unet_bytes(unet, least) + most - packed))(bench, folder)

    return run_method


def embedded_as_shipped(bench: QuantizerBenchmark, folder: Path) -> int:
    """The embedded model as it ships."""
    if bench.floats.name != EMBEDDED:
        raise MethodUnavailable("only with the embedded model")
    shutil.copytree(SHIPPED, folder)
    return count_packed_bytes(folder, bench.names)


def round_to_nearest(bench: QuantizerBenchmark, folder: Path) -> int:
    """Per output channel, between its least and largest weight."""
    found, total = {}, 0
    for name, weight in load_float_weights(bench).items():
        matrix = to_matrix(weight)
        low, high = matrix.amin(dim=1, keepdim=True), matrix.amax(dim=1, keepdim=True)
        step = ((high - low) / 3).clamp(min=1e-12)
        found[name] = from_matrix(((matrix - low) / step).round() * step + low, weight.shape)
        total += weight.numel() // 4 + 4 * len(weight)
    write_float_model(bench, folder, found)
    return total


def tiny_stable_diffusion(bench: QuantizerBenchmark, folder: Path) -> int:
    part = open_source(bench.floats, SourceOptions()).unet()
    walker = SegmentedUNet(part.config, part.tensors, CPU)
    few = bench.recipe.model_copy(update={"prompts": bench.recipe.prompts[:ADAROUND_PROMPTS]})
    drawn = generate_trajectories(walker, bench.floats, few, few.prompts, few.seed)
    found, total = adaround.quantize_layers(walker, select_spaced_inputs(drawn, 2), bench.names)
    write_float_model(bench, folder, found)
    return total


def peer_method(method: str) -> Method:
    def run_method(bench: QuantizerBenchmark, folder: Path) -> int:
        if bench.peers is None:
            raise MethodUnavailable("needs --peers")
        layers, weights = bench.out / "layers.json", bench.out / f"{method}.safetensors"
        layers.write_text(json.dumps(bench.names))
        script = Path(__file__).with_name("peers.py")
        command = [str(bench.peers), str(script), method, str(bench.floats / "unet"), str(layers), str(weights)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MethodUnavailable(done.stderr.strip().splitlines()[-1][:100] if done.stderr.strip() else "it failed")
        with safe_open(weights, framework="pt") as file:
            total = int(file.metadata()["bytes"])
        write_float_model(bench, folder, load_file(weights))
        return total

    return run_method


# In the table's order: what --only calls a method, its title, what it does.
METHODS: dict[str, tuple[str, Method]] = {
    "rtn": ("round to nearest, per channel", round_to_nearest),
    "origin": ("the origin's (L2.4, AdaRound)", tiny_stable_diffusion),
    "hqq": ("HQQ, groups of 64", peer_method("hqq")),
    "quanto": ("optimum-quanto int2", peer_method("quanto")),
    "sdnq": ("SDNQ uint2, its own groups", peer_method("sdnq")),
    "sdnq64": ("SDNQ uint2, groups of 64", peer_method("sdnq64")),
    "fast-origin": ("ours, fast, the origin's bytes", at_layer_bytes(data_free, TINY_STABLE_DIFFUSION_BYTES)),
    "fast": ("ours, fast, tiny", data_free(SizeTarget("tiny"))),
    "fast-default": ("ours, fast, default", data_free(SizeTarget())),
    "fast-default-size": ("ours, fast, as large as default", at_preset_size(data_free, "default")),
    "fast-quality": ("ours, fast, quality", data_free(SizeTarget("quality"))),
    "fast-quality-size": ("ours, fast, as large as quality", at_preset_size(data_free, "quality")),
    "calib-origin": ("ours, calib, the origin's bytes", at_layer_bytes(calibrated, TINY_STABLE_DIFFUSION_BYTES)),
    "calib-quanto": ("ours, calib, quanto's bytes", at_layer_bytes(calibrated, QUANTO_BYTES)),
    "calib": ("ours, calib, tiny", calibrated(SizeTarget("tiny"))),
    "calib-tiny-size": ("ours, calib, as large as tiny", at_preset_size(calibrated, "tiny")),
    "calib-default": ("ours, calib, default", calibrated(SizeTarget())),
    "calib-quality": ("ours, calib, quality", calibrated(SizeTarget("quality"))),
    "distill": ("ours, distill, tiny", distilled(SizeTarget("tiny"))),
    "distill-tiny-size": ("ours, distill, as large as tiny", at_preset_size(distilled, "tiny")),
    "shipped": ("embedded, as it ships", embedded_as_shipped),
}


def load_float_weights(bench: QuantizerBenchmark) -> dict[str, Tensor]:
    tensors = open_source(bench.floats, SourceOptions()).unet().tensors
    return {name: tensors[f"{name}.weight"].float() for name in bench.names}


def write_float_model(bench: QuantizerBenchmark, folder: Path, weights: dict[str, Tensor]) -> None:
    """The float model with these layers in place of its own."""
    shutil.copytree(bench.floats, folder, ignore=shutil.ignore_patterns(WEIGHTS_FILE + "*", "report"))
    for part in ("vae", "text_encoder"):
        shutil.copytree(bench.floats / part, folder / part, dirs_exist_ok=True)
    tensors = dict(open_source(bench.floats, SourceOptions()).unet().tensors)
    tensors |= {f"{name}.weight": value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "unet" / WEIGHTS_FILE)


def count_packed_bytes(folder: Path, names: list[str]) -> int:
    tensors = load_file(folder / "unet" / WEIGHTS_FILE)
    return sum(
        value.numel() * value.element_size()
        for name, value in tensors.items()
        if name.rpartition(".")[0] in names and not name.endswith(".bias")
    )


# Measuring


def run_method(bench: QuantizerBenchmark, name: str) -> dict[str, object]:
    """One method's line, and its pictures beside it; as it was if it was measured before."""
    title, method = METHODS[name]
    kept = bench.out / f"{name}.json"
    if kept.exists():
        read: dict[str, object] = json.loads(kept.read_text())
        return {**read, "name": title}
    folder = bench.out / name
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    try:
        total = method(bench, folder)
    except MethodUnavailable as reason:
        return {"name": title, "why": str(reason)}
    seconds = time.monotonic() - started
    errors = compare_models(folder, bench.held_out, bench.recipe.seed + HELD_OUT_SEED_OFFSET, bench.recipe.scale, CPU)
    np.save(bench.out / f"{name}.npy", errors.packed_images[:IMAGES_IN_SHEET])
    np.save(bench.out / "float.npy", errors.float_images[:IMAGES_IN_SHEET])
    line = {"name": title, "pictures": f"{name}.npy", **make_table_line(bench, errors, total, seconds)}
    kept.write_text(json.dumps(line))
    return line


def make_table_line(
    bench: QuantizerBenchmark, errors: ModelComparison, total: int, seconds: float
) -> dict[str, object]:
    count = sum(value.numel() for value in load_float_weights(bench).values())
    return {
        "bytes": total, "bits": 8 * total / count, "seconds": seconds, "noise_db": errors.mean_noise_sqnr_db,
        "final_db": errors.final_latents_sqnr_db, "psnr_db": errors.psnr_db,
        "ssim": mean_ssim(errors.float_images, errors.packed_images),
    }  # fmt: skip


def print_table(bench: QuantizerBenchmark, lines: list[dict[str, object]]) -> None:
    prompts, recipe = bench.held_out.latents.shape[1], bench.recipe
    print(f"\n{len(bench.names)} packed layers, {prompts} held-out prompts, {recipe.steps} steps, scale {recipe.scale}")
    print(f"{'method':<32}{'MB':>7}{'bits':>7}{'noise dB':>10}{'latents dB':>12}{'PSNR dB':>9}{'SSIM':>8}")
    for line in lines:
        if "why" in line:
            print(f"{line['name']:<32}not measured: {line['why']}")
            continue
        print(
            f"{line['name']:<32}{line['bytes'] / 1e6:7.2f}{line['bits']:7.2f}{line['noise_db']:10.2f}"  # type: ignore[operator]
            f"{line['final_db']:12.2f}{line['psnr_db']:9.2f}"
            + ("       -" if line.get("ssim") is None else f"{line['ssim']:8.4f}")
        )


def write_sheet(bench: QuantizerBenchmark, lines: list[dict[str, object]]) -> Path:
    """A row of pictures for each method, the float model's first."""
    files = ["float.npy", *(str(line["pictures"]) for line in lines if "pictures" in line)]
    rows = [np.concatenate(list(np.load(bench.out / file)), axis=1) for file in files]
    path = bench.out / "pictures.png"
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)
    return path


def held_out(floats: Path, recipe: Recipe, out: Path) -> Trajectories:
    """The float model's drawings of the held-out prompts, kept from an earlier call."""
    file = out / f"held-out-{len(recipe.held_out)}.safetensors"
    if not file.exists():
        part = open_source(floats, SourceOptions()).unet()
        drawn = generate_trajectories(
            SegmentedUNet(part.config, part.tensors, CPU),
            floats,
            recipe,
            recipe.held_out,
            recipe.seed + HELD_OUT_SEED_OFFSET,
        )
        save_file({name: getattr(drawn, name) for name in Trajectories.__slots__}, file)
    return Trajectories(**load_file(file))


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path, default=Path("outputs/quantizers"))
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        floats = float_folder(out / EMBEDDED)
        recipe = read_recipe(arguments.recipe or ROOT / "configs" / "quantize" / "embedded.toml")
    else:
        floats, recipe = out / "floats", read_recipe(arguments.recipe)
        if not floats.exists():
            convert_model(arguments.model, floats, SourceOptions(), None, log)
    if arguments.prompts:
        recipe = recipe.model_copy(update={"held_out": recipe.held_out[: arguments.prompts]})
    part = open_source(floats, SourceOptions()).unet()
    names = list(get_preset_layouts(SegmentedUNet(part.config, part.tensors, CPU).unet, "tiny"))
    bench = QuantizerBenchmark(floats, out, recipe, held_out(floats, recipe, out), names, arguments.peers)
    lines = []
    for name in arguments.only.split(",") if arguments.only else METHODS:
        log(name)
        lines.append(run_method(bench, name))
    print_table(bench, lines)
    print(f"\npictures, the float model's first: {write_sheet(bench, lines)}")


if __name__ == "__main__":
    main()
