import shutil
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
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.support.settings import make_image_settings
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError, NotFiniteError, UsageError
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.records import ImageRequest
from tinysd_batch.settings.sampler_names import SAMPLERS


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TinySD:
    return TinySD.from_pretrained(tiny_model, device="cpu")


def embedding(model: TinySD, prompt: str, syntax: str = "seed", *, long_prompts: bool = False) -> torch.Tensor:
    settings = make_image_settings(prompt_syntax=syntax, long_prompts=long_prompts, scale=1.0)
    (conditioning,) = model.prompt_encoder.encode([ImageRequest(prompt, 0, settings)])
    return conditioning.embedding


def latents(model: TinySD, prompt: object, seed: object, **options: object) -> torch.Tensor:
    images = model.generate(prompt, seed, output_type="latent", **options).images  # type: ignore[arg-type]
    assert isinstance(images, torch.Tensor)
    return images


@pytest.mark.parametrize("sampler", ["plms", "ddim", "euler", "heun", "dpmpp_2m", "unipc"])
def test_images_are_those_of_diffusers_pipeline(float_model: Path, sampler: str) -> None:
    config = CLIPTextConfig(**read_json_object(float_model / "text_encoder" / "config.json"))
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
def test_a_seed_gives_the_same_image_in_any_batch(model: TinySD, sampler: str, eta: float) -> None:
    options = {"sampler": sampler, "eta": eta, "num_inference_steps": 5}
    together = latents(model, ["cat", "dog", "red apple"], [3, 4, 5], guidance_scale=[2.0, 3.0, 4.0], **options)
    for number, (prompt, seed, scale) in enumerate([("cat", 3, 2.0), ("dog", 4, 3.0), ("red apple", 5, 4.0)]):
        alone = latents(model, prompt, seed, guidance_scale=scale, **options)
        torch.testing.assert_close(together[number], alone[0], rtol=1e-4, atol=1e-4)


def test_seeds_prompts_and_scales_matter(model: TinySD) -> None:
    first = latents(model, "cat", 1)
    for other in (latents(model, "cat", 2), latents(model, "dog", 1), latents(model, "cat", 1, guidance_scale=9.0)):
        assert not torch.allclose(first, other, atol=1e-3)


def test_scale_one_needs_no_negative_prompt(model: TinySD) -> None:
    batches: set[int] = set()
    hook = model.unet.conv_in.register_forward_pre_hook(lambda _, arguments: batches.add(arguments[0].shape[0]))
    latents(model, "cat", 1, guidance_scale=1.0, negative_prompt="dog")
    assert batches == {1}
    latents(model, "cat", 1, guidance_scale=2.0)
    hook.remove()
    assert batches == {1, 2}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scale_one_works_with_every_sampler_and_weights(model: TinySD, sampler: str) -> None:
    alone = latents(model, "cat:1 dog:2", 1, guidance_scale=1.0, sampler=sampler, num_inference_steps=3)
    mixed = latents(model, "cat:1 dog:2", [1, 2], guidance_scale=[1.0, 3.0], sampler=sampler, num_inference_steps=3)
    torch.testing.assert_close(alone[0], mixed[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-3)


def test_in_memory_the_unet_is_about_as_large_as_on_disk(tiny_model: Path, model: TinySD) -> None:
    on_disk = (tiny_model / "unet" / WEIGHTS_FILE).stat().st_size
    in_memory = model.encode_fragment.nbytes + model.decode_fragment.nbytes
    floats = 4 * sum(value.numel() for value in load_file(tiny_model.parent / "float" / "unet" / WEIGHTS_FILE).values())
    assert in_memory < 1.5 * on_disk
    assert in_memory < floats / 4


def test_output_types(model: TinySD) -> None:
    generated = model.generate("cat", [1, 2])
    assert [image.size for image in generated.images] == [(16, 16)] * 2
    array = model.generate("cat", [1, 2], output_type="np").images
    assert array.shape == (2, 16, 16, 3)
    assert array.dtype == np.float32
    assert np.array_equal(np.asarray(generated.images[1]), (array[1] * 255).round().astype(np.uint8))
    assert latents(model, "cat", 1, height=32, width=16).shape == (1, 4, 16, 8)


def test_embeddings_instead_of_a_prompt(model: TinySD) -> None:
    (conditioning,) = model.prompt_encoder.encode([ImageRequest("cat", 0, make_image_settings(negative_prompt="dog"))])
    assert conditioning.negative_embedding is not None
    from_embeddings = latents(
        model,
        None,
        1,
        prompt_embeds=conditioning.embedding[None],
        negative_prompt_embeds=conditioning.negative_embedding[None],
    )
    assert torch.equal(from_embeddings, latents(model, "cat", 1, negative_prompt="dog"))


def test_weights_average_the_embeddings(model: TinySD) -> None:
    mixed, cat, dog = (embedding(model, prompt) for prompt in ("cat:1 dog:3", "cat", "dog"))
    torch.testing.assert_close(mixed, 0.25 * cat + 0.75 * dog)


def test_tokens_are_counted_and_truncated_text_is_reported(model: TinySD) -> None:
    generated = model.generate(["red apple", " ".join(["apple"] * 24)], 1)
    assert generated.n_tokens == [2, 24]
    assert generated.truncated == [None, "apple apple"]


def test_emphasis_changes_a_word_and_keeps_the_mean(model: TinySD) -> None:
    plain, emphasized = embedding(model, "red apple"), embedding(model, "red (apple:1.5)", "a1111")
    assert not torch.allclose(plain, emphasized, atol=1e-3)
    torch.testing.assert_close(plain.mean(), emphasized.mean())
    torch.testing.assert_close(plain, embedding(model, "red (apple:1.0)", "a1111"))


LONG = " ".join(["apple"] * 30 + ["frog"])


def test_long_prompts_are_not_truncated(model: TinySD) -> None:
    tokens = model.info.max_tokens
    assert embedding(model, LONG).shape[0] == tokens
    assert embedding(model, LONG, long_prompts=True).shape[0] == 2 * tokens
    truncated, complete = latents(model, LONG, 1), latents(model, LONG, 1, long_prompts=True)
    assert not torch.allclose(truncated, complete, atol=1e-3)
    assert torch.equal(latents(model, "cat", 1), latents(model, "cat", 1, long_prompts=True))


def test_a_long_prompt_does_not_change_others_in_its_batch(model: TinySD) -> None:
    options = {"long_prompts": True, "negative_prompt": ["dog", "dog", LONG], "guidance_scale": [2.0, 2.0, 1.0]}
    together = latents(model, ["cat", LONG, "owl"], [1, 2, 3], **options)
    alone = [
        latents(model, "cat", 1, negative_prompt="dog"),
        latents(model, LONG, 2, negative_prompt="dog", long_prompts=True),
        latents(model, "owl", 3, guidance_scale=1.0),
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_each_prompt_is_encoded_once(model: TinySD) -> None:
    calls: list[int] = []
    model.prompt_encoder.cache.clear()
    hook = model.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generate(["cat", "cat", "dog", "cat"], [1, 2, 3, 4], negative_prompt=["", "owl", "dog", ""])
    model.generate("dog", 5)
    hook.remove()
    assert len(calls) == 4  # cat, dog, owl and the empty prompt


def test_starting_noise_from_another_seed(model: TinySD) -> None:
    options = {"sampler": "euler_a", "num_inference_steps": 4}
    from_seeds = latents(model, "cat", [1, 2], **options)
    from_noise_seed = latents(model, "cat", [1, 2], noise_seed=1, **options)
    assert torch.equal(from_seeds[0], from_noise_seed[0])
    assert not torch.allclose(from_noise_seed[0], from_noise_seed[1], atol=1e-3)  # later noise is from each seed
    deterministic = latents(model, "cat", [1, 2], noise_seed=1, sampler="ddim")
    torch.testing.assert_close(deterministic[0], deterministic[1])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 100])
def test_unet_bs_changes_no_image(tiny_model: Path, model: TinySD, rows: int) -> None:
    narrow = TinySD.from_pretrained(tiny_model, device="cpu", unet_bs=rows)
    sizes: set[int] = set()
    narrow.unet.conv_in.register_forward_pre_hook(lambda _, arguments: sizes.add(arguments[0].shape[0]))
    prompts, seeds = ["cat", "dog"], [1, 2]
    torch.testing.assert_close(latents(narrow, prompts, seeds), latents(model, prompts, seeds), rtol=1e-4, atol=1e-4)
    assert max(sizes) == min(rows, 4)


def test_turbo_dequantizes_once_and_changes_no_bit(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinysd_batch.model import pipeline
    from tinysd_batch.model.packed import dequantize
    from tinysd_batch.model.packed import layers as packed

    monkeypatch.setattr(pipeline, "KEEP_DEQUANTIZED_BYTES", 0)
    counts: list[int] = []
    original = dequantize.dequantize
    results = []
    for turbo in (False, True):
        turbo_or_not = TinySD.from_pretrained(tiny_model, device="cpu", turbo=turbo)
        calls: list[int] = []
        monkeypatch.setattr(packed, "dequantize", lambda *args, calls=calls: (calls.append(1), original(*args))[1])
        results.append(latents(turbo_or_not, "cat", 1, num_inference_steps=3))
        counts.append(len(calls))
    assert torch.equal(*results)
    layers = sum(isinstance(layer, packed.PackedLayer) for layer in turbo_or_not.unet.modules())
    assert counts[0] - counts[1] == 3 * layers > 0


def test_turbo_needs_memory(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"takes at least .*leave turbo out"):
        TinySD.from_pretrained(tiny_model, device="cpu", turbo=True, vram_budget="600kB")


def test_the_callback_is_called_after_every_step(model: TinySD) -> None:
    steps: list[int] = []
    model.generate("cat", 1, sampler="ddim", num_inference_steps=4, callback=lambda step, *_: steps.append(step))
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 18}, "height = 18: must be a multiple of 4 with this model"),
        ({"sampler": "karras"}, "no such sampler"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 given for a batch of 1"),
        ({"prompt_syntax": "compel"}, "prompt_syntax = 'compel'"),
        ({"negative_prompt": "a:0 b:0"}, "weights sum to 0"),
        ({"prompt_embeds": torch.zeros(1, 24, 32), "negative_prompt_embeds": torch.zeros(1, 48, 32)}, "differ"),
    ],
)
def test_invalid_arguments_are_refused(model: TinySD, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.generate("cat", 1, **options)  # type: ignore[arg-type]


def test_images_that_are_not_finite_are_errors(model: TinySD) -> None:
    with pytest.raises(NotFiniteError):
        model.generate("cat", 1, latents=torch.full((1, 4, 8, 8), float("nan")))


def overflowing_model(model_folder: Path, tmp_path: Path, component: str, tensor: str, factor: float) -> TinySD:
    """Return a float16 model; the output of one layer overflows float16 but not float32."""
    shutil.copytree(model_folder, tmp_path / "overflowing")
    path = tmp_path / "overflowing" / component / WEIGHTS_FILE
    tensors = load_file(path)
    tensors[tensor] = tensors[tensor].float() * factor
    save_file(tensors, path)
    return TinySD.from_pretrained(tmp_path / "overflowing", device="cpu", dtype=torch.float16)


def test_rows_that_overflow_float16_are_denoised_in_float32(float_model: Path, tmp_path: Path) -> None:
    model = overflowing_model(float_model, tmp_path, "unet", "mid_block.resnets.0.conv1.weight", 3e5)
    output = model.generate(["cat", "dog"], [1, 2], output_type="latent", num_inference_steps=2)
    assert output.precision == ["float32", "float32"]
    assert output.degraded == [["denoised_in_float32"]] * 2
    assert model.dtype is torch.float16
    full = TinySD.from_pretrained(tmp_path / "overflowing", device="cpu", dtype="full")
    expected = latents(full, ["cat", "dog"], [1, 2], num_inference_steps=2)
    torch.testing.assert_close(output.images, expected, rtol=0.01, atol=0.01)  # the prompts were encoded in float16


def test_images_that_overflow_float16_are_decoded_in_float32(float_model: Path, tmp_path: Path) -> None:
    model = overflowing_model(float_model, tmp_path, "vae", "decoder.mid_block.resnets.0.conv1.weight", 3e5)
    output = model.generate("cat", 1, output_type="np", num_inference_steps=2)
    assert (output.precision, output.degraded) == (["float16"], [["decoded_in_float32"]])
    assert np.isfinite(output.images).all()


def test_float16_is_kept_if_nothing_overflows(float_model: Path) -> None:
    output = TinySD.from_pretrained(float_model, device="cpu", dtype=torch.float16).generate("cat", 1)
    assert (output.precision, output.degraded) == (["float16"], [[]])
