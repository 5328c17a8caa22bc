"""Every setting, declared once.

A setting is a field of `ImageSettings` or `Settings`. Everything else is derived from it: options and their help, the
columns of manifests and results, the inputs of the `image_id`, the metadata of images, what may change when a job is
resumed, the names that `TinySD.generate` and `submit` accept, and the tables in `docs/`. To add one, declare it here
and use its value where it is computed.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tinysd_batch.settings.declaration import Effect, Panel, Setting, setting
from tinysd_batch.settings.limits import (
    MAX_GRID_IMAGES,
    MAX_IMAGES_PER_BATCH,
    MAX_IMAGES_PER_ROW,
    MAX_SIDE_PX,
    MAX_STEPS,
)
from tinysd_batch.settings.memory_budget import MemoryBudget
from tinysd_batch.settings.sampler_names import SAMPLERS, SAMPLERS_WITH_ETA
from tinysd_batch.settings.value_types import (
    Choice,
    ClusterAddress,
    DeviceMemory,
    Flag,
    Integer,
    Number,
    PromptText,
    SamplerName,
    Seed,
    Text,
)

EMBEDDED_MODEL = "embedded"
SIDE_PX = Integer(8, MAX_SIDE_PX, model_bounds=(("multiple_of", "size_multiple_px"),))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """Settings of one image. Besides model, precision, prompt and seed nothing else decides its pixels."""

    negative_prompt: str = setting(
        PromptText(),
        "",
        help="What the images should not show.",
        column="what the image should not show",
        aliases=("negative",),
        is_always_recorded=True,
        encodes_prompt=True,
    )
    prompt_syntax: str = setting(
        Choice(("seed", "a1111", "none")),
        "seed",
        help="Prompt weights: seed (cat:0.25 dog:0.75; default), a1111 ((cat:1.2)) or none.",
        column="`seed`, `a1111` or `none`: how both prompts are read",
        is_always_recorded=True,
        encodes_prompt=True,
    )
    long_prompts: bool = setting(
        Flag(),
        False,
        help="Encode prompts beyond the model's token limit in chunks instead of truncating them.",
        encodes_prompt=True,
    )
    clip_skip: int = setting(
        Integer(1, 12, model_bounds=(("maximum", "text_layers"),)),
        1,
        help="Layer of the text encoder that encodes the prompts, counted from the end: 1 (default) is the last.",
        column="layer of the text encoder that encodes both prompts, from the end as in the web UI: 1, the last, to 12",
        aliases=("clip_stop_at_last_layers",),
        webui_label="Clip skip",
        encodes_prompt=True,
    )
    width: int = setting(
        SIDE_PX,
        help="In pixels; the model's native size if not given.",
        model_default="native_px",
        column="pixels, as `height`",
        aliases=("W",),
        flags=("--width", "--W"),
        line_option="W",
        is_always_recorded=True,
        is_shared_in_batch=True,
    )
    height: int = setting(
        SIDE_PX,
        help="In pixels; the model's native size if not given.",
        model_default="native_px",
        column=f"pixels; a multiple of the model's step (16 for the embedded model, 64 for SD v1), at most "
        f"{MAX_SIDE_PX}",
        aliases=("H",),
        flags=("--height", "--H"),
        line_option="H",
        is_always_recorded=True,
        is_shared_in_batch=True,
    )
    steps: int = setting(
        Integer(1, MAX_STEPS),
        help=f"Sampling steps, 1 to {MAX_STEPS}; the model's default if not given.",
        model_default="steps",
        column=f"sampling steps, 1 to {MAX_STEPS}",
        aliases=("num_inference_steps", "ddim_steps", "step"),
        flags=("--steps", "--ddim_steps", "--num-inference-steps"),
        line_option="s",
        python_name="num_inference_steps",
        is_always_recorded=True,
        is_shared_in_batch=True,
    )
    sampler: str = setting(
        SamplerName(),
        "plms",
        help=f"plms (default), {', '.join(SAMPLERS[1:-1])} or {SAMPLERS[-1]}.",
        column=f"{', '.join(f'`{name}`' for name in SAMPLERS[:-1])} or `{SAMPLERS[-1]}`",
        aliases=("sampler_name",),
        line_option="A",
        is_always_recorded=True,
        is_shared_in_batch=True,
    )
    scale: float = setting(
        Number(0, 100),
        help="Guidance scale; 1 disables guidance; the model's default if not given.",
        model_default="scale",
        column="guidance scale, 0 to 100; 1 switches guidance off",
        aliases=("cfg_scale", "guidance_scale", "cfg"),
        flags=("--scale", "--guidance-scale", "--cfg-scale"),
        line_option="C",
        python_name="guidance_scale",
        is_always_recorded=True,
    )
    eta: float = setting(
        Number(0, 1),
        0.0,
        help="Noise added per step in ddim and plms, 0 (default) to 1.",
        column="fresh noise in ddim and plms, 0 to 1; other samplers ignore it, and the results then say 0",
        aliases=("ddim_eta",),
        flags=("--eta", "--ddim_eta"),
        webui_label="Eta",
        is_always_recorded=True,
        is_shared_in_batch=True,
    )
    rng: str = setting(
        Choice(("cpu", "cuda")),
        "cpu",
        help="cpu (default), or cuda: the noise of a CUDA GPU for a seed.",
        is_always_recorded=True,
    )

    @property
    def is_guided(self) -> bool:
        """Whether the UNet also predicts the noise for the negative prompt."""
        return self.scale != 1

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Images with equal keys can be in one micro-batch."""
        return compute_batch_key(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ImageSettings):
    """All settings of a job, complete: what the user does not give has the model's default or the program's."""

    n_iter: int = setting(
        Integer(1, MAX_IMAGES_PER_ROW),
        1,
        help="Batches per prompt (default 1).",
        effect=Effect.IMAGES,
        column="number of batches for the row",
        flags=("--n_iter", "--n-iter", "--batch-count"),
        line_option="n",
    )
    n_samples: int = setting(
        Integer(1, MAX_IMAGES_PER_BATCH),
        1,
        help="Images per batch (default 1).",
        effect=Effect.IMAGES,
        column="images per batch; a row generates `n_iter` times `n_samples` images",
        aliases=("num_images_per_prompt", "num_images", "batch_size"),
        flags=("--n_samples", "--n-samples", "--batch-size"),
        python_name="num_images_per_prompt",
    )
    seed: int | None = setting(
        Seed(),
        help="Seed of the first image; random (printed and stored) if not given.",
        column="of the row's first image, the next ones count up; empty: the job's seed + the image's index - 1",
        line_option="S",
    )
    fixed_code: bool = setting(
        Flag(), False, help="Start all images from the same noise.", flags=("--fixed_code", "--fixed-code")
    )
    model: str = setting(
        Text(),
        EMBEDDED_MODEL,
        help="Model folder; `embedded` (default) is the small model shipped with tinysd-batch.",
        flags=("--model", "--ckpt"),
    )
    format: str = setting(
        Choice(("png", "jpg", "webp")), "png", help="png (default), jpg or webp.", effect=Effect.FILES
    )
    quality: int = setting(
        Integer(1, 100), 90, help="Quality of jpg and webp, 1 to 100 (default 90).", effect=Effect.FILES
    )
    no_metadata: bool = setting(
        Flag(), False, help="Do not store prompt, seed and settings in the images.", effect=Effect.FILES
    )
    skip_save: bool = setting(
        Flag(),
        False,
        help="Generate without writing images (a speed test).",
        effect=Effect.FILES,
        flags=("--skip_save", "--skip-save"),
    )

    skip_grid: bool = setting(
        Flag(),
        False,
        help="Do not write a grid (contact sheet) of the images.",
        effect=Effect.RUN,
        panel=Panel.JOB,
        flags=("--skip_grid", "--skip-grid"),
    )
    n_rows: int = setting(
        Integer(0, MAX_GRID_IMAGES),
        0,
        help="Rows of the grid (default: chosen automatically).",
        effect=Effect.RUN,
        panel=Panel.JOB,
        flags=("--n_rows", "--n-rows"),
    )
    max_batch: int | None = setting(
        Integer(1, MAX_IMAGES_PER_BATCH),
        help="Combine up to this many images of neighbouring rows in a batch (default: no combining).",
        effect=Effect.RUN,
        panel=Panel.JOB,
    )
    strict: bool = setting(
        Flag(),
        False,
        help="Reject manifests with unknown columns.",
        effect=Effect.ROWS,
        panel=Panel.JOB,
        is_for_jobs_only=True,
    )
    interpret_lines: bool = setting(
        Flag(),
        False,
        help="In a .txt, skip lines that begin with # and read options after a prompt (-n4 -S7, --steps 20).",
        effect=Effect.ROWS,
        panel=Panel.JOB,
    )

    precision: str = setting(
        Choice(("auto", "full", "autocast")),
        "auto",
        help="full (float32), autocast (float16 on GPUs) or auto (default).",
        panel=Panel.MACHINE,
        is_always_recorded=True,
    )
    device: str = setting(
        Choice(("auto", "cpu", "cuda")),
        "auto",
        help="cpu, cuda or auto (default).",
        effect=Effect.RUN,
        panel=Panel.MACHINE,
    )
    vram_budget: MemoryBudget | None = setting(
        DeviceMemory(),
        help="Limit of device memory: 900MB, 0.5 (a fraction) or -500MB (all but 500 MB).",
        effect=Effect.RUN,
        panel=Panel.MACHINE,
    )
    turbo: bool = setting(
        Flag(),
        False,
        help="Keep the UNet's weights dequantized: faster, but needs more memory.",
        effect=Effect.RUN,
        panel=Panel.MACHINE,
    )
    unet_bs: int | None = setting(
        Integer(1, 2 * MAX_IMAGES_PER_BATCH),
        help="Rows per UNet call; an image with guidance has two (default: all rows).",
        effect=Effect.RUN,
        panel=Panel.MACHINE,
        flags=("--unet_bs", "--unet-bs"),
    )
    workers: int | None = setting(
        Integer(1, 1024),
        help="Number of workers; if not given, one per GPU, or a few on the CPU.",
        effect=Effect.RUN,
        panel=Panel.MACHINE,
        is_for_jobs_only=True,
    )
    inline: bool = setting(
        Flag(),
        False,
        help="Use one worker in this process, without Ray.",
        effect=Effect.RUN,
        panel=Panel.MACHINE,
        flags=("--inline/--no-inline",),
        is_for_jobs_only=True,
    )
    address: str | None = setting(
        ClusterAddress(),
        help="The Ray cluster to use, as `ray start` printed it; auto for the one this machine belongs to; local for "
        "this machine only (default).",
        effect=Effect.RUN,
        panel=Panel.MACHINE,
        metavar="HOST:PORT",
        is_for_jobs_only=True,
    )
    worker_wait: float = setting(
        Number(0, 10**9),
        600.0,
        help="How long to wait for a GPU when the cluster has none left (default 600).",
        effect=Effect.RUN,
        panel=Panel.MACHINE,
        metavar="SECONDS",
        is_for_jobs_only=True,
    )

    # tiny-stable-diffusion's options: latent channels and downsampling factor. The model decides them.
    C: int | None = setting(
        Integer(1, 1024, model_bounds=(("minimum", "latent_channels"), ("maximum", "latent_channels"))),
        help="Latent channels; must be the model's own number.",
        effect=Effect.RUN,
        flags=("--C",),
    )
    f: int | None = setting(
        Integer(1, 1024, model_bounds=(("minimum", "vae_scale_factor"), ("maximum", "vae_scale_factor"))),
        help="Pixels per latent; must be the model's own number.",
        effect=Effect.RUN,
        flags=("--f",),
    )

    def image_settings(self) -> ImageSettings:
        """Return the settings of an image whose row has none of its own."""
        return override(ImageSettings(**{name: getattr(self, name) for name in IMAGE_SETTINGS}), ())

    def to_json(self) -> dict[str, Any]:
        return {name: each.to_json(self) for name, each in SETTINGS.items()}


def list_settings(settings_type: type) -> dict[str, Setting]:
    """Return the declarations of a class by name."""
    return {
        field.name: replace(field.metadata["setting"], name=field.name) for field in dataclasses.fields(settings_type)
    }


SETTINGS: Mapping[str, Setting] = list_settings(Settings)
IMAGE_SETTINGS: Mapping[str, Setting] = list_settings(ImageSettings)
COLUMN_SETTINGS: Mapping[str, Setting] = {name: each for name, each in SETTINGS.items() if each.is_column}
SHARED_IN_BATCH = tuple(name for name, each in IMAGE_SETTINGS.items() if each.is_shared_in_batch)


@lru_cache(1024)
def compute_batch_key(settings: ImageSettings) -> tuple[Any, ...]:
    return (*(getattr(settings, name) for name in SHARED_IN_BATCH), settings.is_guided)


@lru_cache(1024, typed=True)
def override(settings: ImageSettings, own: tuple[tuple[str, Any], ...]) -> ImageSettings:
    """Return the settings with the values that an image has of its own, as (name, value).

    Most rows of a manifest have the same values, and share one object.
    """
    overridden = replace(settings, **dict(own))
    return replace(overridden, eta=0.0) if overridden.sampler not in SAMPLERS_WITH_ETA else overridden
