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
from tinysd_batch.model.checkpoint.info import WEIGHTS
from tinysd_batch.model.packed.format import from_matrix, to_matrix
from tinysd_batch.quantize.bit_allocation import least_layouts
from tinysd_batch.quantize.calibrated import quantize_calibrated
from tinysd_batch.quantize.calibration.trajectories import HELD_OUT_SEEDS, Trajectories, draw, spread_points
from tinysd_batch.quantize.calibration.unet_segments import Walker
from tinysd_batch.quantize.convert import convert_model
from tinysd_batch.quantize.data_free import quantize_model
from tinysd_batch.quantize.evaluate.compare import Errors, measure
from tinysd_batch.quantize.layers import layer_of
from tinysd_batch.quantize.presets import Size, layers_to_pack, unet_bytes
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import Options
from tinysd_batch.quantize.sources.open import open_source
from tinysd_batch.report.quantization.similarity import mean_ssim
from training.repack import EMBEDDED as SHIPPED
from training.repack import float_folder

CPU = torch.device("cpu")
Method = Callable[["Bench", Path], int]  # makes a model folder, returns the bytes of the layers it packed
EMBEDDED = "embedded-floats"  # the folder of the embedded model's float weights
ORIGINS_BYTES, QUANTOS_BYTES = 3_875_232, 4_218_368  # of the layers that these methods pack in it
SHOWN = 10  # pictures of each method in the sheet
ADAROUND_PROMPTS = 32


@dataclass(frozen=True)
class Bench:
    """What all methods share."""

    floats: Path  # a float model folder
    out: Path
    recipe: Recipe
    held_out: Trajectories
    names: list[str]  # layers to pack
    peers: Path | None


class NotMeasured(Exception):  # noqa: N818 - an answer, no error
    """Why a method is not in the table."""


# The methods


def fast(size: Size) -> Method:
    def run(bench: Bench, folder: Path) -> int:
        quantize_model(bench.floats, folder, Options(), lambda _: None, size)
        return packed_bytes(folder, bench.names)

    return run


def calib(size: Size, *, tune: bool = False) -> Method:
    def run(bench: Bench, folder: Path) -> int:
        quantize_calibrated(bench.floats, folder, Options(), bench.recipe, CPU, tell, size=size, tune=tune)
        return packed_bytes(folder, bench.names)

    return run


def distill(size: Size) -> Method:
    return calib(size, tune=True)


def at_presets_size(level: Callable[[Size], Method], preset: str) -> Method:
    """A level of ours at a target size: the bytes of a preset's file, spent by error per byte."""

    def run(bench: Bench, folder: Path) -> int:
        part = open_source(bench.floats, Options()).unet()
        unet = Walker(part.config, part.tensors, CPU).unet
        most = unet_bytes(unet, layers_to_pack(unet, preset))
        return level(Size(most=most))(bench, folder)

    return run


def at_bytes(level: Callable[[Size], Method], most: int) -> Method:
    """A level of ours, its packed layers of at most so many bytes: those of another method on the embedded model."""

    def run(bench: Bench, folder: Path) -> int:
        if bench.floats.name != EMBEDDED:
            raise NotMeasured("only with the embedded model")
        part = open_source(bench.floats, Options()).unet()
        unet = Walker(part.config, part.tensors, CPU).unet
        least = least_layouts(unet, bench.recipe.block)
        packed = sum(layout.nbytes(*to_matrix(layer_of(unet, name).weight).shape) for name, layout in least.items())
        return level(Size(most=unet_bytes(unet, least) + most - packed))(bench, folder)

    return run


def shipped(bench: Bench, folder: Path) -> int:
    """The embedded model as it ships."""
    if bench.floats.name != EMBEDDED:
        raise NotMeasured("only with the embedded model")
    shutil.copytree(SHIPPED, folder)
    return packed_bytes(folder, bench.names)


def round_to_nearest(bench: Bench, folder: Path) -> int:
    """Per output channel, between its least and largest weight."""
    found, total = {}, 0
    for name, weight in float_weights(bench).items():
        matrix = to_matrix(weight)
        low, high = matrix.amin(dim=1, keepdim=True), matrix.amax(dim=1, keepdim=True)
        step = ((high - low) / 3).clamp(min=1e-12)
        found[name] = from_matrix(((matrix - low) / step).round() * step + low, weight.shape)
        total += weight.numel() // 4 + 4 * len(weight)
    write_floats(bench, folder, found)
    return total


def origins(bench: Bench, folder: Path) -> int:
    part = open_source(bench.floats, Options()).unet()
    walker = Walker(part.config, part.tensors, CPU)
    few = bench.recipe.model_copy(update={"prompts": bench.recipe.prompts[:ADAROUND_PROMPTS]})
    drawn = draw(walker, bench.floats, few, few.prompts, few.seed)
    found, total = adaround.quantize(walker, spread_points(drawn, 2), bench.names)
    write_floats(bench, folder, found)
    return total


def peer(method: str) -> Method:
    def run(bench: Bench, folder: Path) -> int:
        if bench.peers is None:
            raise NotMeasured("needs --peers")
        layers, weights = bench.out / "layers.json", bench.out / f"{method}.safetensors"
        layers.write_text(json.dumps(bench.names))
        script = Path(__file__).with_name("peers.py")
        command = [str(bench.peers), str(script), method, str(bench.floats / "unet"), str(layers), str(weights)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotMeasured(done.stderr.strip().splitlines()[-1][:100] if done.stderr.strip() else "it failed")
        with safe_open(weights, framework="pt") as file:
            total = int(file.metadata()["bytes"])
        write_floats(bench, folder, load_file(weights))
        return total

    return run


# In the table's order: what --only calls a method, its title, what it does.
METHODS: dict[str, tuple[str, Method]] = {
    "rtn": ("round to nearest, per channel", round_to_nearest),
    "origin": ("the origin's (L2.4, AdaRound)", origins),
    "hqq": ("HQQ, groups of 64", peer("hqq")),
    "quanto": ("optimum-quanto int2", peer("quanto")),
    "sdnq": ("SDNQ uint2, its own groups", peer("sdnq")),
    "sdnq64": ("SDNQ uint2, groups of 64", peer("sdnq64")),
    "fast-origin": ("ours, fast, the origin's bytes", at_bytes(fast, ORIGINS_BYTES)),
    "fast": ("ours, fast, tiny", fast(Size("tiny"))),
    "fast-default": ("ours, fast, default", fast(Size())),
    "fast-default-size": ("ours, fast, as large as default", at_presets_size(fast, "default")),
    "fast-quality": ("ours, fast, quality", fast(Size("quality"))),
    "fast-quality-size": ("ours, fast, as large as quality", at_presets_size(fast, "quality")),
    "calib-origin": ("ours, calib, the origin's bytes", at_bytes(calib, ORIGINS_BYTES)),
    "calib-quanto": ("ours, calib, quanto's bytes", at_bytes(calib, QUANTOS_BYTES)),
    "calib": ("ours, calib, tiny", calib(Size("tiny"))),
    "calib-tiny-size": ("ours, calib, as large as tiny", at_presets_size(calib, "tiny")),
    "calib-default": ("ours, calib, default", calib(Size())),
    "calib-quality": ("ours, calib, quality", calib(Size("quality"))),
    "distill": ("ours, distill, tiny", distill(Size("tiny"))),
    "distill-tiny-size": ("ours, distill, as large as tiny", at_presets_size(distill, "tiny")),
    "shipped": ("embedded, as it ships", shipped),
}


def float_weights(bench: Bench) -> dict[str, Tensor]:
    tensors = open_source(bench.floats, Options()).unet().tensors
    return {name: tensors[f"{name}.weight"].float() for name in bench.names}


def write_floats(bench: Bench, folder: Path, weights: dict[str, Tensor]) -> None:
    """The float model with these layers in place of its own."""
    shutil.copytree(bench.floats, folder, ignore=shutil.ignore_patterns(WEIGHTS + "*", "report"))
    for part in ("vae", "text_encoder"):
        shutil.copytree(bench.floats / part, folder / part, dirs_exist_ok=True)
    tensors = dict(open_source(bench.floats, Options()).unet().tensors)
    tensors |= {f"{name}.weight": value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "unet" / WEIGHTS)


def packed_bytes(folder: Path, names: list[str]) -> int:
    tensors = load_file(folder / "unet" / WEIGHTS)
    return sum(
        value.numel() * value.element_size()
        for name, value in tensors.items()
        if name.rpartition(".")[0] in names and not name.endswith(".bias")
    )


# Measuring


def run(bench: Bench, name: str) -> dict[str, object]:
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
    except NotMeasured as reason:
        return {"name": title, "why": str(reason)}
    seconds = time.monotonic() - started
    errors = measure(folder, bench.held_out, bench.recipe.seed + HELD_OUT_SEEDS, bench.recipe.scale, CPU)
    np.save(bench.out / f"{name}.npy", errors.packed[:SHOWN])
    np.save(bench.out / "float.npy", errors.floats[:SHOWN])
    line = {"name": title, "pictures": f"{name}.npy", **line_of(bench, errors, total, seconds)}
    kept.write_text(json.dumps(line))
    return line


def line_of(bench: Bench, errors: Errors, total: int, seconds: float) -> dict[str, object]:
    count = sum(value.numel() for value in float_weights(bench).values())
    return {
        "bytes": total, "bits": 8 * total / count, "seconds": seconds, "noise_db": errors.mean_noise_db,
        "final_db": errors.final_db, "psnr_db": errors.psnr_db,
        "ssim": mean_ssim(errors.floats, errors.packed),
    }  # fmt: skip


def print_table(bench: Bench, lines: list[dict[str, object]]) -> None:
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


def write_sheet(bench: Bench, lines: list[dict[str, object]]) -> Path:
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
        part = open_source(floats, Options()).unet()
        drawn = draw(
            Walker(part.config, part.tensors, CPU), floats, recipe, recipe.held_out, recipe.seed + HELD_OUT_SEEDS
        )
        save_file({name: getattr(drawn, name) for name in Trajectories.__slots__}, file)
    return Trajectories(**load_file(file))


def tell(line: str) -> None:
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
            convert_model(arguments.model, floats, Options(), None, tell)
    if arguments.prompts:
        recipe = recipe.model_copy(update={"held_out": recipe.held_out[: arguments.prompts]})
    part = open_source(floats, Options()).unet()
    names = list(layers_to_pack(Walker(part.config, part.tensors, CPU).unet, "tiny"))
    bench = Bench(floats, out, recipe, held_out(floats, recipe, out), names, arguments.peers)
    lines = []
    for name in arguments.only.split(",") if arguments.only else METHODS:
        tell(name)
        lines.append(run(bench, name))
    print_table(bench, lines)
    print(f"\npictures, the float model's first: {write_sheet(bench, lines)}")


if __name__ == "__main__":
    main()
