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

from tinysd_batch.model.packed.format import from_matrix, get_scales_and_offsets, unpack_codes
from tinysd_batch.quantize.calibration.layerwise import CalibratedLayer
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.coordinate_descent import AffineGrid
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent, StatusCallback

WARMUP_STEPS = 20  # steps
LOG_INTERVAL_STEPS = 25
AFFINE_LR, OTHER_LR = 1e-3, 5e-4  # of group parameters as shares of their scale; of biases and norms
ADAM_BETAS = (0.9, 0.99)


@dataclass(frozen=True, slots=True)
class DistilledUNet:
    """What distillation changed."""

    layers: dict[str, CalibratedLayer]
    norms: dict[str, Tensor]  # other tensors of one dimension, float16
    error_before: float  # error on the tuning prompts, mean square of weighted noise
    error_after: float


@dataclass(frozen=True, slots=True)
class DistillationExamples:
    """Calls of the UNet and what the float one said."""

    latents: Tensor  # [N, 4, h, w]
    times: Tensor  # [N]
    context: Tensor  # [N, T, D]
    noise: Tensor  # [N, 4, h, w]
    loss_weights: Tensor  # [N]

    @classmethod
    def from_trajectories(cls, drawn: Trajectories, prompts: Tensor, sigmas: Tensor) -> "DistillationExamples":
        """All calls of these prompts, both with text and without."""
        calls = len(drawn.times)
        count = len(prompts)
        times = drawn.times.repeat_interleave(count)
        latents = drawn.latents[:, prompts].flatten(0, 1)
        contexts = (drawn.context[prompts].repeat(calls, 1, 1), drawn.context_without[prompts].repeat(calls, 1, 1))
        noises = (drawn.noise[:, prompts].flatten(0, 1), drawn.noise_without[:, prompts].flatten(0, 1))
        weights = compute_timestep_weights(sigmas)[times.long()]
        return cls(
            latents.repeat(2, 1, 1, 1), times.repeat(2), torch.cat(contexts), torch.cat(noises), weights.repeat(2)
        )

    def select(self, rows: Tensor) -> "DistillationExamples":
        return DistillationExamples(
            self.latents[rows], self.times[rows], self.context[rows], self.noise[rows], self.loss_weights[rows]
        )


def compute_timestep_weights(sigmas: Tensor) -> Tensor:
    """How much an error counts at each of the 1000 times: more where noise is strong, since all later steps inherit it.

    Between all alike and by the step's own length in sigma, which would leave the last steps to themselves.
    """
    weights = 1 + sigmas
    return weights / weights.mean()


class StudentUNet:
    """The packed UNet with gradients to everything but codes and large float tensors."""

    def __init__(self, part: SourceComponent, solved: Mapping[str, CalibratedLayer], device: torch.device) -> None:
        self.unet = UNet2DConditionModel.from_config(dict(part.config)).to(device).eval()
        self.unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow backward pass on CPU
        self.shapes = {name: part.tensors[f"{name}.weight"].shape for name in solved}
        self.calibrated_layers = solved
        self.codes: dict[str, Tensor] = {}
        self.initial_affine: dict[str, tuple[Tensor, Tensor]] = {}
        self.affine_deltas: dict[str, tuple[Tensor, Tensor]] = {}
        self.frozen_tensors: dict[str, Tensor] = {}
        self.trained_tensors: dict[str, Tensor] = {}
        for name, one in solved.items():
            scale, offset = (each.float().to(device) for each in get_scales_and_offsets(one.weight))
            self.codes[name] = unpack_codes(one.weight.qweight, one.weight.bits).to(device)
            self.initial_affine[name] = scale, offset
            self.affine_deltas[name] = (
                torch.zeros_like(scale).requires_grad_(),
                torch.zeros_like(offset).requires_grad_(),
            )
        biases = {f"{name}.bias": one.bias for name, one in solved.items() if one.bias is not None}
        for name, tensor in part.tensors.items():
            if name.removesuffix(".weight") in solved:
                continue
            value = biases.get(name, tensor).half().float().to(device)
            (self.trained_tensors if value.dim() == 1 else self.frozen_tensors)[name] = value.requires_grad_(
                value.dim() == 1
            )

    def current_affine(self, name: str) -> tuple[Tensor, Tensor]:
        """Scales and offsets [O, G] as they are now."""
        (scale, offset), (scale_by, offset_by) = self.initial_affine[name], self.affine_deltas[name]
        unit = scale.abs().clamp(min=1e-6)
        return scale + unit * scale_by, offset + unit * offset_by

    def dequantize_layer(self, name: str) -> Tensor:
        """A layer's weight [O, K]."""
        scale, offset = self.current_affine(name)
        codes = self.codes[name].view(*scale.shape, -1)
        return (codes * scale.unsqueeze(-1) + offset.unsqueeze(-1)).flatten(1)

    def predict(self, examples: DistillationExamples) -> Tensor:
        weights = {f"{name}.weight": from_matrix(self.dequantize_layer(name), self.shapes[name]) for name in self.codes}
        given = (examples.latents, examples.times, examples.context)
        said: Tensor = functional_call(
            self.unet, {**self.frozen_tensors, **self.trained_tensors, **weights}, given
        ).sample
        return said

    def weighted_error(self, examples: DistillationExamples) -> Tensor:
        square = (self.predict(examples) - examples.noise).square().mean(dim=(1, 2, 3))
        return (square * examples.loss_weights).mean()

    def parameter_groups(self) -> list[dict[str, object]]:
        groups = [one for pair in self.affine_deltas.values() for one in pair]
        return [
            {"params": groups, "base": AFFINE_LR},
            {"params": list(self.trained_tensors.values()), "base": OTHER_LR},
        ]

    @torch.no_grad()
    def round_and_export(self) -> tuple[dict[str, CalibratedLayer], dict[str, Tensor]]:
        """The layers and norms as files hold them; what is computed from here on is computed with these."""
        norms = {name: value.half() for name, value in self.trained_tensors.items()}
        for name, value in self.trained_tensors.items():
            value.copy_(norms[name].float())
        layers = {}
        for name, one in self.calibrated_layers.items():
            scale, offset = self.current_affine(name)
            grid = AffineGrid.from_affine(scale, offset)
            scale, offset = grid.snap_values(scale), grid.snap_values(offset, 2)
            self.initial_affine[name] = scale, offset
            for each in self.affine_deltas[name]:
                each.zero_()
            weight = grid.pack(self.codes[name], scale, offset, one.weight.bits).to("cpu")
            bias = norms.pop(f"{name}.bias", None)
            layers[name] = CalibratedLayer(weight, None if bias is None else bias.cpu(), one.sqnr_db)
        return layers, {name: value.cpu() for name, value in norms.items()}


def distill_unet(
    part: SourceComponent, solved: Mapping[str, CalibratedLayer], examples: DistillationExamples, tuning: DistillationExamples, recipe: Recipe,
    device: torch.device, say: StatusCallback,
) -> DistilledUNet | None:  # fmt: skip
    """Tune a calibrated UNet; None where that did not lower the error on the tuning prompts."""
    student = StudentUNet(part, solved, device)
    before = measure_weighted_error(student, tuning, recipe.batch, device)
    optimizer = torch.optim.Adam(student.parameter_groups(), lr=0.0, betas=ADAM_BETAS)
    for step, batch in enumerate(iter_training_batches(examples, recipe, device)):
        warm = min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.tune_steps))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * warm
        loss = student.weighted_error(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % LOG_INTERVAL_STEPS == 0:
            say(f"tuning, step {step + 1:,} of {recipe.tune_steps:,}: error {loss.item():.5f}")
    layers, norms = student.round_and_export()
    after = measure_weighted_error(student, tuning, recipe.batch, device)
    say(f"error on prompts set apart: {before:.5f} before tuning, {after:.5f} after")
    return DistilledUNet(layers, norms, before, after) if after < before else None


def iter_training_batches(
    examples: DistillationExamples, recipe: Recipe, device: torch.device
) -> Iterator[DistillationExamples]:
    draw = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.tune_steps):
        rows = torch.randint(len(examples.times), (recipe.batch,), generator=draw)
        yield move_examples(examples.select(rows), device)


@torch.no_grad()
def measure_weighted_error(
    student: StudentUNet, examples: DistillationExamples, batch: int, device: torch.device
) -> float:
    rows = torch.split(torch.arange(len(examples.times)), batch)
    errors = [student.weighted_error(move_examples(examples.select(some), device)) * len(some) for some in rows]
    return float(torch.stack(errors).sum() / len(examples.times))


def move_examples(examples: DistillationExamples, device: torch.device) -> DistillationExamples:
    return DistillationExamples(*(getattr(examples, name).to(device) for name in DistillationExamples.__slots__))
