"""Memory and disk that quantizing takes, told from shapes before it starts, and whether they are there."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from tinysd_batch.errors import StorageError, UsageError
from tinysd_batch.model.checkpoint import KEEP_ON_META
from tinysd_batch.model.memory import LivePeak
from tinysd_batch.model.packing import to_matrix
from tinysd_batch.quantize.hessian import layer_of
from tinysd_batch.quantize.presets import SMALLEST, Size, layers_to_pack, unet_bytes
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.room import available_memory
from tinysd_batch.quantize.sources import Part, Source
from tinysd_batch.quantize.units import State, Walker, rows_at_once

FLOAT, HALF = 4, 2  # bytes
HALF_ABOVE = 1e9  # bytes of states: more are kept as float16 between two units
HESSIANS = 5  # of the widest layer in memory at once: its own, factors and inverses
TOKEN_COPIES = 3  # of a layer's inputs while they are unfolded
ROW_FLOATS = 4  # float copies of a layer that is packed without data
MAX_HELD_POINTS = 1  # of each held-out trajectory, to measure layers with
CONTEXT_TOKENS = 77
LESS = "; a recipe with fewer prompts or points, or a smaller block or batch, needs less"


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes, beside the program itself."""

    memory: int
    disk: int
    advice: str = ""  # for machines with less memory

    def __str__(self) -> str:
        return f"some {megabytes(self.memory)} of memory beside the program itself and {megabytes(self.disk)} of disk"


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def check_room(needs: Needs, out: Path, device: torch.device) -> None:
    """Raise UsageError where the device has too little memory, StorageError where OUT's disk is too small."""
    there = available_memory(device)
    if there is not None and there < needs.memory:
        raise UsageError(
            f"quantizing needs some {megabytes(needs.memory)} of memory, {megabytes(there)} are available{needs.advice}"
        )
    holder = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(holder).free) < needs.disk:
        raise StorageError(f"{out}: needs some {megabytes(needs.disk)} of disk, {megabytes(free)} are free")


def file_bytes(unet: nn.Module, size: Size) -> int:
    """Of the UNet's file."""
    return unet_bytes(unet, layers_to_pack(unet, size.preset)) if size.most is None else size.most


def other_bytes(source: Source) -> int:
    """Of the other parts' files."""
    parts = (source.vae(), source.text_encoder())
    return sum(HALF * one.numel() for part in parts for one in part.tensors.values())


def needs_of_fast(unet: nn.Module, source: Source, size: Size) -> Needs:
    """All packed layers are in memory at last, and the floats of one."""
    largest = max(layer_of(unet, name).weight.numel() for name in layers_to_pack(unet, SMALLEST))
    packed = file_bytes(unet, size)
    return Needs(packed + ROW_FLOATS * FLOAT * largest, packed + other_bytes(source))


# Calibration


@dataclass(frozen=True, slots=True)
class Widths:
    """What a row takes where it takes most, told from a walk without numbers, in floats."""

    state: int
    tokens: int  # a layer's inputs, unfolded
    unit: int  # weights of the largest unit


def widths_of(part: Part) -> Widths:
    walker = Walker(part.config, {}, KEEP_ON_META)
    config, unet = walker.unet.config, walker.unet
    latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    context = torch.empty(1, 8, config.cross_attention_dim, device="meta")
    state = State.of(latents, torch.empty(1, device="meta"), context)
    widths, names = Widths(0, 0, 0), list(layers_to_pack(unet, SMALLEST))
    for unit in walker.units:
        with KEEP_ON_META, torch.no_grad():
            unit.run(unet, state)
        layers = [layer_of(unet, name).weight for name in names if unit.holds(name)]
        columns = max((to_matrix(weight).shape[1] for weight in layers), default=0)
        widths = Widths(
            max(widths.state, state.nbytes() // FLOAT),
            max(widths.tokens, columns * state.hidden.shape[-1] * state.hidden.shape[-2]),
            max(widths.unit, sum(weight.numel() for weight in layers)),
        )
    return widths


def rows_of(recipe: Recipe) -> int:
    """Calls of the UNet, with text and without."""
    return 2 * recipe.points * len(recipe.prompts) + 2 * MAX_HELD_POINTS * len(recipe.held_out)


def state_dtype(part: Part, recipe: Recipe) -> torch.dtype:
    """In which the rows wait between two units of the UNet."""
    return torch.float16 if 2 * rows_of(recipe) * FLOAT * widths_of(part).state > HALF_ABOVE else torch.float32


def drawn_bytes(part: Part, recipe: Recipe, prompts: int) -> int:
    """Of trajectories: what the UNet was given, and what it said with the text and without."""
    latents = part.config["in_channels"] * part.config["sample_size"] ** 2
    return int(3 * FLOAT * recipe.steps * prompts * latents)


def needs_of_drawing(part: Part, recipe: Recipe) -> Needs:
    """The held-out prompts' states between two units of the UNet, and a unit's floats."""
    widths, count = widths_of(part), len(recipe.held_out)
    states = 2 * count * FLOAT * widths.state
    return Needs(states + FLOAT * widths.unit + drawn_bytes(part, recipe, count), 0, LESS)


def tuning_bytes(part: Part, recipe: Recipe) -> int:
    """What a step of tuning takes: a batch's activations and gradients, told from one without numbers; and weights.

    Those are there as codes, as floats, and as floats in the order of convolutions.
    """
    with KEEP_ON_META, LivePeak() as live:
        unet = UNet2DConditionModel.from_config(dict(part.config)).eval()
        unet.set_attn_processor(AttnProcessor())
        config, rows = unet.config, recipe.batch
        latents = torch.empty(rows, config.in_channels, config.sample_size, config.sample_size)
        context = torch.empty(rows, CONTEXT_TOKENS, config.cross_attention_dim)
        unet(latents, torch.empty(rows), context).sample.square().mean().backward()
    weights = sum(one.numel() for one in unet.parameters())
    return int(live.peak + (1 + 2 * FLOAT) * weights)


def needs_of_calib(
    part: Part, unet: nn.Module, source: Source, size: Size, recipe: Recipe, *, tune: bool = False
) -> Needs:
    """The most of these: all prompts while they are drawn; the rows in two UNets, a unit's floats, Hessians and tokens;
    with `tune` a step of that.
    """
    widths, config = widths_of(part), part.config
    widest = max(to_matrix(layer_of(unet, name).weight).shape[1] for name in layers_to_pack(unet, SMALLEST))
    together = rows_at_once(torch.empty(1, 1, config["sample_size"], config["sample_size"], device="meta"))
    drawing = 2 * max(len(recipe.prompts), len(recipe.held_out)) * FLOAT * widths.state
    states = 2 * rows_of(recipe) * state_dtype(part, recipe).itemsize * widths.state
    hessians = HESSIANS * FLOAT * min(widest, recipe.block) ** 2
    tokens = TOKEN_COPIES * FLOAT * together * widths.tokens
    drawn = drawn_bytes(part, recipe, len(recipe.prompts) + len(recipe.held_out))
    packed, floats = file_bytes(unet, size), 2 * FLOAT * widths.unit
    calibrating = max(drawing, states + hessians + tokens) + floats
    return Needs(
        max(calibrating, tuning_bytes(part, recipe) if tune else 0) + packed + drawn,
        2 * packed + drawn + other_bytes(source),
        LESS,
    )
