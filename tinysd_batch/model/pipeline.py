"""Text to image in three stages: encode, denoise, decode, each with only its own components on the device."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from tinysd_batch.errors import NotFiniteError
from tinysd_batch.model.arguments import TensorArguments
from tinysd_batch.model.checkpoint.folder import (
    read_noise_schedule,
    read_text_encoder,
    read_unet,
    read_vae_decoder,
    wrap_as_model_error,
)
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.model.device.cuda_graph import MIN_STEPS_TO_CAPTURE, CapturedStep, UNetStep
from tinysd_batch.model.device.precision import PrecisionChoice, dtype_name
from tinysd_batch.model.device.select import device_name, peak_memory_bytes
from tinysd_batch.model.device.streams import on_compute_stream
from tinysd_batch.model.nn.chunked_attention import has_fused_attention, use_chunked_layers
from tinysd_batch.model.nn.unet import DECODE_MODULES, ENCODE_MODULES, run_unet, select_modules
from tinysd_batch.model.nn.vae_decoder import decode_latents, get_interleaved_layers
from tinysd_batch.model.offload.components import Component, check_tensor_shapes, trace_call_order
from tinysd_batch.model.offload.dry_run import dry_run
from tinysd_batch.model.offload.host_embedding import keep_vocabulary_on_host
from tinysd_batch.model.offload.offloader import Offloader
from tinysd_batch.model.offload.planner import Planner
from tinysd_batch.model.offload.precompute import CrossAttentionKV, PrecomputedLayers
from tinysd_batch.model.offload.replan_on_oom import retry_if_out_of_memory
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, StagePlan, feature_map_dtype
from tinysd_batch.model.packed.dequantize import has_working_kernels
from tinysd_batch.model.packed.layers import count_dequantized_bytes, keep_dequantized
from tinysd_batch.model.sampling.batch import (
    EncodedBatch,
    ImageOutput,
    OutputType,
    describe_tokens,
    group_by_batch_key,
    group_rows,
    is_invalid_image,
    rows_where,
)
from tinysd_batch.model.sampling.guidance import apply_guidance
from tinysd_batch.model.sampling.noise_correction import read_correction
from tinysd_batch.model.sampling.samplers import get_timesteps, sample
from tinysd_batch.model.sampling.schedule import NoiseGenerator, SamplingRun, StepCallback, zero_deviation
from tinysd_batch.model.text.encoder import Conditioning, PromptEncoder
from tinysd_batch.model.text.tokenizer import check_vocabulary, read_tokenizer
from tinysd_batch.records import ImageRequest
from tinysd_batch.threads import limit_threads

KEEP_DEQUANTIZED_BYTES = 256 * 2**20  # on the CPU, a smaller UNet is dequantized once per batch, not at every step
DENOISED_IN_FLOAT32, DECODED_IN_FLOAT32 = "denoised_in_float32", "decoded_in_float32"  # values of `degraded`
NO_TENSORS = TensorArguments()
Fallbacks = dict[int, list[str]]  # row -> what was repeated in float32


class Pipeline:
    """A Stable Diffusion v1 model on one device. Its UNet stays packed at 2 bits if the folder's is."""

    def __init__(
        self, info: ModelInfo, device: torch.device, dtype: torch.dtype, budget_bytes: int | None = None, *,
        turbo: bool = False, unet_bs: int | None = None,
    ) -> None:  # fmt: skip
        """Load the components of a model folder; see `TinySD.from_pretrained`, which also chooses the device."""
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

    @property
    def fragments(self) -> tuple[Component, Component, Component, Component]:
        """The components in the order in which they run."""
        return self.text_fragment, self.encode_fragment, self.decode_fragment, self.vae_fragment

    @property
    def device_name(self) -> str:
        return device_name(self.device)

    def generate_images(
        self,
        requests: Sequence[ImageRequest],
        output_type: OutputType = "pil",
        tensors: TensorArguments = NO_TENSORS,
        callback: StepCallback | None = None,
    ) -> list[ImageOutput]:
        """Generate images from records that have been checked, as jobs do.

        Images that can be in one micro-batch are generated together; see `TinySD.generate` for errors.
        """
        outputs: dict[int, ImageOutput] = {}
        one_thread = 1 if self.device.type == "cpu" and self.info.is_small else None
        with torch.no_grad(), limit_threads(one_thread):
            for rows in group_by_batch_key(requests):
                batch = [requests[row] for row in rows]
                generated = self.generate_batch(batch, output_type, tensors.select(rows), callback)
                outputs |= zip(rows, generated, strict=True)
        return [outputs[row] for row in range(len(requests))]

    def generate_batch(
        self,
        requests: Sequence[ImageRequest],
        output_type: OutputType,
        tensors: TensorArguments,
        callback: StepCallback | None,
    ) -> list[ImageOutput]:
        """Encode, denoise and decode a micro-batch, and measure times and peak memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with on_compute_stream(self.device):
            started = time.monotonic()
            conditionings = retry_if_out_of_memory(self.planner, lambda: self.encode_prompts(requests, tensors))
            encoded = time.monotonic()
            latents, fallbacks = self.denoise_batch(EncodedBatch(requests, conditionings, tensors, callback))
            denoised = time.monotonic()
            images = latents.cpu() if output_type == "latent" else self.decode(latents, output_type, fallbacks)
        decoded = time.monotonic()
        return [
            ImageOutput(
                request=request,
                image=images[row],
                **describe_tokens(conditionings[row]),
                degraded=fallbacks.get(row, []),
                precision="float32" if DENOISED_IN_FLOAT32 in fallbacks.get(row, ()) else dtype_name(self.dtype),
                text_s=(encoded - started) / len(requests),
                denoise_s=(denoised - encoded) / len(requests),
                decode_s=(decoded - denoised) / len(requests),
                peak_memory_bytes=peak_memory_bytes(self.device),
            )
            for row, request in enumerate(requests)
        ]

    def encode_prompts(self, requests: Sequence[ImageRequest], tensors: TensorArguments) -> list[Conditioning]:
        return self.prompt_encoder.encode(requests, tensors.prompt_embeds, tensors.negative_prompt_embeds)

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
        sampler, steps = batch.settings.sampler, batch.settings.steps
        scale = torch.tensor([cond.scale for cond in conditionings], device=self.device).view(-1, 1, 1, 1)
        negatives = [cond.negative_embedding for cond in conditionings if cond.negative_embedding is not None]
        self.precomputed.prepare_timesteps(get_timesteps(sampler, steps, self.schedule))
        context = torch.stack([*negatives, *(cond.embedding for cond in conditionings)])
        context_kv = self.precomputed.compute_context_kv(context, self.device, self.dtype)

        height, width = (self.info.vae_scale_factor * side for side in start.shape[2:])
        shape = MicroBatchShape(len(context), height, width, context.shape[1], context_kv.prompts)
        plan = self.planner.plan(self.planner.denoise_stage(shape))

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            """Predict the guided, corrected noise [B, 4, h, w]."""
            self.precomputed.set_timestep(float(timestep), self.device, self.dtype)
            if negatives:
                negative_noise, text_noise = step_unet(torch.cat([latents, latents])).chunk(2)
                noise = apply_guidance(negative_noise, text_noise, scale)
            else:
                noise = step_unet(latents)
            return noise if self.correction is None else self.correction.apply(noise, float(timestep))

        deviation = zero_deviation if self.correction is None else self.correction.absorbed_deviation
        callback = batch.callback or (lambda *_: None)
        run = SamplingRun(predict, steps, self.schedule, generators, batch.settings.eta, callback, deviation)
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
