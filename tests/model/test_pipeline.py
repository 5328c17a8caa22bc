from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tinysd_batch import TinySD
from tinysd_batch.config import SAMPLERS
from tinysd_batch.errors import ModelError, NotFiniteError, UsageError
from tinysd_batch.model.info import read_json


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TinySD:
    return TinySD.from_pretrained(tiny_model, device="cpu")


def latents(model: TinySD, prompt: object, seed: object, **options: object) -> torch.Tensor:
    images = model.generate(prompt, seed, output_type="latent", **options).images  # type: ignore[arg-type]
    assert isinstance(images, torch.Tensor)
    return images


@pytest.mark.parametrize("sampler", ["plms", "ddim", "euler", "heun", "dpmpp_2m", "unipc"])
def test_same_picture_as_diffusers_own_pipeline(float_model: Path, sampler: str) -> None:
    config = CLIPTextConfig(**read_json(float_model / "text_encoder" / "config.json"))
    text = CLIPTextModel(config)
    text.load_state_dict(load_file(float_model / "text_encoder" / "model.safetensors"))
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    schedulers = {
        "plms": PNDMScheduler(skip_prk_steps=True, **schedule),
        "ddim": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **schedule),
        "euler": EulerDiscreteScheduler(timestep_spacing="linspace", **schedule),
        "heun": HeunDiscreteScheduler(**schedule),
        "dpmpp_2m": DPMSolverMultistepScheduler(**schedule),
        "unipc": UniPCMultistepScheduler(**schedule),
    }
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(float_model / "vae"),
        text_encoder=text.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(float_model / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(float_model / "unet"),
        scheduler=schedulers[sampler],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        "red apple", negative_prompt="worm", num_inference_steps=5, guidance_scale=4.0, height=16, width=16,
        latents=start, output_type="latent",
    ).images  # fmt: skip
    ours = latents(
        TinySD.from_pretrained(float_model), "red apple", 5, negative_prompt="worm", num_inference_steps=5,
        guidance_scale=4.0, sampler=sampler,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.5), ("plms", 0.5)])
def test_a_seed_gives_the_same_picture_in_any_batch(model: TinySD, sampler: str, eta: float) -> None:
    options = {"sampler": sampler, "eta": eta, "num_inference_steps": 5}
    together = latents(model, ["cat", "dog", "red apple"], [3, 4, 5], guidance_scale=[2.0, 3.0, 4.0], **options)
    for number, (prompt, seed, scale) in enumerate([("cat", 3, 2.0), ("dog", 4, 3.0), ("red apple", 5, 4.0)]):
        alone = latents(model, prompt, seed, guidance_scale=scale, **options)
        torch.testing.assert_close(together[number], alone[0], rtol=1e-4, atol=1e-4)


def test_seeds_prompts_and_scales_matter(model: TinySD) -> None:
    start = latents(model, "cat", 1)
    for other in (latents(model, "cat", 2), latents(model, "dog", 1), latents(model, "cat", 1, guidance_scale=9.0)):
        assert not torch.allclose(start, other, atol=1e-3)


def test_scale_one_needs_no_negative_prompt(model: TinySD) -> None:
    batches: set[int] = set()
    hook = model.unet.conv_in.register_forward_pre_hook(lambda _, arguments: batches.add(arguments[0].shape[0]))
    latents(model, "cat", 1, guidance_scale=1.0, negative_prompt="dog")
    assert batches == {1}
    latents(model, "cat", 1, guidance_scale=2.0)
    hook.remove()
    assert batches == {1, 2}


def test_fragments_taking_turns_change_no_bit(tiny_model: Path, model: TinySD) -> None:
    largest = max(fragment.nbytes for fragment in model.fragments)
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=largest)
    assert torch.equal(latents(tight, "cat", 1), latents(model, "cat", 1))
    assert tight.residency.one_at_a_time
    assert not model.residency.one_at_a_time


def test_nothing_stays_on_the_device_and_only_one_fragment_at_a_time(tiny_model: Path, model: TinySD) -> None:
    largest = max(fragment.nbytes for fragment in model.fragments)
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=largest)
    seen: set[int] = set()
    for module in (tight.text_encoder, tight.unet.conv_in, tight.unet.conv_out, tight.vae.decoder):
        module.register_forward_pre_hook(lambda *_: seen.add(sum(part.is_onloaded for part in tight.fragments)))
    tight.generate("cat", 1)
    assert seen == {1}
    assert not any(part.is_onloaded for part in tight.fragments)


def test_a_fragment_that_is_away_cannot_compute(model: TinySD) -> None:
    for layer, x in ((model.unet.conv_in, torch.zeros(1, 4, 8, 8)), (model.unet.conv_out, torch.zeros(1, 32, 8, 8))):
        with pytest.raises(RuntimeError):
            layer(x)


def test_a_budget_below_the_largest_fragment_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="alone takes"):
        TinySD.from_pretrained(tiny_model, vram_budget="1kB")


def test_pictures_arrays_and_latents(model: TinySD) -> None:
    generated = model.generate("cat", [1, 2])
    assert [image.size for image in generated.images] == [(16, 16)] * 2
    array = model.generate("cat", [1, 2], output_type="np").images
    assert array.shape == (2, 16, 16, 3)
    assert array.dtype == np.float32
    assert np.array_equal(np.asarray(generated.images[1]), (array[1] * 255).round().astype(np.uint8))
    assert latents(model, "cat", 1, height=32, width=16).shape == (1, 4, 16, 8)


def test_embeddings_in_place_of_a_prompt(model: TinySD) -> None:
    conditions = model.encode(["cat"], ["dog"], [2.0], None, None)
    given = latents(model, None, 1, prompt_embeds=conditions.text, negative_prompt_embeds=conditions.negative)
    assert torch.equal(given, latents(model, "cat", 1, negative_prompt="dog"))


def test_weights_average_the_embeddings(model: TinySD) -> None:
    mixed, cat, dog = (model.encode([p], [""], [1.0], None, None).text for p in ("cat:1 dog:3", "cat", "dog"))
    torch.testing.assert_close(mixed, 0.25 * cat + 0.75 * dog)


def test_tokens_are_counted_and_the_cut_tail_is_told(model: TinySD) -> None:
    generated = model.generate(["red apple", " ".join(["apple"] * 24)], 1)
    assert generated.n_tokens == [2, 24]
    assert generated.truncated == [None, "apple apple"]


def test_the_callback_sees_every_step(model: TinySD) -> None:
    steps: list[int] = []
    model.generate("cat", 1, sampler="ddim", num_inference_steps=4, callback=lambda step, *_: steps.append(step))
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 18}, "height = 18: must be a positive multiple of 4"),
        ({"sampler": "karras"}, "no such sampler"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 given for a batch of 1"),
    ],
)
def test_arguments_that_do_not_fit(model: TinySD, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.generate("cat", 1, **options)  # type: ignore[arg-type]


def test_a_picture_that_is_not_finite_is_no_picture(model: TinySD) -> None:
    with pytest.raises(NotFiniteError):
        model.generate("cat", 1, latents=torch.full((1, 4, 8, 8), float("nan")))
