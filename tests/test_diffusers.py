"""Packed models in the diffusers library, after `import tinysd_batch.diffusers`."""

import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline, UNet2DConditionModel
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

import tinysd_batch.diffusers
from tests.support.models.packed_files import LAYER, damage, drop, put
from tests.support.paths import ROOT
from tests.support.program import environment
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError, UsageError
from tinysd_batch.model.checkpoint.folder import read_unet
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE, embedded_model_path
from tinysd_batch.model.checkpoint.json_file import read_json_object

PACKED_NAMES = ("qweight", "qscale", "qoff", "qmeta")
OPTIONS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tiny_model: Path) -> Path:
    return tiny_model if request.param == "tiny" else embedded_model_path()


@pytest.fixture
def unet_folder(tiny_model: Path) -> Path:
    return tiny_model / "unet"


def new_pipeline(folder: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def start_noise(model: TinySD, seed: int) -> torch.Tensor:
    size = model.unet.config.sample_size
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed))


def convert_floats(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def check_same(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


# Loading


def test_weights_are_bit_identical_to_those_of_our_reader(folder: Path) -> None:
    loaded = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    _, stored = read_unet(folder / "unet")
    assert any(name.endswith(".qweight") for name in stored)
    check_same(dict(loaded.state_dict()), convert_floats(stored, torch.float32))
    assert not loaded.training


def test_a_pipeline_generates_the_same_images_as_ours(folder: Path) -> None:
    pipeline, model = new_pipeline(folder), TinySD.from_pretrained(folder, device="cpu")
    arguments = {"latents": start_noise(model, 7), "negative_prompt": "green", **OPTIONS}
    theirs = pipeline("red apple", output_type="latent", **arguments).images
    ours = model.generate("red apple", 7, negative_prompt="green", output_type="latent", **OPTIONS).images
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    their_image = np.asarray(pipeline("red apple", **arguments).images[0], dtype=int)
    our_image = np.asarray(model.generate("red apple", 7, negative_prompt="green", **OPTIONS).images[0], dtype=int)
    assert np.abs(their_image - our_image).max() <= 1, "pixels differ by more than rounding"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_leaves_packed_integers_unchanged(unet_folder: Path, dtype: torch.dtype) -> None:
    stored = load_file(unet_folder / WEIGHTS_FILE)
    loaded = UNet2DConditionModel.from_pretrained(unet_folder, torch_dtype=dtype).state_dict()
    check_same(loaded, convert_floats(stored, dtype))
    assert loaded[f"{LAYER}.qmeta"].dtype == torch.int16


# Saving


def test_saving_in_the_files_dtype_gives_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float16).save_pretrained(tmp_path)
    check_same(load_file(tmp_path / WEIGHTS_FILE), load_file(folder / "unet" / WEIGHTS_FILE))
    quantization = read_json_object(tmp_path / "config.json")["quantization_config"]
    assert quantization == read_json_object(folder / "unet" / "config.json")["quantization_config"]


def test_a_saved_pipeline_loads_in_diffusers_and_here(folder: Path, tmp_path: Path) -> None:
    first = new_pipeline(folder)
    first.save_pretrained(tmp_path)
    reloaded = new_pipeline(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        check_same(getattr(reloaded, part).state_dict(), getattr(first, part).state_dict())
    stored, saved = load_file(folder / "unet" / WEIGHTS_FILE), load_file(tmp_path / "unet" / WEIGHTS_FILE)
    for name, value in stored.items():
        assert torch.equal(value.float(), saved[name].float()), name
        assert value.dtype == saved[name].dtype or not name.endswith(PACKED_NAMES), name
    saved_floats, stored_floats = (
        convert_floats(read_unet(path / "unet")[1], torch.float32) for path in (tmp_path, folder)
    )
    check_same(saved_floats, stored_floats)
    shutil.copy(folder / "tinysd.json", tmp_path)
    ours = [TinySD.from_pretrained(path, device="cpu") for path in (folder, tmp_path)]
    images = [model.generate("red apple", 1, num_inference_steps=2, output_type="np").images for model in ours]
    assert np.array_equal(*images)


def test_a_sharded_unet_loads_again(unet_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(unet_folder)
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_same(UNet2DConditionModel.from_pretrained(tmp_path).state_dict(), unet.state_dict())
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(first)
    name = next(name for name in tensors if name.endswith("qweight"))
    save_file({**tensors, name: tensors[name].float()}, first)
    with pytest.raises(ModelError, match=f"{tmp_path}: tensor {name} is torch.float32"):
        UNet2DConditionModel.from_pretrained(tmp_path)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{LAYER}.qscale"), rf"1 tensors are missing, the first is {LAYER}.qscale"),
        (drop("conv_in.bias"), r"1 tensors are missing, the first is conv_in.bias"),
        (put(f"{LAYER}.qweight", torch.zeros(3, 3, dtype=torch.uint8)), rf"{LAYER}.qweight is torch.uint8 \[3, 3\]"),
        (put(f"{LAYER}.qmeta", torch.zeros(64, 4)), rf"{LAYER}.qmeta is torch.float32 \[64, 4\], torch.int16"),
        (put("conv_in.bias", torch.zeros(5)), r"conv_in.bias is torch.float32 \[5\], torch.float32 \[32\]"),
        (put("stray", torch.zeros(1)), r"1 unexpected tensors, the first is stray"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    model = damage(tiny_model, tmp_path / "model", change)
    with pytest.raises(ModelError, match=rf"{model}/unet/{WEIGHTS_FILE}: .*{message}"):
        StableDiffusionPipeline.from_pretrained(model)


def test_a_newer_format_is_refused(unet_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(unet_folder, tmp_path / "unet")
    config = read_json_object(unet_folder / "config.json")
    config["quantization_config"]["min_reader"] = "2.0"
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{WEIGHTS_FILE}: format 2\.0 is newer than 1\.0; update tinysd-batch"):
        UNet2DConditionModel.from_pretrained(tmp_path / "unet")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(unet_folder: Path) -> None:
    with pytest.raises(UsageError, match="device cuda: torch sees no GPU here"):
        UNet2DConditionModel.from_pretrained(unet_folder, device_map="cuda")


def test_offloading_to_disk_is_refused(unet_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be offloaded to disk"):
        UNet2DConditionModel.from_pretrained(unet_folder, device_map={"": "disk"}, offload_folder=tmp_path)


def test_a_float_model_is_not_quantized_while_it_loads(float_model: Path) -> None:
    with pytest.raises(UsageError, match="quantize_folder writes a packed folder"):
        UNet2DConditionModel.from_pretrained(
            float_model / "unet", quantization_config=tinysd_batch.diffusers.TinySDConfig(layers={})
        )


def test_the_embedded_models_vae_only_decodes() -> None:
    pipeline = new_pipeline(embedded_model_path()).to("cpu")  # raises where weights are missing
    with pytest.raises(UsageError, match="has no encoder"):
        AutoPipelineForImage2Image.from_pipe(pipeline)("red apple", image=torch.zeros(1, 3, 64, 64))


# Versions


@pytest.mark.slow
@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_both_ends_of_the_version_range(end: str, tmp_path: Path) -> None:
    """Run the tests above with diffusers and its dependencies from the index, all else from this environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (required,) = (
        requirement for requirement in map(Requirement, project["dependencies"]) if requirement.name == "diffusers"
    )
    (lowest,) = (bound.version for bound in required.specifier if bound.operator == ">=")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = tmp_path / "venv" / "bin" / "python"
    version_range = f"diffusers=={lowest}" if end == "oldest" else str(required)
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--upgrade", version_range], capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0, installed.stderr
    code = "import diffusers; print(diffusers.__version__)"
    env = environment(PYTHONPATH=str(ROOT))
    version = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert required.specifier.contains(version)
    assert end == "newest" or version.startswith(lowest)
    tests = [str(python), "-m", "pytest", __file__, "-m", "not slow", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(tests, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"diffusers {version}: {done.stdout[-5000:]}"
