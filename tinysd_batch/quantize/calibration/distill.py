"""Level `distill`: with the codes as they are, tune what surrounds them to say what the float UNet says.

Scales, offsets, biases and norms are trained by gradient on the float model's own trajectories, conditional and
unconditional predictions alike. The target carries no noise of its own, so a few hundred small steps are enough.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.func import functional_call

from tinysd_batch.model.packed.format import affine_parameters, from_matrix, unpack_codes
from tinysd_batch.quantize.calibration.layerwise import Solved
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.coordinate_descent import Grid
from tinysd_batch.quantize.sources.checkpoint_source import Part, Say

WARM_UP = 20  # steps
TELL_EVERY = 25
GROUP_LR, OTHER_LR = 1e-3, 5e-4  # of group parameters as shares of their scale; of biases and norms
BETAS = (0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What distillation changed."""

    layers: dict[str, Solved]
    norms: dict[str, Tensor]  # other tensors of one dimension, float16
    before: float  # error on the tuning prompts, mean square of weighted noise
    after: float


@dataclass(frozen=True, slots=True)
class Examples:
    """Calls of the UNet and what the float one said."""

    latents: Tensor  # [N, 4, h, w]
    times: Tensor  # [N]
    context: Tensor  # [N, T, D]
    noise: Tensor  # [N, 4, h, w]
    weights: Tensor  # [N]

    @classmethod
    def of(cls, drawn: Trajectories, prompts: Tensor, sigmas: Tensor) -> "Examples":
        """All calls of these prompts, both with text and without."""
        calls = len(drawn.times)
        count = len(prompts)
        times = drawn.times.repeat_interleave(count)
        latents = drawn.latents[:, prompts].flatten(0, 1)
        contexts = (drawn.context[prompts].repeat(calls, 1, 1), drawn.context_without[prompts].repeat(calls, 1, 1))
        noises = (drawn.noise[:, prompts].flatten(0, 1), drawn.noise_without[:, prompts].flatten(0, 1))
        weights = weights_of(sigmas)[times.long()]
        return cls(
            latents.repeat(2, 1, 1, 1), times.repeat(2), torch.cat(contexts), torch.cat(noises), weights.repeat(2)
        )

    def some(self, rows: Tensor) -> "Examples":
        return Examples(self.latents[rows], self.times[rows], self.context[rows], self.noise[rows], self.weights[rows])


def weights_of(sigmas: Tensor) -> Tensor:
    """How much an error counts at each of the 1000 times: more where noise is strong, since all later steps inherit it.

    Between all alike and by the step's own length in sigma, which would leave the last steps to themselves.
    """
    weights = 1 + sigmas
    return weights / weights.mean()


class Student:
    """The packed UNet with gradients to everything but codes and large float tensors."""

    def __init__(self, part: Part, solved: Mapping[str, Solved], device: torch.device) -> None:
        self.unet = UNet2DConditionModel.from_config(dict(part.config)).to(device).eval()
        self.unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow backward pass on CPU
        self.shapes = {name: part.tensors[f"{name}.weight"].shape for name in solved}
        self.solved = solved
        self.codes: dict[str, Tensor] = {}
        self.start: dict[str, tuple[Tensor, Tensor]] = {}
        self.groups: dict[str, tuple[Tensor, Tensor]] = {}
        self.fixed: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        for name, one in solved.items():
            scale, offset = (each.float().to(device) for each in affine_parameters(one.weight))
            self.codes[name] = unpack_codes(one.weight.qweight, one.weight.bits).to(device)
            self.start[name] = scale, offset
            self.groups[name] = torch.zeros_like(scale).requires_grad_(), torch.zeros_like(offset).requires_grad_()
        biases = {f"{name}.bias": one.bias for name, one in solved.items() if one.bias is not None}
        for name, tensor in part.tensors.items():
            if name.removesuffix(".weight") in solved:
                continue
            value = biases.get(name, tensor).half().float().to(device)
            (self.others if value.dim() == 1 else self.fixed)[name] = value.requires_grad_(value.dim() == 1)

    def affine(self, name: str) -> tuple[Tensor, Tensor]:
        """Scales and offsets [O, G] as they are now."""
        (scale, offset), (scale_by, offset_by) = self.start[name], self.groups[name]
        unit = scale.abs().clamp(min=1e-6)
        return scale + unit * scale_by, offset + unit * offset_by

    def matrix(self, name: str) -> Tensor:
        """A layer's weight [O, K]."""
        scale, offset = self.affine(name)
        codes = self.codes[name].view(*scale.shape, -1)
        return (codes * scale.unsqueeze(-1) + offset.unsqueeze(-1)).flatten(1)

    def predict(self, examples: Examples) -> Tensor:
        weights = {f"{name}.weight": from_matrix(self.matrix(name), self.shapes[name]) for name in self.codes}
        given = (examples.latents, examples.times, examples.context)
        said: Tensor = functional_call(self.unet, {**self.fixed, **self.others, **weights}, given).sample
        return said

    def error(self, examples: Examples) -> Tensor:
        square = (self.predict(examples) - examples.noise).square().mean(dim=(1, 2, 3))
        return (square * examples.weights).mean()

    def parameters(self) -> list[dict[str, object]]:
        groups = [one for pair in self.groups.values() for one in pair]
        return [{"params": groups, "base": GROUP_LR}, {"params": list(self.others.values()), "base": OTHER_LR}]

    @torch.no_grad()
    def store(self) -> tuple[dict[str, Solved], dict[str, Tensor]]:
        """The layers and norms as files hold them; what is computed from here on is computed with these."""
        norms = {name: value.half() for name, value in self.others.items()}
        for name, value in self.others.items():
            value.copy_(norms[name].float())
        layers = {}
        for name, one in self.solved.items():
            scale, offset = self.affine(name)
            grid = Grid.of(scale, offset)
            scale, offset = grid.snap_all(scale), grid.snap_all(offset, 2)
            self.start[name] = scale, offset
            for each in self.groups[name]:
                each.zero_()
            weight = grid.pack(self.codes[name], scale, offset, one.weight.bits).on("cpu")
            bias = norms.pop(f"{name}.bias", None)
            layers[name] = Solved(weight, None if bias is None else bias.cpu(), one.sqnr_db)
        return layers, {name: value.cpu() for name, value in norms.items()}


def distill(
    part: Part, solved: Mapping[str, Solved], examples: Examples, tuning: Examples, recipe: Recipe,
    device: torch.device, say: Say,
) -> Tuned | None:  # fmt: skip
    """Tune a calibrated UNet; None where that did not lower the error on the tuning prompts."""
    student = Student(part, solved, device)
    before = error_of(student, tuning, recipe.batch, device)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.0, betas=BETAS)
    for step, batch in enumerate(batches(examples, recipe, device)):
        warm = min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.tune_steps))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * warm
        loss = student.error(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % TELL_EVERY == 0:
            say(f"tuning, step {step + 1:,} of {recipe.tune_steps:,}: error {loss.item():.5f}")
    layers, norms = student.store()
    after = error_of(student, tuning, recipe.batch, device)
    say(f"error on prompts set apart: {before:.5f} before tuning, {after:.5f} after")
    return Tuned(layers, norms, before, after) if after < before else None


def batches(examples: Examples, recipe: Recipe, device: torch.device) -> Iterator[Examples]:
    draw = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.tune_steps):
        rows = torch.randint(len(examples.times), (recipe.batch,), generator=draw)
        yield to_device(examples.some(rows), device)


@torch.no_grad()
def error_of(student: Student, examples: Examples, batch: int, device: torch.device) -> float:
    rows = torch.split(torch.arange(len(examples.times)), batch)
    errors = [student.error(to_device(examples.some(some), device)) * len(some) for some in rows]
    return float(torch.stack(errors).sum() / len(examples.times))


def to_device(examples: Examples, device: torch.device) -> Examples:
    return Examples(*(getattr(examples, name).to(device) for name in Examples.__slots__))
