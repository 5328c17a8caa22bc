"""The Python API of the engine: load a model, and generate images from keyword arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor

from tinysd_batch.errors import UsageError
from tinysd_batch.images import ModelLabel
from tinysd_batch.model.arguments import Rng, build_requests, build_tensors, merge_aliases
from tinysd_batch.model.checkpoint.info import read_model_info
from tinysd_batch.model.device.precision import Precision, choose_precision, dtype_name
from tinysd_batch.model.device.select import choose_device, total_memory_bytes
from tinysd_batch.model.pipeline import Pipeline
from tinysd_batch.model.sampling.batch import GenerationOutput, OutputType
from tinysd_batch.model.sampling.schedule import StepCallback
from tinysd_batch.model.sampling.step_bar import step_bar
from tinysd_batch.settings.memory_budget import MemoryBudget, parse_budget
from tinysd_batch.text import show_value
from tinysd_batch.threads import warn_if_threads_spin
from tinysd_batch.version import __version__


class TinySD(Pipeline):
    """A Stable Diffusion v1 model on one device, with the arguments and names of diffusers' pipelines."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = "embedded",
        *,
        device: str | torch.device | None = None,
        dtype: Precision = None,
        vram_budget: MemoryBudget | str | float | None = None,
        turbo: bool = False,
        unet_bs: int | None = None,
    ) -> Self:
        """Load a model folder, or the model inside the package.

        Args:
            path: a packed or float folder in diffusers' layout, or "embedded".
            device: "cpu", "cuda" or "cuda:1"; if None the first GPU, or the CPU without one.
            dtype: a torch dtype, "full" (float32) or "autocast" (float16 on GPUs). If None, half precision if the
                device computes it fast and correctly; `model.precision.reason` explains the choice.
            vram_budget: device memory for everything: bytes, or "900MB", 0.5 (of the device's memory) or
                "-500MB" (all but 500 MB). Weights that do not fit are streamed to the device layer by layer, and
                computation is split into smaller chunks (see `model.planner.plan_stages`).
            turbo: keep the UNet's weights dequantized while denoising: faster, at 2 to 4 bytes per weight.
            unet_bs: rows that go through the UNet at once; an image has 2 with guidance. None: all.

        Raises:
            ModelError: the folder, a file or a tensor is missing or invalid, or no image fits the budget.
        """
        torch_device, info = choose_device(device), read_model_info(str(path))
        precision = choose_precision(dtype, torch_device, is_small=info.is_small)
        if torch_device.type == "cpu" and not info.is_small:
            warn_if_threads_spin(torch.get_num_threads())
        budget = None if vram_budget is None else parse_budget(vram_budget).resolve(total_memory_bytes(torch_device))
        model = cls(info, torch_device, precision.dtype, budget, turbo=turbo, unet_bs=unet_bs)
        model.precision = precision
        return model

    def __repr__(self) -> str:
        return f"TinySD({self.info.name!r}, device={str(self.device)!r}, precision={dtype_name(self.dtype)!r})"

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int | None] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_syntax: str | Sequence[str] | None = None,
        long_prompts: bool | Sequence[bool] | None = None,
        clip_skip: int | Sequence[int] | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_images_per_prompt: int | None = None,
        sampler: str | Sequence[str] | None = None,
        eta: float | Sequence[float] | None = None,
        output_type: OutputType = "pil",
        noise_seed: int | Sequence[int] | None = None,
        rng: Rng | Sequence[Rng] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
        normalize: bool = True,
        **aliases: Any,
    ) -> GenerationOutput:
        """Generate a batch of images, one per prompt and seed.

        The longest list of prompts or seeds gives the number of images. Every setting may be a list, too, with a value
        for each; single values are for all. An image depends on its own prompt, seed and settings only, as it has its
        own random generator on the CPU: neither batch size nor device changes it beyond float rounding. Images of
        different sizes, steps or samplers are generated one group after the other. Names of the command line work,
        too: `steps`, `scale`, `n_samples`, `H` and `W`.

        Args:
            prompt: text, a list of texts, or None with `prompt_embeds` [B, T, D] (and `negative_prompt_embeds`).
            seed: 0 to 2^63 - 1, one for all or one each. None or -1: a random first seed, from which images count up.
            prompt_syntax: "seed" (`cat:0.25 dog:0.75`, the default), "a1111" (`(cat:1.2)`) or "none".
            long_prompts: encode prompts beyond the model's limit in several windows instead of truncating them. Images
                with different numbers of windows, or with and without guidance, go through the UNet separately.
            clip_skip: layer of the text encoder that encodes the prompts, counted from the end as in the web UI: 1 (the
                default) is the last, 2 the one before; diffusers counts from 0.
            height, width: pixels, multiples of `info.size_multiple_px`; the model's native size if None.
            guidance_scale: one for all or one each; 1 disables guidance.
            num_images_per_prompt: images per prompt; their seeds count up.
            sampler: one of `SAMPLERS` in `tinysd_batch.settings.sampler_names`, or another program's name for one;
                plms if None.
            eta: share of fresh noise in ddim and plms, 0 to 1; the other samplers ignore it.
            noise_seed: seed of the starting noise; all later noise still comes from `seed`.
            rng: generate the noise of torch's "cpu" or "cuda" generator, both on the CPU; "cuda" up to 768x768.
            latents: starting noise [B, 4, h, w], used instead of noise from the seeds.
            callback: called with step, timestep and latents after each step (heun: half step), repeated ones, too.
            progress: show a progress bar on stderr.
            normalize: remove invisible characters from prompts and convert Unicode blanks to spaces.

        Raises:
            UsageError: an argument is invalid or does not fit the others, or an image does not fit the budget.
            TypeError: a keyword is unknown.
            NotFiniteError: latents or an image are NaN, infinite or a single flat colour.
        """
        named = {
            "prompt": prompt, "seed": seed, "negative_prompt": negative_prompt, "prompt_syntax": prompt_syntax,
            "height": height, "width": width, "num_inference_steps": num_inference_steps, "eta": eta, "rng": rng,
            "guidance_scale": guidance_scale, "num_images_per_prompt": num_images_per_prompt, "sampler": sampler,
            "noise_seed": noise_seed, "latents": latents, "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds, "long_prompts": long_prompts, "clip_skip": clip_skip,
        }  # fmt: skip
        if output_type not in get_args(OutputType):
            raise UsageError(f"output_type = {show_value(output_type)}: one of {', '.join(get_args(OutputType))}")
        arguments = merge_aliases(named, aliases)
        requests = build_requests(self.info, arguments, normalize=normalize)
        tensors = build_tensors(arguments, len(requests))
        steps = max(request.settings.steps for request in requests)
        with step_bar(steps, callback, shown=progress) as on_step:
            outputs = self.generate_images(requests, output_type, tensors, on_step)
        label = ModelLabel(self.info.name, self.info.digest, __version__)
        return GenerationOutput.from_outputs(outputs, label, output_type)
