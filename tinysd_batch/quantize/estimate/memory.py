"""Memory and disk that quantizing takes, told from shapes before it starts, and whether they are there."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from tinysd_batch.errors import StorageError, UsageError
from tinysd_batch.model.checkpoint.folder import KEEP_ON_META
from tinysd_batch.model.checkpoint.info import SMALL_UNET_BYTES
from tinysd_batch.model.device.available_memory import available_memory
from tinysd_batch.model.device.malloc import hand_back_blocks_of
from tinysd_batch.model.nn.chunked_attention import PartedAttention
from tinysd_batch.model.offload.peak_memory import LivePeak
from tinysd_batch.model.offload.planner import STEP_BLOCK_BYTES
from tinysd_batch.quantize.calibration.layerwise import OTHER_TOKENS
from tinysd_batch.quantize.calibration.unet_segments import State, Walker, rows_at_once
from tinysd_batch.quantize.layers import Layer, layer_of
from tinysd_batch.quantize.presets import SMALLEST, Size, layers_to_pack, unet_bytes
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import Part, Source

FLOAT, HALF = 4, 2  # bytes
HALF_ABOVE = 1e9  # bytes of states: more are kept as float16 between two units
FACTORS = 3  # of a part's Hessian beside it: a factor, its inverse and one that is being made
WATCHED = 3  # times a unit's maps: two UNets', and some in the order of tokens
MATRICES = 2  # of a layer while it is solved: its weights in order and its codes
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


def hand_back_memory(unet: nn.Module, size: Size, device: torch.device) -> None:
    """On the CPU have maps and weights of models that are not small leave memory as soon as they are free.

    Otherwise glibc's heap keeps gigabytes of them while units of SD v1's size take turns. Holds for the whole process.
    """
    if device.type == "cpu" and file_bytes(unet, size) >= SMALL_UNET_BYTES:
        hand_back_blocks_of(STEP_BLOCK_BYTES)


def needs_of_fast(unet: nn.Module, source: Source, size: Size) -> Needs:
    """All packed layers are in memory at last, and the floats of one."""
    largest = max(layer_of(unet, name).weight.numel() for name in layers_to_pack(unet, SMALLEST))
    packed = file_bytes(unet, size)
    return Needs(packed + ROW_FLOATS * FLOAT * largest, packed + other_bytes(source))


# Calibration


@dataclass(frozen=True, slots=True)
class Place:
    """What a row takes at a unit of the UNet, told from a walk without numbers, in floats."""

    state: int  # while it waits before the unit or after it, the larger
    maps: int  # besides, while it passes
    weights: int  # of the unit
    layers: list[Layer]  # that may be packed


def places_of(part: Part) -> list[Place]:
    walker = Walker(part.config, {}, KEEP_ON_META)
    walker.unet.set_attn_processor(PartedAttention(fused=True))  # counts no scores, as torch's kernels hold none
    config, unet = walker.unet.config, walker.unet
    latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    context = torch.empty(1, 8, config.cross_attention_dim, device="meta")
    state = State.of(latents, torch.empty(1, device="meta"), context)
    places, names = [], list(layers_to_pack(unet, SMALLEST))
    for unit in walker.units:
        before = state.nbytes()
        with KEEP_ON_META, torch.no_grad(), LivePeak() as live:
            live.leave_out([*unet.parameters(), state.hidden, *state.skips])
            unit.run(unet, state)
        layers = [layer_of(unet, name) for name in names if unit.holds(name)]
        weights = sum(layer.weight.numel() for layer in layers)
        places.append(Place(max(before, state.nbytes()) // FLOAT, live.peak // FLOAT, weights, layers))
    return places


def widest_state(places: Sequence[Place]) -> int:
    return max(place.state for place in places)


def rows_of(recipe: Recipe) -> int:
    """Calls of the UNet, with text and without."""
    return 2 * recipe.points * len(recipe.prompts) + 2 * MAX_HELD_POINTS * len(recipe.held_out)


def state_dtype(part: Part, recipe: Recipe) -> torch.dtype:
    """In which the rows wait between two units of the UNet."""
    return torch.float16 if 2 * rows_of(recipe) * FLOAT * widest_state(places_of(part)) > HALF_ABOVE else torch.float32


def drawn_bytes(part: Part, recipe: Recipe, prompts: int) -> int:
    """Of trajectories: what the UNet was given, and what it said with the text and without."""
    return 3 * FLOAT * recipe.steps * prompts * latents_of(part).numel()


def latents_of(part: Part) -> Tensor:
    """A row's, [1, 4, h, w], without numbers."""
    channels, side = part.config["in_channels"], part.config["sample_size"]
    return torch.empty(1, channels, side, side, device="meta")


def needs_of_drawing(part: Part, recipe: Recipe) -> Needs:
    """The held-out prompts' states between two units of the UNet, and a unit's floats."""
    places, count = places_of(part), len(recipe.held_out)
    return Needs(bytes_to_draw(part, places, count) + drawn_bytes(part, recipe, count), 0, LESS)


def bytes_to_draw(part: Part, places: Sequence[Place], prompts: int) -> int:
    """The prompts' states, with text and without, and at a unit its floats, as they are made, and some rows' maps."""
    together = rows_at_once(latents_of(part))
    return FLOAT * max(2 * prompts * one.state + 2 * one.weights + together * one.maps for one in places)


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
    """The most of these: all prompts while they are drawn; the rows in two UNets, a unit's floats, a layer's moments;
    with `tune` a step of that.
    """
    places = places_of(part)
    drawn = drawn_bytes(part, recipe, len(recipe.prompts) + len(recipe.held_out))
    packed = file_bytes(unet, size)
    most = max(
        bytes_to_draw(part, places, max(len(recipe.prompts), len(recipe.held_out))),
        bytes_to_calibrate(part, places, recipe),
        tuning_bytes(part, recipe) if tune else 0,
    )
    return Needs(most + packed + drawn, 2 * packed + drawn + other_bytes(source), LESS)


def bytes_to_calibrate(part: Part, places: Sequence[Place], recipe: Recipe) -> int:
    """All rows in two UNets, and at a unit both UNets' floats, and maps of some rows or a layer that is solved."""
    row, together = 2 * rows_of(recipe) * state_dtype(part, recipe).itemsize, rows_at_once(latents_of(part))
    return max(
        row * place.state
        + FLOAT * 2 * place.weights
        + FLOAT * max(WATCHED * together * place.maps, *(floats_to_solve(layer, recipe) for layer in place.layers), 0)
        for place in places
    )


def floats_to_solve(layer: Layer, recipe: Recipe) -> int:
    """Moments of all parts of its columns, factors of one, tokens that are kept, and copies of the matrix."""
    rows, columns = len(layer.weight), layer.weight[0].numel()
    parts = -(-columns // recipe.block)
    width = -(-columns // parts)
    kept = (2 if parts == 1 else 1) * OTHER_TOKENS
    return (parts + FACTORS) * width**2 + columns * rows * (1 + MATRICES) + 2 * kept * (columns + rows)
