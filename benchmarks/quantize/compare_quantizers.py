"""Compare quantizers on the same model and the same held-out prompts: one table, one sheet of images.

    python -m benchmarks.quantize.compare_quantizers
        the float weights of the embedded model
    python -m benchmarks.quantize.compare_quantizers --model MINE
        a checkpoint or float folder of your own
    --recipe FILE     prompts for calibration and evaluation (default: configs/quantize/embedded.toml; with --model the
                      shipped recipe for SD v1)
    --peers PYTHON    interpreter of an environment with torch, diffusers, hqq, optimum-quanto and sdnq; without it
                      these are not measured
    --prompts N       evaluate on the first N held-out prompts only
    --only A,B        these methods only

Every method quantizes the same layers; first and last layer, time embedding, norms and biases are float16 in all. Each
method provides its weights dequantized, and the same engine evaluates them: SQNR in dB of the guided noise prediction
(mean over timesteps) and of the final latents, PSNR and, with torchmetrics, SSIM of the images, all against the float
model. Results are kept in --out, so that a second call measures only what is missing.
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

from tests.support.models import adaround
from tests.support.paths import ROOT
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.packed.format import from_matrix, to_matrix
from tinysd_batch.quantize.bit_allocation import select_smallest_layouts
from tinysd_batch.quantize.calibrated import quantize_with_calibration
from tinysd_batch.quantize.calibration.trajectories import (
    HELD_OUT_SEED_OFFSET,
    Trajectories,
    generate_held_out_trajectories,
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
from tinysd_batch.quantize.sources.formats import open_source
from tinysd_batch.report.quantization.similarity import mean_ssim
from training.repack import EMBEDDED as SHIPPED_MODEL
from training.repack import float_folder

CPU = torch.device("cpu")
# Writes a model folder, and returns the bytes of the layers that it quantized.
Method = Callable[["QuantizerBenchmark", Path], int]
EMBEDDED = "embedded-floats"  # name of the folder with the embedded model's float weights
TINY_STABLE_DIFFUSION_BYTES, QUANTO_BYTES = 3_875_232, 4_218_368  # of the layers that these methods quantize in it
IMAGES_IN_SHEET = 10  # of each method
ADAROUND_PROMPTS = 32


@dataclass(frozen=True)
class QuantizerBenchmark:
    """What all methods share."""

    floats: Path  # a float model folder
    out: Path
    recipe: Recipe
    held_out: Trajectories
    names: list[str]  # layers to quantize
    peers: Path | None

    def float_unet(self) -> SegmentedUNet:
        component = open_source(self.floats, SourceOptions()).unet()
        return SegmentedUNet(component.config, component.tensors, CPU)


class MethodUnavailable(Exception):  # noqa: N818 - an answer, not an error
    """The reason why a method is not in the table."""


# The methods


def data_free(size: SizeTarget) -> Method:
    def quantize(bench: QuantizerBenchmark, folder: Path) -> int:
        quantize_model(bench.floats, folder, SourceOptions(), lambda _: None, size)
        return count_packed_bytes(folder, bench.names)

    return quantize


def calibrated(size: SizeTarget, *, distill: bool = False) -> Method:
    def quantize(bench: QuantizerBenchmark, folder: Path) -> int:
        quantize_with_calibration(
            bench.floats, folder, SourceOptions(), bench.recipe, CPU, log, size=size, distill=distill
        )
        return count_packed_bytes(folder, bench.names)

    return quantize


def distilled(size: SizeTarget) -> Method:
    return calibrated(size, distill=True)


def at_preset_size(level: Callable[[SizeTarget], Method], preset: str) -> Method:
    """Return one of our levels with the size of a preset's file as its target, allocated by error per byte."""

    def quantize(bench: QuantizerBenchmark, folder: Path) -> int:
        unet = bench.float_unet().unet
        max_bytes = compute_unet_bytes(unet, get_preset_layouts(unet, preset))
        return level(SizeTarget(max_bytes=max_bytes))(bench, folder)

    return quantize


def at_layer_bytes(level: Callable[[SizeTarget], Method], max_layer_bytes: int) -> Method:
    """Return one of our levels whose quantized layers take at most the bytes of another method's."""

    def quantize(bench: QuantizerBenchmark, folder: Path) -> int:
        if bench.floats.name != EMBEDDED:
            raise MethodUnavailable("only with the embedded model")
        unet = bench.float_unet().unet
        smallest = select_smallest_layouts(unet, bench.recipe.block)
        smallest_layer_bytes = sum(
            layout.nbytes(*to_matrix(get_layer(unet, name).weight).shape) for name, layout in smallest.items()
        )
        max_bytes = compute_unet_bytes(unet, smallest) + max_layer_bytes - smallest_layer_bytes
        return level(SizeTarget(max_bytes=max_bytes))(bench, folder)

    return quantize


def embedded_as_shipped(bench: QuantizerBenchmark, folder: Path) -> int:
    if bench.floats.name != EMBEDDED:
        raise MethodUnavailable("only with the embedded model")
    shutil.copytree(SHIPPED_MODEL, folder)
    return count_packed_bytes(folder, bench.names)


def round_to_nearest(bench: QuantizerBenchmark, folder: Path) -> int:
    """Round each output channel to four levels between its smallest and its largest weight."""
    weights, total_bytes = {}, 0
    for name, weight in load_float_weights(bench).items():
        matrix = to_matrix(weight)
        low, high = matrix.amin(dim=1, keepdim=True), matrix.amax(dim=1, keepdim=True)
        step = ((high - low) / 3).clamp(min=1e-12)
        weights[name] = from_matrix(((matrix - low) / step).round() * step + low, weight.shape)
        total_bytes += weight.numel() // 4 + 4 * len(weight)
    write_float_model(bench, folder, weights)
    return total_bytes


def tiny_stable_diffusion(bench: QuantizerBenchmark, folder: Path) -> int:
    unet = bench.float_unet()
    few_prompts = bench.recipe.model_copy(update={"prompts": bench.recipe.prompts[:ADAROUND_PROMPTS]})
    trajectories = generate_trajectories(unet, bench.floats, few_prompts, few_prompts.prompts, few_prompts.seed)
    weights, total_bytes = adaround.quantize_layers(unet, select_spaced_inputs(trajectories, 2), bench.names)
    write_float_model(bench, folder, weights)
    return total_bytes


def peer_method(method: str) -> Method:
    """Return a method of another program, which peers.py runs in its own environment."""

    def quantize(bench: QuantizerBenchmark, folder: Path) -> int:
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
            total_bytes = int(file.metadata()["bytes"])
        write_float_model(bench, folder, load_file(weights))
        return total_bytes

    return quantize


# In the table's order: the method's name for --only, its title, and how to run it.
METHODS: dict[str, tuple[str, Method]] = {
    "rtn": ("round to nearest, per channel", round_to_nearest),
    "tiny-sd": ("tiny-stable-diffusion's", tiny_stable_diffusion),
    "hqq": ("HQQ, groups of 64", peer_method("hqq")),
    "quanto": ("optimum-quanto int2", peer_method("quanto")),
    "sdnq": ("SDNQ uint2, its own groups", peer_method("sdnq")),
    "sdnq64": ("SDNQ uint2, groups of 64", peer_method("sdnq64")),
    "fast-tiny-sd": ("ours, fast, tiny-sd's bytes", at_layer_bytes(data_free, TINY_STABLE_DIFFUSION_BYTES)),
    "fast": ("ours, fast, tiny", data_free(SizeTarget("tiny"))),
    "fast-default": ("ours, fast, default", data_free(SizeTarget())),
    "fast-default-size": ("ours, fast, as large as default", at_preset_size(data_free, "default")),
    "fast-quality": ("ours, fast, quality", data_free(SizeTarget("quality"))),
    "fast-quality-size": ("ours, fast, as large as quality", at_preset_size(data_free, "quality")),
    "calib-tiny-sd": ("ours, calib, tiny-sd's bytes", at_layer_bytes(calibrated, TINY_STABLE_DIFFUSION_BYTES)),
    "calib-quanto": ("ours, calib, quanto's bytes", at_layer_bytes(calibrated, QUANTO_BYTES)),
    "calib": ("ours, calib, tiny", calibrated(SizeTarget("tiny"))),
    "calib-tiny-size": ("ours, calib, as large as tiny", at_preset_size(calibrated, "tiny")),
    "calib-default": ("ours, calib, default", calibrated(SizeTarget())),
    "calib-quality": ("ours, calib, quality", calibrated(SizeTarget("quality"))),
    "distill": ("ours, distill, tiny", distilled(SizeTarget("tiny"))),
    "distill-tiny-size": ("ours, distill, as large as tiny", at_preset_size(distilled, "tiny")),
    "shipped": ("embedded, as shipped", embedded_as_shipped),
}


def load_float_weights(bench: QuantizerBenchmark) -> dict[str, Tensor]:
    tensors = open_source(bench.floats, SourceOptions()).unet().tensors
    return {name: tensors[f"{name}.weight"].float() for name in bench.names}


def write_float_model(bench: QuantizerBenchmark, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the float model with these layers' weights replaced."""
    shutil.copytree(bench.floats, folder, ignore=shutil.ignore_patterns(WEIGHTS_FILE + "*", "report"))
    for component in ("vae", "text_encoder"):
        shutil.copytree(bench.floats / component, folder / component, dirs_exist_ok=True)
    tensors = dict(open_source(bench.floats, SourceOptions()).unet().tensors)
    tensors |= {f"{name}.weight": value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "unet" / WEIGHTS_FILE)


def count_packed_bytes(folder: Path, names: list[str]) -> int:
    """Return the bytes of these layers in a packed folder, without biases."""
    tensors = load_file(folder / "unet" / WEIGHTS_FILE)
    return sum(
        value.numel() * value.element_size()
        for name, value in tensors.items()
        if name.rpartition(".")[0] in names and not name.endswith(".bias")
    )


# Evaluation


def run_method(bench: QuantizerBenchmark, name: str) -> dict[str, object]:
    """Run and evaluate one method, unless it has been already, and return its line of the table."""
    title, method = METHODS[name]
    saved = bench.out / f"{name}.json"
    if saved.exists():
        saved_line: dict[str, object] = json.loads(saved.read_text())
        return {**saved_line, "name": title}
    folder = bench.out / name
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    try:
        total_bytes = method(bench, folder)
    except MethodUnavailable as reason:
        return {"name": title, "why": str(reason)}
    elapsed_s = time.monotonic() - started
    first_seed = bench.recipe.seed + HELD_OUT_SEED_OFFSET
    comparison = compare_models(folder, bench.held_out, first_seed, bench.recipe.scale, CPU)
    np.save(bench.out / f"{name}.npy", comparison.packed_images[:IMAGES_IN_SHEET])
    np.save(bench.out / "float.npy", comparison.float_images[:IMAGES_IN_SHEET])
    line = {"name": title, "images": f"{name}.npy", **make_table_line(bench, comparison, total_bytes, elapsed_s)}
    saved.write_text(json.dumps(line))
    return line


def make_table_line(
    bench: QuantizerBenchmark, comparison: ModelComparison, total_bytes: int, elapsed_s: float
) -> dict[str, object]:
    count = sum(value.numel() for value in load_float_weights(bench).values())
    return {
        "bytes": total_bytes, "bits": 8 * total_bytes / count, "seconds": elapsed_s,
        "noise_db": comparison.mean_noise_sqnr_db, "final_db": comparison.final_latents_sqnr_db,
        "psnr_db": comparison.psnr_db, "ssim": mean_ssim(comparison.float_images, comparison.packed_images),
    }  # fmt: skip


def print_table(bench: QuantizerBenchmark, lines: list[dict[str, object]]) -> None:
    prompts, recipe = bench.held_out.latents.shape[1], bench.recipe
    print(
        f"\n{len(bench.names)} quantized layers, {prompts} held-out prompts, {recipe.steps} steps, scale {recipe.scale}"
    )
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
    """Write one row of images for each method, the float model's first."""
    files = ["float.npy", *(str(line["images"]) for line in lines if "images" in line)]
    rows = [np.concatenate(list(np.load(bench.out / file)), axis=1) for file in files]
    path = bench.out / "images.png"
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)
    return path


def load_held_out_trajectories(floats: Path, recipe: Recipe, out: Path) -> Trajectories:
    """Read the float model's trajectories for the held-out prompts, which are generated and saved first if missing."""
    file = out / f"held-out-{len(recipe.held_out)}.safetensors"
    if not file.exists():
        component = open_source(floats, SourceOptions()).unet()
        unet = SegmentedUNet(component.config, component.tensors, CPU)
        trajectories = generate_held_out_trajectories(unet, floats, recipe)
        save_file({name: getattr(trajectories, name) for name in Trajectories.__slots__}, file)
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
    component = open_source(floats, SourceOptions()).unet()
    names = list(get_preset_layouts(SegmentedUNet(component.config, component.tensors, CPU).unet, "tiny"))
    held_out = load_held_out_trajectories(floats, recipe, out)
    bench = QuantizerBenchmark(floats, out, recipe, held_out, names, arguments.peers)
    lines = []
    for name in arguments.only.split(",") if arguments.only else METHODS:
        log(name)
        lines.append(run_method(bench, name))
    print_table(bench, lines)
    print(f"\nimages, the float model's first: {write_sheet(bench, lines)}")


if __name__ == "__main__":
    main()
