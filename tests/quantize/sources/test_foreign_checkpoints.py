"""Files that hold no SD v1 model, or are damaged or malicious, are refused quickly, by name and in little memory."""

import io
import json
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.quantize.conftest import Save
from tests.support import ldm_checkpoint
from tests.support.program import run_here
from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.convert import convert_model
from tinysd_batch.quantize.evaluate.inspect import inspect_model
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions
from tinysd_batch.quantize.sources.tensor_files import MAX_HEADER_BYTES, open_tensors

SECONDS = 10
MEGABYTES = 400


@pytest.fixture(autouse=True)
def limit_time_and_memory() -> Iterator[None]:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


def check_refused(path: Path, message: str, *, allow_pickle: bool = True) -> None:
    """Assert that a file is refused with this message, and that no file is left behind."""
    before = sorted(file.name for file in path.parent.iterdir())
    with pytest.raises(ModelError, match=message) as refused:
        convert_model(path, path.parent / "out", SourceOptions(allow_pickle=allow_pickle), None, lambda _: None)
    assert str(refused.value).startswith(str(path))
    assert sorted(file.name for file in path.parent.iterdir()) == before


def make_tensors(*names: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name in names}


FIRST = f"{ldm_checkpoint.UNET}input_blocks.0.0.weight"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LORA = [
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
    f"unet.{ATTENTION}.to_k.lora_A.weight",
    f"unet.{ATTENTION}.processor.to_q_lora.down.weight",
    f"{ATTENTION}.processor.to_q_lora.up.weight",
    f"{ATTENTION}.to_q.lora.down.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q.lora_linear_layer.up.weight",
    f"base_model.model.{ATTENTION}.to_q.lora_A.weight",
    f"base_model.model.{ATTENTION}.to_q.lora_magnitude_vector",
    "diffusion_model.input_blocks.1.1.proj_in.lora_up.weight",
    "lycoris_unet_mid.hada_w1_a",
    "lycoris_unet_mid.lokr_w1",
    "unet_mid_block.oft_blocks",
    "unet_mid_block.dora_scale",
    "unet_mid_block.on_input",
    "text_encoder.lora_alpha",
]


@pytest.mark.parametrize("name", LORA)
def test_lora_is_refused_under_every_naming_scheme(save: Save, name: str) -> None:
    path = save(make_tensors(name))
    check_refused(path, "this is LoRA or LyCORIS: it is an addition to a model")
    assert inspect_model(path).unusable_reason


OTHER_MODELS = {
    "Stable Diffusion XL": make_tensors("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", FIRST),
    "Stable Diffusion v2: its text": make_tensors("cond_stage_model.model.token_embedding.weight", FIRST),
    "Stable Diffusion v2: its cross": make_tensors(
        f"{ldm_checkpoint.UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", shape=(320, 1024)
    ),
    "Stable Diffusion 3, Flux or alike": make_tensors("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"),
    "Stable Diffusion for inpainting: it needs an image and a mask": make_tensors(FIRST, shape=(320, 9, 3, 3)),
    "InstructPix2Pix": make_tensors(FIRST, shape=(320, 8, 3, 3)),
    "unCLIP or": make_tensors(f"{ldm_checkpoint.UNET}label_emb.0.0.weight", FIRST),
    "a model that predicts v": make_tensors("v_pred", FIRST),
    "ControlNet": make_tensors("control_model.zero_convs.0.0.weight"),
    "ControlNet:": make_tensors("controlnet_mid_block.weight", "down_blocks.0.resnets.0.conv1.weight"),
    "IP-Adapter": make_tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
    "T2I-Adapter": make_tensors("adapter.body.0.resnets.0.block1.weight"),
    "GLIGEN": make_tensors(FIRST, f"{ldm_checkpoint.UNET}position_net.linears.0.weight"),
    "a latent consistency model .* which is not supported": make_tensors(
        FIRST, f"{ldm_checkpoint.UNET}time_embed.cond_proj.weight"
    ),
    "a model with EDM's noise levels": make_tensors(FIRST, "edm_mean"),
    "averaged copies of a UNet": make_tensors(
        "model_ema.diffusion_modelout2bias",
        "first_stage_model.decoder.conv_in.weight",
        "first_stage_model.post_quant_conv.weight",
    ),
    "text encoder: it holds no UNet": make_tensors("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
    "AnimateDiff": make_tensors("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"),
    "textual inversion": make_tensors("emb_params", shape=(4, 768)),
    "textual inversion: it is an addition": make_tensors("<my-cat>", shape=(768,)),
    "autoencoder: it holds no UNet; use it with `--vae`": make_tensors(
        "decoder.conv_in.weight", "post_quant_conv.weight"
    ),
    "a component of a model folder: name the whole folder": make_tensors("down_blocks.0.resnets.0.conv1.weight"),
    "unknown: it contains no UNet .* the first of 1 names is 'something'": make_tensors("something"),
    "unknown: .*; it is empty": {},
}


@pytest.mark.parametrize("message", OTHER_MODELS)
def test_other_models_are_refused_by_name(save: Save, message: str) -> None:
    path = save(OTHER_MODELS[message])
    check_refused(path, f"this is {message}")
    inspection = inspect_model(path)
    assert inspection.refusal_reason
    assert inspection.unusable_reason == f"{path}: this is {inspection.model_type}: {inspection.refusal_reason}"


def test_a_pickled_hypernetwork(save: Save) -> None:
    content = {768: ({"linear.0.weight": torch.zeros(4, 4)}, {}), "step": 3, "layer_structure": [1, 2, 1]}
    check_refused(save(content, "style.pt"), "this is hypernetwork: it is an addition")


def test_a_pickled_textual_inversion(save: Save) -> None:
    content = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": {"*": torch.zeros(1, 768)},
        "name": "cat",
    }
    check_refused(save(content, "cat.pt"), "this is textual inversion")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither a safetensors file nor a PyTorch checkpoint"),
        (b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0", "a GGUF file, quantized by another program"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "compressed by gzip"),
        (b"\xff" * 1000, "neither a safetensors"),
        (b"\0" * 1000, "neither a safetensors"),
        (struct.pack("<Q", 2**63) + b"{" + b" " * 100, "neither a safetensors"),
        (struct.pack("<Q", 2**31) + b"{" + b" " * 100, "its header claims 2,147,483,648 bytes"),
        (struct.pack("<Q", 4096) + b"{" + b" " * 100, "not a readable safetensors file"),
        (struct.pack("<Q", 8) + b"{'a': 1}", "not a readable safetensors file"),
        (struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995, "not a readable safetensors file"),
        (b"\x80\x02}q\0.", "written by PyTorch before 1.6"),
        (b"PK\x03\x04" + b"\0" * 100, "not a readable PyTorch checkpoint"),
    ],
)
def test_files_of_other_formats(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    check_refused(path, message)


def test_a_header_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 8 * 2**30) + b"{")
        file.truncate(8 * 2**30 + 8)  # sparse: takes no disk space
    check_refused(path, "neither a safetensors")
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    check_refused(path, "its header claims")


def header(entries: dict[str, Any], data: int = 16) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 1600]},
        {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "wide", "data_offsets": [0, 16]},
        {"dtype": "F32"},
    ],
)
def test_invalid_header_entries(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = tmp_path / "invalid.safetensors"
    path.write_bytes(header({FIRST: entry}))
    check_refused(path, "not a readable safetensors file")


def test_many_names_do_not_take_quadratic_time(tensors: dict[str, Tensor], save: Save) -> None:
    many = {f"{ldm_checkpoint.UNET}input_blocks.{number}.0.bias": torch.zeros(1) for number in range(12, 10_000)}
    start = time.process_time()
    check_refused(save(tensors | many), "10,674 tensors in a component of the model; at most 4,000 are read")
    assert time.process_time() - start < 2


def test_truncated_and_extended_files(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    whole = save(tensors)
    path = tmp_path / "truncated.safetensors"
    for length in (4, 12, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        check_refused(path, "not a readable safetensors file|neither a safetensors|before 1.6")
    path.write_bytes(whole + b"more")
    check_refused(path, "not a readable safetensors file")


def test_escape_sequences_in_names_are_not_printed(save: Save, tmp_path: Path) -> None:
    path = save(
        {**make_tensors(FIRST, shape=(32, 4, 3, 3)), f"{ldm_checkpoint.UNET}\x1b[2J\nout.2.bias": torch.zeros(4)}
    )
    result = run_here("convert", path, "out", cwd=tmp_path)
    assert result.returncode == 2
    assert "\x1b" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# Pickles


class Code:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def make_pytorch_file(program: bytes, **options: Any) -> bytes:
    """Return a PyTorch file with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def replace_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a PyTorch file; everything else, checksums included, stays valid."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as changed:
        for record in archive.infolist():
            content = archive.read(record)
            if record.filename.endswith("/data.pkl"):
                assert content.count(old) == 1
                content = content.replace(old, new)
            changed.writestr(record.filename, content)
    path.write_bytes(out.getvalue())


def test_code_in_a_pickle_is_named_and_does_not_run(save: Save, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name, function, argument in (
        ("PosixPath", Path.touch, trace),
        ("system", __import__("os").system, f"touch {trace}"),
        ("eval", eval, "1"),
    ):
        path = tmp_path / "evil.ckpt"
        path.write_bytes(make_pytorch_file(pickle.dumps({"state_dict": {FIRST: Code(function, argument)}}, protocol=2)))
        check_refused(path, f"its pickle asks for .*({name}|getattr).*, which is code and not weights; refused")
        path.unlink()
    assert not list(tmp_path.iterdir())


def test_code_under_torchs_own_names(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    for name in ("torch.storage_from_file", "torch.hub.load", "torch._utils._rebuild_qtensor", "torch.Tensor"):
        module, _, leaf = name.rpartition(".")
        path.write_bytes(make_pytorch_file(f"\x80\x02c{module}\n{leaf}\n)R.".encode("latin1")))
        check_refused(path, f"its pickle asks for {name}, which is code")
    path.write_bytes(make_pytorch_file(pickle.dumps({"a": Code(eval, "1")}, protocol=4)))
    check_refused(path, "its pickle uses STACK_GLOBAL")


def test_training_objects_in_a_pickle_are_ignored(tensors: dict[str, Tensor], save: Save, tmp_path: Path) -> None:
    """SD v1.4's file names a class of its training program, which is not installed and must not run."""
    path = save(tensors, "left.ckpt", {"callbacks": {"XXXX": {"best": 1}}})
    called = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    replace_in_pickle(path, b"X\x04\0\0\0XXXX", called)
    contents = open_tensors(path, allow_pickle=True)
    assert contents.tensors.keys() == tensors.keys()
    assert contents.other_names == ["callbacks"]


BYTES = b"c_codecs\nencode\n"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x40\x85R.", "asks for __builtin__.bytearray"),
        (b"\x80\x02" + BYTES + b"X\x01\0\0\0aX\x03\0\0\0hex\x86R.", "asks for the codec hex"),
        (b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"a.", "not a readable PyTorch checkpoint"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "not a readable PyTorch checkpoint"),
        (b"\x80\x02" + b"]" * 100, "not a readable PyTorch checkpoint"),
        (b"\x80\x02]q\0.", "holds a list; names with tensors were expected"),
        (b"\x80\x02}X\x0a\0\0\0state_dict]s.", "its state_dict is a list"),
        (b"\x80\x02" + b"N0" * 5_000_000 + b".", "its pickle has 10,000,003 bytes"),
        (b"", "not a readable PyTorch checkpoint"),
    ],
    ids=range(9),
)
def test_malicious_pickles(tmp_path: Path, program: bytes, message: str) -> None:
    path = tmp_path / "evil.ckpt"
    path.write_bytes(make_pytorch_file(program))
    check_refused(path, message)


def test_zip_bombs(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    path.write_bytes(make_pytorch_file(b"\0" * 300_000_000, compression=zipfile.ZIP_DEFLATED))
    check_refused(path, "compressed, which PyTorch never does")
    data = make_pytorch_file(b"\x80\x02}.")
    entry_start = data.rindex(b"PK\x01\x02", 0, data.index(b"archive/byteorder", data.index(b"PK\x01\x02")))
    path.write_bytes(data[: entry_start + 20] + struct.pack("<II", 2**31, 2**31) + data[entry_start + 28 :])
    check_refused(path, "records claim more bytes|not a readable PyTorch checkpoint")
    path.write_bytes(make_pytorch_file(b"\x80\x02}.")[:-30])
    check_refused(path, "not a readable PyTorch checkpoint")


def test_tensors_larger_than_their_file(save: Save) -> None:
    stretched = torch.zeros(1).expand(2**33, 2**20)
    check_refused(save({FIRST: stretched}, "stretched.ckpt"), "tensors claim more bytes than the file has")
    tensor = torch.zeros(1000)
    repeated = {f"{ldm_checkpoint.UNET}{number}": tensor for number in range(1000)}
    check_refused(save(repeated, "repeated.ckpt"), "tensors claim more bytes than the file has")
    check_refused(save({FIRST: torch.zeros(4).to_sparse()}, "sparse.ckpt"), "which is code|sparse")


def test_a_tensor_larger_than_its_record(tmp_path: Path, save: Save) -> None:
    path = save({FIRST: torch.zeros(4)}, "short.ckpt")
    replace_in_pickle(path, b"K\x04\x85", b"M\xff\xff\x85")  # the shape (4,)
    check_refused(path, "not a readable PyTorch checkpoint: .*storage|claim more bytes than the file has")
