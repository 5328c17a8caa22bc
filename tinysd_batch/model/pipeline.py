"""Text to image in three stages: encode, denoise, decode, each with only its own components on the device."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from tinysd_batch.config import parse_memory_budget
from tinysd_batch.errors import NotFiniteError
from tinysd_batch.model.arguments import GenerationRequest, Rng, build_request, merge_aliases
from tinysd_batch.model.checkpoint.folder import (
    read_noise_schedule,
    read_text_encoder,
    read_unet,
    read_vae_decoder,
    wrap_as_model_error,
)
from tinysd_batch.model.checkpoint.info import ModelInfo, read_model_info
from tinysd_batch.model.device.cuda_graph import MIN_STEPS_TO_CAPTURE, CapturedStep, UNetStep
from tinysd_batch.model.device.precision import Precision, PrecisionChoice, choose_precision, dtype_name
from tinysd_batch.model.device.select import choose_device, device_name, peak_memory_bytes, total_memory_bytes
from tinysd_batch.model.device.streams import on_compute_stream
from tinysd_batch.model.nn.chunked_attention import has_fused_attention, use_chunked_layers
from tinysd_batch.model.nn.unet import DECODE_MODULES, ENCODE_MODULES, run_unet, select_modules
from tinysd_batch.model.nn.vae_decoder import decode_latents, get_interleaved_layers
from tinysd_batch.model.offload.components import Component, check_tensor_shapes, trace_call_order
from tinysd_batch.model.offload.dry_run import dry_run
from tinysd_batch.model.offload.host_embedding import keep_vocabulary_on_host
from tinysd_batch.model.offload.offloader import Offloader
from tinysd_batch.model.offload.oom_retry import retry_if_out_of_memory
from tinysd_batch.model.offload.planner import Planner
from tinysd_batch.model.offload.precompute import CrossAttentionKV, PrecomputedLayers
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, StagePlan, feature_map_dtype
from tinysd_batch.model.packed.dequantize import has_working_kernels
from tinysd_batch.model.packed.layers import count_dequantized_bytes, keep_dequantized
from tinysd_batch.model.sampling.batch import (
    EncodedBatch,
    GenerationOutput,
    OutputType,
    encode_prompts,
    group_rows,
    is_invalid_image,
    rows_where,
    token_columns,
)
from tinysd_batch.model.sampling.noise_correction import read_correction
from tinysd_batch.model.sampling.samplers import get_timesteps, sample
from tinysd_batch.model.sampling.schedule import NoiseGenerator, SamplingRun, StepCallback, zero_deviation
from tinysd_batch.model.sampling.step_bar import step_bar
from tinysd_batch.model.text.encoder import Conditioning, PromptEncoder
from tinysd_batch.model.text.tokenizer import check_vocabulary, read_tokenizer
from tinysd_batch.threads import limit_threads, warn_if_threads_spin
from tinysd_batch.version import __version__

KEEP_DEQUANTIZED_BYTES = 256 * 2**20  # on the CPU, a smaller UNet is dequantized once per batch, not at every step
DENOISED_IN_FLOAT32, DECODED_IN_FLOAT32 = "denoised_in_float32", "decoded_in_float32"  # values of `degraded`
Fallbacks = dict[int, list[str]]  # row -> what was repeated in float32


class TinySD:
    """A Stable Diffusion v1 model on one device. Its UNet stays packed at 2 bits if the folder's is."""

    def __init__(
        self, info: ModelInfo, device: torch.device, dtype: torch.dtype, budget_bytes: int | None = None, *,
        turbo: bool = False, unet_bs: int | None = None,
    ) -> None:  # fmt: skip
        """Load the components of a model folder; see `from_pretrained`, which also chooses device and precision."""
        self.info = info
        self.device = device
        self.dtype = dtype
        self.precision = PrecisionChoice(dtype, "given as the dtype")
        self.unet_bs = unet_bs
        self.text_encoder, text = read_text_encoder(info.path / "text_encoder")
        self.unet, unet = read_unet(info.path / "unet")
        self.correction = read_correction(info.path / "unet", self.unet.config.out_channels)  # None: no correction
        self.vae, vae = read_vae_decoder(info.path / "vae")
        tokenizer = read_tokenizer(info.path / "tokenizer")
        check_vocabulary(tokenizer, self.text_encoder.config.vocab_size, info.path / "tokenizer")
        self.prompt_encoder = PromptEncoder(tokenizer, self.text_encoder, info.max_tokens, self.text_encoder_on_device)
        check_tensor_shapes(self.text_encoder, text, info.path / "text_encoder")
        check_tensor_shapes(self.unet, unet, info.path / "unet")
        check_tensor_shapes(self.vae, vae, info.path / "vae")
        self.precomputed = PrecomputedLayers(self.unet, unet)
        self.attention = use_chunked_layers(self.unet, self.vae, fused=has_fused_attention(device, dtype))
        halves = [select_modules(self.unet, names) for names in (ENCODE_MODULES, DECODE_MODULES)]
        order: list[nn.Module] = []
        if budget_bytes is not None or not info.is_small:  # otherwise nothing is ever streamed
            with wrap_as_model_error(info.path):
                order = trace_call_order([self.text_encoder, self.unet, self.vae], partial(dry_run, self))
        keep_vocabulary_on_host(self.text_encoder, text, dtype)
        self.text_fragment = Component("text encoder", {"": self.text_encoder}, text, dtype, order)
        self.encode_fragment = Component("UNet encode half", halves[0], unet, dtype, order)
        self.decode_fragment = Component("UNet decode half", halves[1], unet, dtype, order)
        interleaved = get_interleaved_layers(self.vae)
        self.vae_fragment = Component("VAE decoder", {"": self.vae}, vae, dtype, order, interleaved)
        self.offloader = Offloader(device)
        self.planner = Planner(self, budget_bytes)
        self.capture_failures: set[StagePlan] = set()  # plans whose steps could not be captured as CUDA graphs
        has_room = device.type == "cpu" and budget_bytes is None
        if turbo or (has_room and count_dequantized_bytes(self.unet) <= KEEP_DEQUANTIZED_BYTES):
            keep_dequantized(self.unet)
        if budget_bytes is not None:
            self.planner.check_budget()
        self.schedule = read_noise_schedule(info.path / "scheduler" / "scheduler_config.json")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = "embedded",
        *,
        device: str | torch.device | None = None,
        dtype: Precision = None,
        vram_budget: str | float | None = None,
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
        budget = parse_memory_budget(vram_budget, total_memory_bytes(torch_device))
        model = cls(info, torch_device, precision.dtype, budget, turbo=turbo, unet_bs=unet_bs)
        model.precision = precision
        return model

    @property
    def fragments(self) -> tuple[Component, Component, Component, Component]:
        """The components in the order in which they run."""
        return self.text_fragment, self.encode_fragment, self.decode_fragment, self.vae_fragment

    @property
    def device_name(self) -> str:
        return device_name(self.device)

    def __repr__(self) -> str:
        return f"TinySD({self.info.name!r}, device={str(self.device)!r}, precision={dtype_name(self.dtype)!r})"

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int | None] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_syntax: str | Sequence[str] | None = None,
        long_prompts: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_images_per_prompt: int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        output_type: OutputType = "pil",
        noise_seed: int | Sequence[int] | None = None,
        rng: Rng = "cpu",
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
        normalize: bool = True,
        **aliases: Any,
    ) -> GenerationOutput:
        """Generate a batch of images, one per prompt and seed.

        The longest list gives the number of images; single values are for all. An image depends on its own prompt,
        seed and scale only, as it has its own random generator on the CPU: neither batch size nor device changes it
        beyond float rounding. Names of the command line work, too: `steps`, `scale`, `n_samples`, `H` and `W`.

        Args:
            prompt: text, a list of texts, or None with `prompt_embeds` [B, T, D] (and `negative_prompt_embeds`).
            seed: 0 to 2^63 - 1, one for all or one each. None or -1: a random first seed, from which images count up.
            prompt_syntax: "seed" (`cat:0.25 dog:0.75`, the default), "a1111" (`(cat:1.2)`) or "none".
            long_prompts: encode prompts beyond the model's limit in several windows instead of truncating them. Images
                with different numbers of windows, or with and without guidance, go through the UNet separately.
            height, width: pixels, multiples of `info.size_multiple_px`; the model's native size if None.
            guidance_scale: one for all or one each; 1 disables guidance.
            num_images_per_prompt: images per prompt; their seeds count up.
            sampler: one of `tinysd_batch.config.SAMPLERS`, or another program's name for it; plms if None.
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
            "negative_prompt_embeds": negative_prompt_embeds, "long_prompts": long_prompts,
        }  # fmt: skip
        request = build_request(self.info, merge_aliases(named, aliases), normalize=normalize)
        one_thread = 1 if self.device.type == "cpu" and self.info.is_small else None
        with torch.no_grad(), limit_threads(one_thread), step_bar(request.steps, callback, shown=progress) as on_step:
            output = self.generate_batch(request, output_type, on_step)
        output.settings = request.image_settings(self.info, __version__)
        if output_type == "pil":
            output.attach_settings()
        return output

    def generate_batch(
        self, request: GenerationRequest, output_type: OutputType, callback: StepCallback | None
    ) -> GenerationOutput:
        """Encode, denoise and decode a batch, and measure times and peak memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with on_compute_stream(self.device):
            started = time.monotonic()
            conditionings = retry_if_out_of_memory(self.planner, lambda: encode_prompts(self.prompt_encoder, request))
            encoded = time.monotonic()
            latents, fallbacks = self.denoise_batch(EncodedBatch(conditionings, request, callback))
            denoised = time.monotonic()
            images = latents.cpu() if output_type == "latent" else self.decode(latents, output_type, fallbacks)
        degraded = [fallbacks.get(row, []) for row in range(len(conditionings))]
        return GenerationOutput(
            images=images,
            **token_columns(conditionings),
            degraded=degraded,
            precision=["float32" if DENOISED_IN_FLOAT32 in names else dtype_name(self.dtype) for names in degraded],
            text_s=encoded - started,
            denoise_s=denoised - encoded,
            decode_s=time.monotonic() - denoised,
            peak_memory_bytes=peak_memory_bytes(self.device),
        )

    def denoise_batch(self, batch: EncodedBatch) -> tuple[Tensor, Fallbacks]:
        """Return the final latents; rows that overflow float16 are repeated in float32. Raises NotFiniteError."""
        rows = range(len(batch.conditionings))
        final = retry_if_out_of_memory(self.planner, lambda: self.denoise_rows(batch, rows))
        overflowed = rows_where(~final.isfinite().flatten(1).all(dim=1))
        if overflowed and self.dtype is not torch.float32:
            with self.in_float32():
                final[overflowed] = retry_if_out_of_memory(self.planner, lambda: self.denoise_rows(batch, overflowed))
        if not final.isfinite().all():
            raise NotFiniteError("the latents are not finite")
        return final, {row: [DENOISED_IN_FLOAT32] for row in overflowed}

    def denoise_rows(self, batch: EncodedBatch, rows: Sequence[int]) -> Tensor:
        """Return the final latents of these rows, [len(rows), 4, h, w], each from its own seed."""
        generators = batch.make_generators(rows)
        start = batch.prepare_latents(self.unet.config.in_channels, self.info.vae_scale_factor, rows, generators)
        conditionings = [batch.conditionings[row] for row in rows]
        final = torch.empty_like(start, device=self.device)
        for group in group_rows(conditionings):
            final[group] = self.denoise(
                batch, start[group], [conditionings[row] for row in group], [generators[row] for row in group]
            )
        return final

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 within a `with` block."""
        dtype = self.dtype
        self.set_dtype(torch.float32)
        try:
            yield
        finally:
            self.set_dtype(dtype)

    def set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.text_encoder.embeddings.token_embedding.dtype = dtype
        for fragment in self.fragments:
            fragment.set_dtype(dtype)

    @contextlib.contextmanager
    def text_encoder_on_device(self) -> Iterator[torch.device]:
        with self.planner.executing(self.planner.plan(self.planner.encode_stage())):
            yield self.device

    def denoise(
        self, batch: EncodedBatch, start: Tensor, conditionings: list[Conditioning], generators: list[NoiseGenerator]
    ) -> Tensor:
        """Denoise unit noise [B, 4, h, w] to latents of images. Latents and scheduler state are always float32."""
        sampler, steps = batch.request.sampler, batch.request.steps
        scale = torch.tensor([cond.scale for cond in conditionings], device=self.device).view(-1, 1, 1, 1)
        negatives = [cond.negative_embedding for cond in conditionings if cond.negative_embedding is not None]
        is_guided = bool(negatives)
        self.precomputed.prepare_timesteps(get_timesteps(sampler, steps, self.schedule))
        context = torch.stack([*negatives, *(cond.embedding for cond in conditionings)])
        context_kv = self.precomputed.compute_context_kv(context, self.device, self.dtype)

        height, width = (self.info.vae_scale_factor * side for side in start.shape[2:])
        shape = MicroBatchShape(len(context), height, width, context.shape[1], context_kv.prompts)
        plan = self.planner.plan(self.planner.denoise_stage(shape))

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            """Predict the guided, corrected noise [B, 4, h, w]: e = e_negative + scale (e_text - e_negative)."""
            self.precomputed.set_timestep(float(timestep), self.device, self.dtype)
            if is_guided:
                negative_noise, text_noise = step_unet(torch.cat([latents, latents])).chunk(2)
                noise = negative_noise + scale * (text_noise - negative_noise)
            else:
                noise = step_unet(latents)
            return noise if self.correction is None else self.correction.apply(noise, float(timestep))

        deviation = zero_deviation if self.correction is None else self.correction.absorbed_deviation
        callback = batch.callback or (lambda *_: None)
        run = SamplingRun(predict, steps, self.schedule, generators, batch.request.eta, callback, deviation)
        try:
            with (
                self.planner.executing(plan) as strategy,
                self.unet_step(context_kv, plan, strategy, steps) as step_unet,
            ):
                return sample(sampler, run, start.to(self.device))
        finally:
            self.precomputed.forget(all_of_it=self.device.type == "cpu" and self.planner.budget_bytes is not None)

    @contextlib.contextmanager
    def unet_step(
        self, context_kv: CrossAttentionKV, plan: StagePlan, strategy: ExecutionStrategy, steps: int
    ) -> Iterator[UNetStep]:
        """Yield a function from latents [R, 4, h, w] to their noise at the timestep set in `precomputed`.

        It replays a CUDA graph if the device and the number of steps allow it.
        """
        self.precomputed.use_context_kv(context_kv)

        def run_step(latents: Tensor) -> Tensor:
            return run_unet(self.unet, latents, context_kv.rows, strategy.rows, self.dtype)

        may_capture = self.device.type == "cuda" and steps >= MIN_STEPS_TO_CAPTURE and plan not in self.capture_failures
        if not may_capture or not has_working_kernels(self.device):
            yield run_step
            return
        captured = CapturedStep(run_step, partial(self.planner.capturing, plan), self.planner.torch_budget_bytes)
        try:
            yield captured
        finally:
            captured.close()
            if captured.capture_failed:
                self.capture_failures.add(plan)

    def predict_noise(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Predict the noise, [R, 4, h, w] float32, in latents [R, 4, h, w] with contexts [R, T, D]; no guidance."""
        context_kv = self.precomputed.compute_context_kv(context, self.device, self.dtype)
        self.precomputed.set_timestep(float(timestep), self.device, self.dtype)
        self.precomputed.use_context_kv(context_kv)
        return run_unet(self.unet, latents, context_kv.rows, self.unet_bs, self.dtype)

    def decode(
        self, latents: Tensor, output_type: OutputType, fallbacks: Fallbacks
    ) -> list[Image.Image] | npt.NDArray[np.float32]:
        """Decode latents to images. Invalid ones are repeated in float32, which is added to `fallbacks`.

        Raises NotFiniteError if an image is NaN, infinite or a single flat colour in float32, too.
        """
        pixels = retry_if_out_of_memory(self.planner, lambda: self.decode_pixels(latents))
        invalid = rows_where(is_invalid_image(pixels))
        if invalid and self.dtype is not torch.float32:
            with self.in_float32():
                pixels[invalid] = retry_if_out_of_memory(self.planner, lambda: self.decode_pixels(latents[invalid]))
            for row in invalid:
                fallbacks.setdefault(row, []).append(DECODED_IN_FLOAT32)
        if is_invalid_image(pixels).any():
            raise NotFiniteError("the image is not finite, or a single flat colour")
        if output_type == "np":
            return pixels.numpy()
        return [Image.fromarray(image) for image in (pixels * 255).round().to(torch.uint8).numpy()]

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents [B, 4, h, w] to pixels in 0..1, float32 [B, H, W, 3], on the host."""
        height, width = (self.info.vae_scale_factor * side for side in latents.shape[2:])
        plan = self.planner.plan(self.planner.decode_stage(MicroBatchShape(1, height, width, 0)))
        with self.planner.executing(plan) as strategy:
            scaled = (latents / self.vae.config.scaling_factor).to(self.dtype)
            pixels = decode_latents(self.vae, scaled, feature_map_dtype(strategy), recompute=strategy.recompute_maps)
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
