"""The commands quantize, convert and inspect on SD v1 single files and folders."""

import json
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import ldm_checkpoint
from tests.support.program import command, environment, run_here
from tinysd_batch import TinySD
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.quantize.data_free import quantize_model
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions
from tinysd_batch.storage.atomic import TEMPORARY_PREFIX


def test_a_single_file_at_two_bits(
    checkpoint: Path, models: ldm_checkpoint.Models, tmp_path: Path, no_network: None
) -> None:
    result = run_here("quantize", checkpoint, "model", "--level", "fast", "--no-samples", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "unet: packing, preset default: " in result.stderr
    output = TinySD.from_pretrained(tmp_path / "model").generate(
        "a cat", 1, height=64, width=64, num_inference_steps=2, output_type="latent"
    )
    assert output.images.isfinite().all()
    assert ldm_checkpoint.same_tensors(models.vae, load_file(tmp_path / "model" / "vae" / WEIGHTS_FILE), torch.float16)
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


def test_a_file_and_its_folder_give_the_same_packed_unet(floats: Path, packed: Path, tmp_path: Path) -> None:
    quantize_model(floats, tmp_path / "packed", SourceOptions(), lambda _: None)
    from_file, from_folder = (load_file(folder / "unet" / WEIGHTS_FILE) for folder in (packed, tmp_path / "packed"))
    assert from_file.keys() == from_folder.keys()
    assert all(torch.equal(tensor, from_folder[name]) for name, tensor in from_file.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "{}", "out", "--recipe", "r.toml"], "r.toml: no such file or directory"),
        (["quantize", "{}", "out", "--level", "best"], "--level best: one of auto, fast, calib, distill was expected"),
        (["convert", "{}", "out", "--dtype", "int8"], "--dtype int8: fp16 or fp32 was expected"),
        (["convert", "{}", "."], ".: exists; name a folder that does not"),
        (["convert", "{}", "/proc/none/out"], "/proc/none/out: "),
        (["inspect", "nowhere"], "nowhere: No such file"),
        (["txt2img", "cat", "--model", "{}"], "`tinysd-batch quantize {} OUT` (2 bits), or `convert` (float)"),
    ],
)
def test_failing_commands_print_one_line(checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run_here(*(word.format(checkpoint) for word in arguments), cwd=tmp_path)
    assert result.returncode in (2, 5)
    assert message.format(checkpoint) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_inspect(checkpoint: Path, floats: Path, packed: Path, models: ldm_checkpoint.Models, tmp_path: Path) -> None:
    weights = {
        name: sum(value.numel() for value in getattr(models, name).state_dict().values())
        for name in ("unet", "vae", "text_encoder")
    }
    for path, model_type in ((checkpoint, "Stable Diffusion v1"), (floats, "float folder"), (packed, "a packed model")):
        result = run_here("inspect", path, "--json", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        inspection = json.loads(result.stdout)
        assert model_type in inspection["kind"]
        assert {component["name"]: component["weights"] for component in inspection["parts"]} == weights
        assert model_type in run_here("inspect", path, cwd=tmp_path).stdout
    (unet,) = (component for component in inspection["parts"] if component["name"] == "unet")
    assert 2.2 < unet["layers"]["resnet convolutions, 2 bits"]["bits"] < 2.6
    assert 8.2 < unet["layers"]["time projections, 8 bits"]["bits"] < 9.3


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def allow_small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    result = subprocess.run(
        command("convert", checkpoint, "model"),
        cwd=tmp_path,
        env=environment(),
        preexec_fn=allow_small_files,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 5
    assert "model: File too large; make room or choose another folder" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_quantizer_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("quantize", checkpoint, "model", "--level", "fast", "--no-samples"),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("unet: packing")
    assert [path.name.startswith(TEMPORARY_PREFIX) for path in tmp_path.iterdir()] == [True]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    process.stderr.close()
    assert not list(tmp_path.iterdir())
