"""The float model's own trajectories: what its UNet is given while it draws, and what it says."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from tinysd_batch.model.checkpoint.folder import read_noise_schedule, read_text_encoder
from tinysd_batch.model.offload.components import Component
from tinysd_batch.model.sampling.ddim_plms import sample_ddim
from tinysd_batch.model.sampling.schedule import SamplingRun, sample_noise
from tinysd_batch.model.text.encoder import Conditioning, PromptEncoder
from tinysd_batch.model.text.tokenizer import read_tokenizer
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet, segment_batch_size
from tinysd_batch.quantize.recipe import Recipe

MIN_SENSITIVITY_POINTS, MAX_SENSITIVITY_POINTS = 4, 16


HELD_OUT_SEED_OFFSET = 2**20  # how far the held-out prompts' seeds are from the others'
TUNING_PROMPT_INTERVAL = 8  # of the calibration prompts, one in so many chooses how strong corrections are


@dataclass(frozen=True, slots=True)
class Trajectories:
    """P prompts drawn by ddim in S steps, float32 on the host."""

    latents: Tensor  # [S, P, 4, h, w], what the UNet was given
    times: Tensor  # [S]
    noise: Tensor  # [S, P, 4, h, w], what it said with the text
    noise_without: Tensor  # [S, P, 4, h, w], without
    final: Tensor  # [P, 4, h, w]
    context: Tensor  # [P, T, D]
    context_without: Tensor  # [P, T, D]

    def guided_noise(self, scale: float) -> Tensor:
        """[S, P, 4, h, w]"""
        return self.noise_without + scale * (self.noise - self.noise_without)

    def select(self, prompts: Tensor) -> "Trajectories":
        """Those of these prompts only."""
        return Trajectories(
            self.latents[:, prompts], self.times, self.noise[:, prompts], self.noise_without[:, prompts],
            self.final[prompts], self.context[prompts], self.context_without[prompts],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class UNetInputs:
    """What calibrates: R single calls of the UNet, conditional and unconditional ones by turns."""

    latents: Tensor  # [R, 4, h, w]
    times: Tensor  # [R]
    context: Tensor  # [R, T, D]


def encode_prompts(folder: Path, prompts: Sequence[str], negative: str, device: torch.device) -> list[Conditioning]:
    """The prompts' conditions by the text encoder of a model folder."""
    encoder, tensors = read_text_encoder(folder / "text_encoder")
    Component("text encoder", {"": encoder}, tensors, torch.float32).onload(device)
    length = encoder.config.max_position_embeddings
    on_device = contextlib.nullcontext(device)
    reader = PromptEncoder(read_tokenizer(folder / "tokenizer"), encoder, length, lambda: on_device)
    count = len(prompts)
    with torch.no_grad():
        # Any scale but 1 encodes the negative prompt too.
        return reader.encode(list(prompts), [negative] * count, [2.0] * count, ["none"] * count)


@torch.no_grad()
def draw(walker: SegmentedUNet, folder: Path, recipe: Recipe, prompts: Sequence[str], first_seed: int) -> Trajectories:
    """Draw the prompts, one seed each from `first_seed`, and keep all that passes the UNet."""
    conditions = encode_prompts(folder, prompts, recipe.negative_prompt, walker.device)
    context = torch.stack([one.embedding for one in conditions])
    without = torch.stack([one.negative_embedding for one in conditions if one.negative_embedding is not None])
    both = torch.cat([without, context])
    seen: list[tuple[Tensor, float, Tensor, Tensor]] = []

    def predict(latents: Tensor, time: Tensor) -> Tensor:
        rows = torch.cat([latents, latents])
        said = walker.predict(rows, time.expand(len(rows)), both, segment_batch_size(rows))
        unguided, with_text = said.chunk(2)
        seen.append((latents.clone(), float(time), with_text, unguided))
        return unguided + recipe.scale * (with_text - unguided)

    config = walker.unet.config
    generators = [Generator("cpu").manual_seed(first_seed + number) for number in range(len(prompts))]
    start = sample_noise(generators, (config.in_channels, config.sample_size, config.sample_size))
    schedule = read_noise_schedule(folder / "scheduler" / "scheduler_config.json")
    final = sample_ddim(SamplingRun(predict, recipe.steps, schedule, generators), start)
    latents, times, noise, unguided = zip(*seen, strict=True)
    return Trajectories(
        torch.stack(latents), torch.tensor(times), torch.stack(noise), torch.stack(unguided), final, context, without
    )


def generate_held_out_trajectories(walker: SegmentedUNet, folder: Path, recipe: Recipe) -> Trajectories:
    """Draw the recipe's held-out prompts with their own seeds."""
    return draw(walker, folder, recipe, recipe.held_out, recipe.seed + HELD_OUT_SEED_OFFSET)


def select_spaced_inputs(trajectories: Trajectories, points: int) -> UNetInputs:
    """So many calls of each prompt, evenly spread over its trajectory; the next prompt's lie a step further."""
    calls, prompts = trajectories.latents.shape[:2]
    points = min(points, calls)
    chosen = [
        ((place * calls + prompt * calls // prompts) // points % calls, prompt)
        for prompt in range(prompts)
        for place in range(points)
    ]
    at = torch.tensor([call for call, _ in chosen]).repeat_interleave(2)
    of = torch.tensor([prompt for _, prompt in chosen]).repeat_interleave(2)
    with_text = (torch.arange(len(at)) % 2 == 0)[:, None, None]
    context = torch.where(with_text, trajectories.context[of], trajectories.context_without[of])
    return UNetInputs(trajectories.latents[at, of], trajectories.times[at], context)


def tuning_prompt_mask(prompts: Tensor) -> Tensor:
    """Which of these numbers of prompts do not calibrate: one in eight, of very few prompts none."""
    return prompts % TUNING_PROMPT_INTERVAL == TUNING_PROMPT_INTERVAL // 2


def count_sensitivity_points(prompts: int, together: int) -> int:
    """How many of so many prompts, where so many rows go through a unit together."""
    return min(prompts, max(MIN_SENSITIVITY_POINTS, min(MAX_SENSITIVITY_POINTS, together // 2)))
