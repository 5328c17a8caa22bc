"""Convert tiny-stable-diffusion's file (`convert full_int2_sd.pth OUT`), and generate with the result."""

import functools
import io
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.models import ldm_checkpoint, tiny_stable_diffusion
from tests.support.program import run_here
from tests.support.settings import make_image_settings
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.quantize.convert import convert_model
from tinysd_batch.quantize.data_free import quantize_model
from tinysd_batch.quantize.evaluate.inspect import inspect_model
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions
from tinysd_batch.records import ImageRequest

PICKLES = SourceOptions(allow_pickle=True)


@functools.cache
def random_models() -> ldm_checkpoint.Models:
    return ldm_checkpoint.random_models(
        ldm_checkpoint.Sizes(unet=32, vae=32, text=tiny_stable_diffusion.CONTEXT, text_layers=2)
    )


def checkpoint() -> dict[str, Tensor]:
    other_components = {
        name: value for name, value in random_models().ldm_tensors().items() if not name.startswith(ldm_checkpoint.UNET)
    }
    return {**tiny_stable_diffusion.unet_checkpoint(), **other_components, "global_step": torch.tensor(470_000)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "full_int2_sd.pth"
    torch.save(checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    convert_model(file, file.parent / "converted", PICKLES, None, lambda _: None)
    return file.parent / "converted"


def test_it_generates_what_the_dequantized_model_generates(folder: Path) -> None:
    model = TinySD.from_pretrained(folder, device="cpu")
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64, 128, 128),
        cross_attention_dim=tiny_stable_diffusion.CONTEXT,
        attention_head_dim=8,
    )
    floats = tiny_stable_diffusion.dequantized(tiny_stable_diffusion.unet_checkpoint())
    unet.load_state_dict(convert_ldm_unet_checkpoint(floats, dict(unet.config)))
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    (condition,) = model.prompt_encoder.encode(
        [ImageRequest("a lake", 0, make_image_settings(negative_prompt="a boat"))]
    )
    assert condition.negative_embedding is not None
    context = torch.stack([condition.negative_embedding, condition.embedding])
    latents_after_steps: list[Tensor] = []
    model.generate(
        None,
        1,
        prompt_embeds=context[1:],
        negative_prompt_embeds=context[:1],
        latents=start[:1],
        height=64,
        width=64,
        num_inference_steps=1,
        sampler="ddim",
        guidance_scale=7.5,
        output_type="latent",
        callback=lambda _, time, latents: latents_after_steps.append(latents),
    )
    with torch.no_grad():
        rows = unet.eval()(start[:1].repeat(2, 1, 1, 1), 1, context).sample
    noise = rows[0] + 7.5 * (rows[1] - rows[0])
    alpha = 1 - 0.00085
    clean = (start[:1] - (1 - model_alpha()) ** 0.5 * noise) / model_alpha() ** 0.5
    expected = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    torch.testing.assert_close(latents_after_steps[0], expected, rtol=1e-3, atol=1e-3)


def model_alpha() -> float:
    """Return alphas_cumprod at timestep 1 of SD v1's schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return float((1 - betas[0]) * (1 - betas[1]))


def test_the_vae_is_unchanged(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    for name, value in random_models().vae.state_dict().items():
        assert torch.equal(vae[name], value), name


def test_text_states_and_decoded_latents_equal_those_of_the_source(folder: Path) -> None:
    model = TinySD.from_pretrained(folder, device="cpu")
    settings = make_image_settings(prompt_syntax="none", scale=1.0)
    (condition,) = model.prompt_encoder.encode([ImageRequest("a lake at dawn", 0, settings)])
    prompt = "a lake at dawn"
    ids = model.prompt_encoder.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text = random_models().text_encoder.eval()(ids).last_hidden_state[0]
        pixels = random_models().vae.eval().decode(latents / 0.18215).sample
    torch.testing.assert_close(condition.embedding, text, rtol=1e-3, atol=1e-3)
    expected = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.decode_pixels(latents), expected, rtol=1e-3, atol=1e-3)


def test_its_layers_keep_their_bits(folder: Path) -> None:
    layers = read_json_object(folder / "unet" / "config.json")["quantization_config"]["layers"]
    assert [sum(layer["bits"] == bits for layer in layers.values()) for bits in (2, 8)] == [261, 4]
    assert {layer["kind"] for layer in layers.values()} == {"row"}
    assert inspect_model(folder)


def test_convert_then_submit(file: Path, tmp_path: Path) -> None:
    result = run_here("convert", file, "mine", cwd=tmp_path)
    assert result.returncode == 2
    assert "--allow-pickle" in result.stderr
    assert list(tmp_path.iterdir()) == []
    result = run_here("convert", file, "mine", "--allow-pickle", "--dtype", "fp16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    write_csv(tmp_path / "m.csv", [{"prompt": "a lake", "height": 64, "width": 64, "steps": 2}])
    result = run_here("submit", "m.csv", "--model", "mine", "--inline", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    check_whole(tmp_path / "outputs" / "m", 1)
    result = run_here("inspect", "mine", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_quantize_refuses_it(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the UNet is at 2 bits already"):
        quantize_model(file, tmp_path / "out", PICKLES, lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("first_stage_model.decoder.conv_in.weight", "missing", marks=pytest.mark.slow),
        pytest.param(f"{ldm_checkpoint.CLIP}final_layer_norm.weight", "missing", marks=pytest.mark.slow),
        (f"{tiny_stable_diffusion.PREFIX}out.2.bias", "missing"),
    ],
)
def test_a_missing_tensor_is_named_and_nothing_is_left(tmp_path: Path, name: str, message: str) -> None:
    torch.save({key: value for key, value in checkpoint().items() if key != name}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=message):
        convert_model(tmp_path / "x.pth", tmp_path / "out", PICKLES, None, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    buffer = io.BytesIO()
    pickle.dump({f"{tiny_stable_diffusion.PREFIX}time_embed.0.weight_quantizer.delta": Evil()}, buffer)
    (tmp_path / "x.pth").write_bytes(buffer.getvalue())
    with pytest.raises(ModelError):
        convert_model(tmp_path / "x.pth", tmp_path / "out", PICKLES, None, lambda _: None)
    assert not (tmp_path / "ran").exists()
