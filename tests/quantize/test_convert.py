"""Convert SD v1 single files to model folders without changing a weight."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from tests.quantize.conftest import Save
from tests.support import ldm_checkpoint, tiny_stable_diffusion
from tests.support.conversion import Tensors, check_same, convert
from tests.support.files import write_json
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE, read_model_info
from tinysd_batch.quantize.data_free import quantize_model
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions


def test_the_names_in_these_tests_are_those_of_tiny_stable_diffusion(tensors: Tensors) -> None:
    named = {
        name.removeprefix(ldm_checkpoint.UNET).rpartition(".")[0]
        for name in tensors
        if name.startswith(ldm_checkpoint.UNET)
    }
    assert named == {layer.name for layer in tiny_stable_diffusion.unet_layers(32, tiny_stable_diffusion.CONTEXT)}
    # SD v1's own file has 686 tensors in the UNet and 248 in the VAE.
    assert [
        sum(name.startswith(prefix) for name in tensors) for prefix in (ldm_checkpoint.UNET, ldm_checkpoint.VAE)
    ] == [686, 248]


def test_a_single_file_becomes_a_folder_that_generates(
    checkpoint: Path, models: ldm_checkpoint.Models, tmp_path: Path, no_network: None
) -> None:
    out = tmp_path / "new" / "model"
    lines = convert(checkpoint, out)
    assert lines[0] == "unet: 686 tensors, 8.5 M weights"
    check_same(out, models)
    info = read_model_info(str(out))
    assert (info.name, info.native_px, info.size_multiple_px, info.max_tokens) == ("mine", 512, 64, 77)
    output = TinySD.from_pretrained(out).generate(
        "a cat", 1, height=64, width=64, num_inference_steps=2, output_type="latent"
    )
    assert output.images.isfinite().all()
    assert output.n_tokens == [2]


def test_diffusers_generates_the_same(floats: Path, no_network: None) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(floats, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    model = TinySD.from_pretrained(floats, device="cpu")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 5,
        "guidance_scale": 5.0,
        "output_type": "latent",
        "latents": noise,
    }
    expected = pipeline("a red apple, 4k", **settings).images
    output = model.generate("a red apple, 4k", 1, **settings).images
    assert torch.allclose(torch.as_tensor(output), expected, atol=1e-4)


def test_the_converted_unet_predicts_the_same_noise(floats: Path, models: ldm_checkpoint.Models) -> None:
    unet = UNet2DConditionModel.from_pretrained(floats / "unet", local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, ldm_checkpoint.TEXT_WIDTH, generator=generator)
    with torch.no_grad():
        converted, expected = (model(noisy, 500, text).sample for model in (unet.eval(), models.unet.eval()))
    assert torch.allclose(converted, expected, atol=1e-5)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.float8_e4m3fn,
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float64, marks=pytest.mark.slow),
    ],
)
def test_stored_dtypes(
    tensors: Tensors, models: ldm_checkpoint.Models, save: Save, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = save({name: value.to(dtype) for name, value in tensors.items()})
    convert(path, tmp_path / "model")
    written = load_file(tmp_path / "model" / "unet" / WEIGHTS_FILE)["conv_in.weight"]
    kept = torch.float32 if dtype == torch.float64 else torch.float16
    assert torch.equal(written, models.unet.state_dict()["conv_in.weight"].to(dtype).to(kept))
    assert written.dtype == kept


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("fp16", torch.float16), pytest.param("fp32", torch.float32, marks=pytest.mark.slow)],
)
def test_the_dtype_can_be_chosen(
    checkpoint: Path, models: ldm_checkpoint.Models, tmp_path: Path, word: str, dtype: torch.dtype
) -> None:
    convert(checkpoint, tmp_path / "model", word)
    check_same(tmp_path / "model", models, dtype)


def test_numbers_too_large_for_float16(tensors: Tensors, save: Save, tmp_path: Path) -> None:
    path = save(tensors | {f"{ldm_checkpoint.UNET}out.2.bias": torch.full((4,), 1e6)})
    with pytest.raises(ModelError, match=r"conv_out\.bias has numbers too large for float16; use --dtype fp32"):
        convert(path, tmp_path / "model", "fp16")
    convert(path, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("old.ckpt", {"epoch": 3, "global_step": 7, "optimizer_states": [{"state": {}}]}),
        pytest.param("old.pth", None, marks=pytest.mark.slow),
    ],
)
def test_pickles(
    tensors: Tensors,
    models: ldm_checkpoint.Models,
    save: Save,
    tmp_path: Path,
    name: str,
    beside: dict[str, Any] | None,
) -> None:
    path = save(tensors, name, beside)
    with pytest.raises(ModelError, match=r"a pickle, which can run code; .* --allow-pickle"):
        convert(path, tmp_path / "model")
    lines = convert(path, tmp_path / "model", allow_pickle=True)
    check_same(tmp_path / "model", models)
    assert lines[3:] == ([] if beside is None else ["left out: 3 training entries"])


def test_ema_copies(tensors: Tensors, models: ldm_checkpoint.Models, save: Save, tmp_path: Path) -> None:
    copies = ldm_checkpoint.ema_copies(tensors, change=1.0)
    path = save(tensors | copies | ldm_checkpoint.schedule_buffers())
    lines = convert(path, tmp_path / "plain")
    assert lines[-1] == "left out: 688 EMA copies, 5 noise schedule tensors"
    check_same(tmp_path / "plain", models)
    assert convert(path, tmp_path / "ema", ema=True)[-1] == "left out: 5 noise schedule tensors"
    converted = load_file(tmp_path / "ema" / "unet" / WEIGHTS_FILE)
    for name, value in models.unet.state_dict().items():
        assert torch.equal(converted[name], value + 1.0), name
    del copies["model_ema.diffusion_modelmiddle_block1norm" + "weight"]
    with pytest.raises(ModelError, match=r"--ema: the EMA copies are incomplete, model_ema.*norm.* is missing"):
        convert(save(tensors | copies), tmp_path / "torn", ema=True)


@pytest.mark.parametrize(
    ("prefix", "positions"),
    [
        ("cond_stage_model.transformer.", None),
        pytest.param("cond_stage_model.transformer.", torch.arange(77)[None].half(), marks=pytest.mark.slow),
        ("cond_stage_model.transformer.text_model.", torch.arange(77)[None]),
    ],
)
def test_names_of_clip_tensors(
    tensors: Tensors, models: ldm_checkpoint.Models, save: Save, tmp_path: Path, prefix: str, positions: Tensor | None
) -> None:
    renamed = {name.replace(ldm_checkpoint.CLIP, prefix): value for name, value in tensors.items()}
    if positions is not None:
        renamed[f"{prefix}embeddings.position_ids"] = positions
    convert(save(renamed), tmp_path / "model")
    check_same(tmp_path / "model", models)


def test_old_vaes_with_matrices_in_attention(
    tensors: Tensors, models: ldm_checkpoint.Models, save: Save, tmp_path: Path
) -> None:
    flat = {
        name: value[:, :, 0, 0] if "attn_1" in name and value.dim() == 4 else value for name, value in tensors.items()
    }
    convert(save({name: value.contiguous() for name, value in flat.items()}), tmp_path / "model")
    check_same(tmp_path / "model", models)


def remove_vae(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith(ldm_checkpoint.VAE)}


def test_a_checkpoint_without_vae_needs_the_option(tensors: Tensors, save: Save, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it contains no VAE; name one with --vae"):
        convert(save(remove_vae(tensors)), tmp_path / "model")


SLOW_VAE_SOURCES = ("prefixed", "diffusers", "folder", "checkpoint")


@pytest.mark.parametrize(
    "vae_source",
    ["ldm", "pickle", "model", *(pytest.param(source, marks=pytest.mark.slow) for source in SLOW_VAE_SOURCES)],
)
def test_a_vae_from_another_file_or_folder(
    tensors: Tensors, models: ldm_checkpoint.Models, checkpoint: Path, save: Save, tmp_path: Path, vae_source: str
) -> None:
    checkpoint_without_vae = save(remove_vae(tensors))
    vae_tensors = {
        name.removeprefix(ldm_checkpoint.VAE): value
        for name, value in tensors.items()
        if name.startswith(ldm_checkpoint.VAE)
    }
    if vae_source in ("folder", "model"):
        vae = tmp_path / "other"
        models.vae.save_pretrained(vae / "vae" if vae_source == "model" else vae)
    elif vae_source == "checkpoint":
        vae = checkpoint
    elif vae_source == "prefixed":
        vae = save({ldm_checkpoint.VAE + name: value for name, value in vae_tensors.items()}, "vae.safetensors")
    elif vae_source == "diffusers":
        vae = save({name: value.contiguous() for name, value in models.vae.state_dict().items()}, "vae.safetensors")
    else:
        beside = {"epoch": 1}
        vae = save(vae_tensors, "vae.ckpt", beside) if vae_source == "pickle" else save(vae_tensors, "vae.safetensors")
    convert(checkpoint_without_vae, tmp_path / "model", vae=vae, allow_pickle=vae_source == "pickle")
    check_same(tmp_path / "model", models)


def test_components_that_do_not_fit(
    tensors: Tensors, models: ldm_checkpoint.Models, save: Save, tmp_path: Path
) -> None:
    text = ldm_checkpoint.new_text_encoder(replace(ldm_checkpoint.SMALL, text=64)).state_dict()
    other = {ldm_checkpoint.CLIP + name: value for name, value in text.items()}
    with pytest.raises(ModelError, match=r"hidden_size is 64, the UNet's cross_attention_dim 32"):
        convert(save(tensors | other), tmp_path / "model")
    models.vae.save_pretrained(tmp_path / "xl")
    config = tmp_path / "xl" / "config.json"
    write_json(config, {**json.loads(config.read_text()), "scaling_factor": 0.13025})
    with pytest.raises(ModelError, match=r"scaling_factor is 0\.13025; that of SD v1's VAE is 0\.18215"):
        convert(save(tensors), tmp_path / "model", vae=tmp_path / "xl")


def replace_tensor(tensors: Tensors, name: str, value: Tensor | None) -> Tensors:
    return {key: tensor for key, tensor in {**tensors, name: value}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{ldm_checkpoint.UNET}out.2.bias", None, r"1 tensors are missing, the first is conv_out\.bias"),
        pytest.param(
            f"{ldm_checkpoint.UNET}input_blocks.0.0.weight",
            None,
            r"tensor conv_in\.weight is missing",
            marks=pytest.mark.slow,
        ),
        (
            f"{ldm_checkpoint.UNET}input_blocks.3.0.op.bias",
            None,
            r"down_blocks\.0\.downsamplers\.0\.conv\.bias is missing",
        ),
        pytest.param(
            f"{ldm_checkpoint.UNET}output_blocks.2.1.conv.bias",
            None,
            r"output_blocks\.2\.1\.conv\.bias is missing",
            marks=pytest.mark.slow,
        ),
        (
            f"{ldm_checkpoint.UNET}middle_block.1.norm.bias",
            torch.zeros(3),
            r"norm\.bias has shape \[3\], \[128\] was expected",
        ),
        (f"{ldm_checkpoint.UNET}out.2.bias", torch.full((4,), torch.nan), r"conv_out\.bias is not finite"),
        (
            f"{ldm_checkpoint.UNET}out.2.bias",
            torch.zeros(4, dtype=torch.int32),
            r"conv_out\.bias is torch\.int32; floats",
        ),
        (
            f"{ldm_checkpoint.UNET}stray.weight",
            torch.ones(1),
            r"1 unexpected tensors, the first is model\.diffusion_model\.stray",
        ),
        ("stray", torch.ones(1), r"1 unexpected names, the first is 'stray'"),
        (f"{ldm_checkpoint.VAE}decoder.conv_out.bias", None, r"the first is decoder\.conv_out\.bias"),
        pytest.param(
            f"{ldm_checkpoint.VAE}post_quant_conv.weight",
            None,
            r"tensor post_quant_conv\.weight is missing",
            marks=pytest.mark.slow,
        ),
        (f"{ldm_checkpoint.VAE}decoder.mid.attn_1.q.weight", torch.ones(1), r"dimensions|shape"),
        pytest.param(
            f"{ldm_checkpoint.CLIP}final_layer_norm.bias",
            None,
            r"the first is final_layer_norm\.bias",
            marks=pytest.mark.slow,
        ),
        (
            f"{ldm_checkpoint.CLIP}embeddings.token_embedding.weight",
            torch.ones(9, 32),
            r"9 tokens; CLIP's tokenizer has 49,408",
        ),
        ("betas", torch.linspace(0.0001, 0.02, 1000), "noise schedule .* is not SD v1's"),
    ],
)
def test_invalid_tensors_are_named_and_nothing_is_left(
    tensors: Tensors, save: Save, tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    path = save(replace_tensor(tensors, name, value))
    with pytest.raises(ModelError, match=message):
        convert(path, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_existing_folder_is_not_touched(checkpoint: Path, tmp_path: Path) -> None:
    for work in (convert, lambda source, out: quantize_model(source, out, SourceOptions(), lambda _: None)):
        with pytest.raises(ModelError, match="exists; name a folder that does not"):
            work(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())
