"""Text to image: encode, denoise, decode, each with only its fragment on the device."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from tinysd_batch.config import parse_memory_budget
from tinysd_batch.errors import NotFiniteError, is_out_of_memory
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
from tinysd_batch.model.offload.planner import Planner
from tinysd_batch.model.offload.precompute import CrossAttentionKV, PrecomputedLayers
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, StagePlan, feature_map_dtype
from tinysd_batch.model.packed.dequantize import has_working_kernels
from tinysd_batch.model.packed.layers import count_dequantized_bytes, keep_dequantized
from tinysd_batch.model.sampling.batch import (
    EncodedBatch,
    GenerationOutput,
    OutputType,
    group_rows,
    is_invalid_image,
    rows_where,
)
from tinysd_batch.model.sampling.noise_correction import read_correction
from tinysd_batch.model.sampling.samplers import get_timesteps, sample
from tinysd_batch.model.sampling.schedule import NoiseGenerator, SamplingRun, StepCallback, zero_deviation
from tinysd_batch.model.sampling.step_bar import step_bar
from tinysd_batch.model.text.encoder import Conditioning, PromptEncoder
from tinysd_batch.model.text.tokenizer import check_vocabulary, read_tokenizer
from tinysd_batch.threads import limit_threads, warn_if_threads_spin
from tinysd_batch.version import __version__

KEEP_UNPACKED_BYTES = 256 * 2**20  # on the CPU, a UNet smaller than this is unpacked once per batch, not at every step
DENOISED, DECODED = "denoised_in_float32", "decoded_in_float32"
T = TypeVar("T")
Fallbacks = dict[int, list[str]]  # row -> what had to be done again


class TinySD:
    """A Stable Diffusion v1 model on one device, its UNet at 2 bits where the folder holds it so."""

    def __init__(
        self, info: ModelInfo, device: torch.device, dtype: torch.dtype, budget_bytes: int | None = None, *,
        turbo: bool = False, unet_bs: int | None = None,
    ) -> None:  # fmt: skip
        self.info = info
        self.device = device
        self.dtype = dtype
        self.precision = PrecisionChoice(dtype, "given as the dtype")
        self.unet_bs = unet_bs
        self.text_encoder: CLIPTextModel
        self.unet: UNet2DConditionModel
        self.vae: AutoencoderKL
        self.text_encoder, text = read_text_encoder(info.path / "text_encoder")
        self.unet, unet = read_unet(info.path / "unet")
        self.correction = read_correction(info.path / "unet", self.unet.config.out_channels)  # None: draw without
        self.vae, vae = read_vae_decoder(info.path / "vae")
        tokenizer = read_tokenizer(info.path / "tokenizer")
        check_vocabulary(tokenizer, self.text_encoder.config.vocab_size, info.path / "tokenizer")
        self.prompts = PromptEncoder(tokenizer, self.text_encoder, info.max_tokens, self.text_encoder_on_device)
        for part, module, tensors in (
            ("text_encoder", self.text_encoder, text), ("unet", self.unet, unet), ("vae", self.vae, vae),
        ):  # fmt: skip
            check_tensor_shapes(module, tensors, info.path / part)
        self.precomputed = PrecomputedLayers(self.unet, unet)
        self.attention = use_chunked_layers(self.unet, self.vae, fused=has_fused_attention(device, dtype))
        halves = [select_modules(self.unet, names) for names in (ENCODE_MODULES, DECODE_MODULES)]
        order: list[nn.Module] = []
        if budget_bytes is not None or not info.is_small:  # else nothing is ever streamed
            with wrap_as_model_error(info.path):
                order = trace_call_order([self.text_encoder, self.unet, self.vae], partial(dry_run, self))
        keep_vocabulary_on_host(self.text_encoder, text, dtype)
        self.text_fragment = Component("text encoder", {"": self.text_encoder}, text, dtype, order)
        self.encode_fragment = Component("UNet encode half", halves[0], unet, dtype, order)
        self.decode_fragment = Component("UNet decode half", halves[1], unet, dtype, order)
        self.vae_fragment = Component(
            "VAE decoder", {"": self.vae}, vae, dtype, order, get_interleaved_layers(self.vae)
        )
        self.offloader = Offloader(device)
        self.planner = Planner(self, budget_bytes)
        self.uncaptured: set[StagePlan] = set()  # in which steps could not be captured as CUDA graphs
        small = (
            device.type == "cpu" and budget_bytes is None and count_dequantized_bytes(self.unet) <= KEEP_UNPACKED_BYTES
        )
        if turbo or small:
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
        """Read a model folder, or the model that ships with the package.

        Args:
            path: a packed or plain folder in diffusers' layout, or "embedded".
            device: "cpu", "cuda", "cuda:1"; the first GPU where there is one if None.
            dtype: a torch dtype, "full" (float32) or "autocast" (float16 on GPUs); if None half precision where the
                device is good at it (`model.precision` says how that is decided, `precision.reason` what was).
            vram_budget: device memory for everything: bytes, or "900MB", 0.5 (of the device's memory) or
                "-500MB" (all but so much). What does not fit passes through the device piece by piece, and work is
                done in smaller parts (`model.planner.plan_stages` says how).
            turbo: keep the UNet's weights unpacked while denoising: faster, at 2 to 4 bytes a weight.
            unet_bs: rows that go through the UNet at once, of the 2 an image takes with guidance; all if None.

        Raises:
            ModelError: the folder, a file or a tensor is missing or wrong, or no picture fits the budget.
        """
        chosen, info = choose_device(device), read_model_info(str(path))
        precision = choose_precision(dtype, chosen, is_small=info.is_small)
        if chosen.type == "cpu" and not info.is_small:
            warn_if_threads_spin(torch.get_num_threads())
        budget = parse_memory_budget(vram_budget, total_memory_bytes(chosen))
        model = cls(info, chosen, precision.dtype, budget, turbo=turbo, unet_bs=unet_bs)
        model.precision = precision
        return model

    @property
    def fragments(self) -> tuple[Component, Component, Component, Component]:
        """In the order in which they work."""
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
        """Generate a batch: one image per prompt and seed, the longer list giving the number, single values shared.

        An image depends on its own prompt, seed and scale only: each has its own CPU random generator, so neither
        batch size nor device changes it beyond float rounding. The names of the command line are understood, too:
        `steps`, `scale`, `n_samples`, `H` and `W`.

        Args:
            prompt: text, a list of texts, or None with `prompt_embeds` [B, T, D] (and `negative_prompt_embeds`).
            seed: 0 to 2^63 - 1, one for all or one each; None or -1 draws one, the images taking it and those after
                it. The output's `seeds` has them all.
            prompt_syntax: what marks in prompts mean: "seed" (`cat:0.25 dog:0.75`, the default), "a1111"
                (`(cat:1.2)`) or "none".
            long_prompts: encode prompts beyond the model's limit in pieces, instead of cutting them. Images whose
                prompts differ in pieces, or in having guidance, go through the UNet apart.
            height, width: pixels, multiples of `info.size_multiple_px`; the model's native size if None.
            guidance_scale: one for all or one each; 1 switches guidance off.
            num_images_per_prompt: so many images of each prompt, with seeds that follow each other.
            sampler: a name of `tinysd_batch.config.SAMPLERS`, or another program's for it; plms if None.
            eta: the share of fresh noise in ddim and plms, 0 to 1; the others have none, or as much as they want.
            noise_seed: draw the starting noise from this seed, and all later noise from `seed` as ever.
            rng: whose noise: that of torch's generator on the CPU, or on a CUDA card, which is computed on the CPU, too
                (pictures up to 768x768).
            latents: starting noise [B, 4, h, w] in place of the seeds' own.
            callback: called after each step with step, timestep and latents (heun: after each half of a step); from the
                first step again where images have to be drawn again.
            progress: show a progress bar on stderr.
            normalize: drop invisible characters from prompts and take Unicode's blanks as spaces.

        Raises:
            UsageError: arguments that do not fit together, or a picture that does not fit the budget.
            TypeError: a keyword that is not known.
            NotFiniteError: the latents or an image came out as NaN, infinite or one flat colour.
        """
        own = {
            "prompt": prompt, "seed": seed, "negative_prompt": negative_prompt, "prompt_syntax": prompt_syntax,
            "height": height, "width": width, "num_inference_steps": num_inference_steps, "eta": eta, "rng": rng,
            "guidance_scale": guidance_scale, "num_images_per_prompt": num_images_per_prompt, "sampler": sampler,
            "noise_seed": noise_seed, "latents": latents, "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds, "long_prompts": long_prompts,
        }  # fmt: skip
        request = build_request(self.info, merge_aliases(own, aliases), normalize=normalize)
        one_thread = 1 if self.device.type == "cpu" and self.info.is_small else None
        with torch.no_grad(), limit_threads(one_thread), step_bar(request.steps, callback, shown=progress) as on_step:
            made = self.generate_batch(request, output_type, on_step)
        made.settings = request.settings(self.info, __version__)
        if output_type == "pil":
            made.attach_settings()
        return made

    def generate_batch(
        self, request: GenerationRequest, output_type: OutputType, callback: StepCallback | None
    ) -> GenerationOutput:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with on_compute_stream(self.device):
            started = time.monotonic()
            conditions = self.with_room(lambda: self.prompts.encode(
                request.prompts, request.negative_prompts, request.scales, request.syntaxes,
                long_prompts=request.long_prompts, prompt_embeds=request.prompt_embeds,
                negative_prompt_embeds=request.negative_prompt_embeds,
            ))  # fmt: skip
            encoded = time.monotonic()
            final, redone = self.draw_latents(EncodedBatch(conditions, request, callback))
            denoised = time.monotonic()
            images = final.cpu() if output_type == "latent" else self.decode(final, output_type, redone)
        read = [(one.tokens, one.negative_tokens) for one in conditions]
        rows = range(len(conditions))
        return GenerationOutput(
            images=images,
            n_tokens=[tokens.n_tokens if tokens else None for tokens, _ in read],
            truncated=[tokens.truncated if tokens else None for tokens, _ in read],
            negative_truncated=[tokens.truncated if tokens else None for _, tokens in read],
            degraded=[redone.get(row, []) for row in rows],
            precision=["float32" if DENOISED in redone.get(row, []) else dtype_name(self.dtype) for row in rows],
            text_s=encoded - started,
            denoise_s=denoised - encoded,
            decode_s=time.monotonic() - denoised,
            peak_memory_bytes=peak_memory_bytes(self.device),
        )

    def with_room(self, work: Callable[[], T]) -> T:
        """Do it again where memory ran out within a budget that should have sufficed, with larger gaps from then on.

        How torch's allocator cuts up memory, and what libraries want to work in, is known by experience only.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self.planner.increase_fragmentation_share():
                    raise

    def draw_latents(self, drawing: EncodedBatch) -> tuple[Tensor, Fallbacks]:
        """Final latents of the whole batch, float32. Images that float16 could not hold are drawn again in float32.

        Raises NotFiniteError for one that float32 cannot hold either.
        """
        rows = range(len(drawing.conditions))
        final = self.with_room(lambda: self.draw_rows(drawing, rows))
        lost = rows_where(~final.isfinite().flatten(1).all(dim=1))
        if lost and self.dtype is not torch.float32:
            with self.in_float32():
                final[lost] = self.with_room(lambda: self.draw_rows(drawing, lost))
        if not final.isfinite().all():
            raise NotFiniteError("the latents are not finite")
        return final, {row: [DENOISED] for row in lost}

    def draw_rows(self, drawing: EncodedBatch, rows: Sequence[int]) -> Tensor:
        """Final latents of these rows, [len(rows), 4, h, w], each from its own seed."""
        generators = drawing.make_generators(rows)
        start = drawing.prepare_latents(self.unet.config.in_channels, self.info.vae_scale_factor, rows, generators)
        conditions = [drawing.conditions[row] for row in rows]
        final = torch.empty_like(start, device=self.device)
        request = drawing.request
        for some in group_rows(conditions):
            final[some] = self.denoise(
                start[some], [conditions[row] for row in some], request.steps, request.sampler, request.eta,
                [generators[row] for row in some], drawing.callback,
            )  # fmt: skip
        return final

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 for once."""
        usual = self.dtype
        self.set_dtype(torch.float32)
        try:
            yield
        finally:
            self.set_dtype(usual)

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
        self, start: Tensor, conditions: Sequence[Conditioning], steps: int, sampler: str, eta: float,
        generators: Sequence[NoiseGenerator], callback: StepCallback | None,
    ) -> Tensor:  # fmt: skip
        """Unit noise [B, 4, h, w] to latents of an image, float32. Latents and scheduler state are float32 always."""
        scale = torch.tensor([one.scale for one in conditions], device=self.device).view(-1, 1, 1, 1)
        negatives = [one.negative_embedding for one in conditions if one.negative_embedding is not None]
        guided = bool(negatives)
        self.precomputed.prepare_timesteps(get_timesteps(sampler, steps, self.schedule))
        context = torch.stack([*negatives, *(one.text for one in conditions)])
        attended = self.precomputed.compute_context_kv(context, self.device, self.dtype)

        height, width = (self.info.vae_scale_factor * side for side in start.shape[2:])
        phase = self.planner.plan(
            self.planner.denoise_stage(MicroBatchShape(len(context), height, width, context.shape[1], attended.prompts))
        )

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            """The guided noise [B, 4, h, w], corrected: e = e_negative + scale (e_text - e_negative)."""
            self.precomputed.set_timestep(float(timestep), self.device, self.dtype)
            if guided:
                without, with_text = step(torch.cat([latents, latents])).chunk(2)
                noise = without + scale * (with_text - without)
            else:
                noise = step(latents)
            return noise if self.correction is None else self.correction.apply(noise, float(timestep))

        deviation = zero_deviation if self.correction is None else self.correction.deviation
        run = SamplingRun(predict, steps, self.schedule, generators, eta, callback or (lambda *_: None), deviation)
        try:
            with self.planner.executing(phase) as way, self.stepping(attended, phase, way, steps) as step:
                return sample(sampler, run, start.to(self.device))
        finally:
            self.precomputed.forget(all_of_it=self.device.type == "cpu" and self.planner.budget_bytes is not None)

    @contextlib.contextmanager
    def stepping(
        self, attended: CrossAttentionKV, phase: StagePlan, way: ExecutionStrategy, steps: int
    ) -> Iterator[UNetStep]:
        """What the UNet says of latents [R, 4, h, w], where prompts, and from outside the time, are known to it."""
        self.precomputed.use_context_kv(attended)

        def issue(latents: Tensor) -> Tensor:
            return run_unet(self.unet, latents, attended.rows, way.rows, self.dtype)

        if (
            self.device.type != "cuda"
            or steps < MIN_STEPS_TO_CAPTURE
            or phase in self.uncaptured
            or not has_working_kernels(self.device)
        ):
            yield issue
            return
        captured = CapturedStep(issue, partial(self.planner.capturing, phase), self.planner.torch_budget_bytes)
        try:
            yield captured
        finally:
            captured.close()
            if captured.capture_failed:
                self.uncaptured.add(phase)

    def predict_noise(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """What the UNet says, [R, 4, h, w] float32, of rows with their contexts [R, T, D]."""
        attended = self.precomputed.compute_context_kv(context, self.device, self.dtype)
        self.precomputed.set_timestep(float(timestep), self.device, self.dtype)
        self.precomputed.use_context_kv(attended)
        return run_unet(self.unet, latents, attended.rows, self.unet_bs, self.dtype)

    def decode(
        self, latents: Tensor, output_type: OutputType, redone: Fallbacks
    ) -> list[Image.Image] | npt.NDArray[np.float32]:
        """Latents to pictures; those that float16 could not hold once more in float32, which `redone` is told.

        Raises NotFiniteError for one that is NaN or all one colour even so.
        """
        values = self.with_room(lambda: self.decode_pixels(latents))
        lost = rows_where(is_invalid_image(values))
        if lost and self.dtype is not torch.float32:
            with self.in_float32():
                values[lost] = self.with_room(lambda: self.decode_pixels(latents[lost]))
            for row in lost:
                redone.setdefault(row, []).append(DECODED)
        if is_invalid_image(values).any():
            raise NotFiniteError("the picture is not finite, or one flat colour")
        if output_type == "np":
            return values.numpy()
        return [Image.fromarray(one) for one in (values * 255).round().to(torch.uint8).numpy()]

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to colours in 0..1, float32 [B, H, W, 3], on the host."""
        height, width = (self.info.vae_scale_factor * side for side in latents.shape[2:])
        phase = self.planner.plan(self.planner.decode_stage(MicroBatchShape(1, height, width, 0)))
        with self.planner.executing(phase) as way:
            scaled = (latents / self.vae.config.scaling_factor).to(self.dtype)
            pixels = decode_latents(self.vae, scaled, feature_map_dtype(way), recompute=way.recompute_maps)
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
