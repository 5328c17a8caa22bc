"""Every setting of a model configuration gives the same result as in diffusers, or is refused by name."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from tests.support.files import snapshot, write_csv, write_json
from tests.support.program import run_here
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import CONFIG_FILES, check_configs, list_sampler_differences
from tinysd_batch.model.checkpoint.config_rules import SCHEDULER_RULES, UNET_RULES, VAE_RULES
from tinysd_batch.model.nn.chunked_attention import use_chunked_layers
from tinysd_batch.model.nn.unet import run_unet
from tinysd_batch.model.offload.precompute import PrecomputedLayers
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.sources.ldm_config import SCHEDULER_CONFIG as SD_V1_SCHEDULER

CPU = torch.device("cpu")
TEXT_WIDTH = 16
SMALL: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 2, "cross_attention_dim": TEXT_WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
THREE_CROSS: dict[str, Any] = {
    "block_out_channels": [16, 16, 32], "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip

# Supported values other than SD v1's.
SUPPORTED: list[dict[str, Any]] = [
    {},
    {"mid_block_type": None, **THREE_CROSS},  # segmind/tiny-sd
    {"mid_block_type": None, "layers_per_block": [1, 2]},
    {"act_fn": "gelu"},
    {"act_fn": "mish"},
    {"act_fn": "relu"},
    {"attention_head_dim": [4, 8]},
    {"conv_in_kernel": 5, "conv_out_kernel": 1},
    {"cross_attention_dim": [TEXT_WIDTH, TEXT_WIDTH]},
    {"downsample_padding": 0},
    {"dropout": 0.5},
    {"flip_sin_to_cos": False},
    {"freq_shift": 1},
    {"mid_block_scale_factor": 2.0},
    {"norm_eps": 0.1, "norm_num_groups": 8},
    {"resnet_time_scale_shift": "scale_shift"},
    {"time_embedding_dim": 24},
    {"timestep_post_act": "silu"},
    {"transformer_layers_per_block": 2},
    {"transformer_layers_per_block": [[2], [1]], "reverse_transformer_layers_per_block": [[1, 1], [2, 1]]},
    {"upcast_attention": True},
    {"use_linear_projection": True},
]
# Unsupported values, one for each other entry that diffusers uses.
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("unet", {"time_cond_proj_dim": 256}, "a latent consistency model .*time_cond_proj_dim = 256"),
    ("unet", {"class_embed_type": "timestep"}, 'class_embed_type = "timestep"'),
    ("unet", {"class_embeddings_concat": True}, "class_embeddings_concat = true"),
    ("unet", {"num_class_embeds": 10}, "num_class_embeds = 10"),
    ("unet", {"addition_embed_type": "text"}, 'addition_embed_type = "text"'),
    ("unet", {"attention_type": "gated"}, 'attention_type = "gated"'),
    ("unet", {"center_input_sample": True}, "center_input_sample = true"),
    ("unet", {"cross_attention_norm": "layer_norm"}, 'cross_attention_norm = "layer_norm"'),
    ("unet", {"dual_cross_attention": True}, "dual_cross_attention = true"),
    ("unet", {"encoder_hid_dim": 32}, "encoder_hid_dim = 32"),
    ("unet", {"encoder_hid_dim_type": "text_proj"}, 'encoder_hid_dim_type = "text_proj"'),
    ("unet", {"num_attention_heads": 8}, "num_attention_heads = 8"),
    ("unet", {"only_cross_attention": True}, "only_cross_attention = true"),
    ("unet", {"only_cross_attention": [True, False]}, r"only_cross_attention = \[true, false\]"),
    ("unet", {"resnet_out_scale_factor": 2.0}, r"resnet_out_scale_factor = 2\.0"),
    ("unet", {"resnet_skip_time_act": True}, "resnet_skip_time_act = true"),
    ("unet", {"time_embedding_act_fn": "silu"}, 'time_embedding_act_fn = "silu"'),
    ("unet", {"time_embedding_type": "fourier"}, 'time_embedding_type = "fourier"'),
    ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type = "),
    ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types = "),
    ("unet", {"up_block_types": ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]}, "up_block_types = "),
    ("unet", {"cross_attention_dim": [768, 512]}, r"cross_attention_dim = \[768, 512\]"),
    ("unet", {"out_channels": 8}, "out_channels = 8"),
    ("unet", {"in_channels": 9, "out_channels": 4}, "Stable Diffusion for inpainting"),
    ("unet", {"_class_name": "UNetMotionModel"}, "UNetMotionModel"),
    ("unet", {"act_fn": "quick"}, 'act_fn = "quick"'),
    ("vae", {"_class_name": "AutoencoderTiny"}, 'vae/config.json: _class_name = "AutoencoderTiny"'),
    ("vae", {"act_fn": "mish"}, 'vae/config.json: act_fn = "mish"'),
    ("vae", {"latents_mean": [0.0] * 4}, "latents_mean = "),
    ("vae", {"latents_std": [1.0] * 4}, "latents_std = "),
    ("vae", {"shift_factor": 0.1}, r"shift_factor = 0\.1"),
    ("vae", {"scaling_factor": 0}, "scaling_factor = 0"),
    ("vae", {"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "up_block_types = "),
    ("vae", {"out_channels": 4}, "out_channels = 4"),
    ("text_encoder", {"model_type": "xlm-roberta"}, 'text_encoder/config.json: model_type = "xlm-roberta"'),
    ("text_encoder", {"hidden_size": 32}, "hidden_size is 32, the UNet's cross_attention_dim 16"),
    ("vae", {"latent_channels": 8}, "latent_channels is 8, the UNet's in_channels 4"),
    ("text_encoder", {"hidden_act": "swish"}, 'hidden_act = "swish"'),
    ("text_encoder", {"use_attention_mask": True}, "use_attention_mask = true"),
    ("scheduler", {"prediction_type": "v_prediction"}, "a model that predicts v: prediction_type is 'v_prediction'"),
    ("scheduler", {"prediction_type": "sample"}, "a model that predicts the image: prediction_type is 'sample'"),
    ("scheduler", {"prediction_type": "flow_prediction"}, "a flow matching model"),
    ("scheduler", {"prediction_type": 3}, "prediction_type = 3: this is another model"),
    ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true"),
    ("scheduler", {"beta_start": 0.0001}, r"beta_start = 0\.0001: not supported; SD v1 models have 0\.00085"),
    ("scheduler", {"beta_end": 0.02}, r"beta_end = 0\.02"),
    ("scheduler", {"beta_schedule": "linear"}, 'beta_schedule = "linear"'),
    ("scheduler", {"num_train_timesteps": 500}, "num_train_timesteps = 500"),
    ("scheduler", {"trained_betas": [0.1]}, r"trained_betas = \[0\.1\]"),
    ("scheduler", {"thresholding": True}, "thresholding = true"),
    ("scheduler", {"use_flow_sigmas": True}, "use_flow_sigmas = true"),
    ("scheduler", {"variance_type": "learned_range"}, 'variance_type = "learned_range"'),
    ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
]
GOOD: dict[str, dict[str, Any]] = {
    "unet": SMALL,
    "vae": {"block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2},
    "text_encoder": {"model_type": "clip_text_model", "hidden_size": TEXT_WIDTH},
    "scheduler": SD_V1_SCHEDULER,
}  # fmt: skip


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)


def predict_here(unet: UNet2DConditionModel, latents: Tensor, time: float, context: Tensor) -> Tensor:
    """Predict noise as the pipeline does. The UNet's layers are replaced, so it cannot be used afterwards."""
    precomputed = PrecomputedLayers(unet, {name: value.clone() for name, value in unet.state_dict().items()})
    use_chunked_layers(unet, new_vae(), fused=False)
    context_kv = precomputed.compute_context_kv(context, CPU, torch.float32)
    precomputed.set_timestep(time, CPU, torch.float32)
    precomputed.use_context_kv(context_kv)
    return run_unet(unet, latents, context_kv.rows, None, torch.float32)


@pytest.mark.parametrize("settings", SUPPORTED, ids=lambda settings: "-".join(settings))
def test_supported_settings_give_the_results_of_diffusers(settings: dict[str, Any]) -> None:
    config = {**SMALL, **settings}
    check_configs(Path("model"), {**GOOD, "unet": config})
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval()
    latents, context, time = torch.randn(2, 4, 8, 8), torch.randn(2, 5, TEXT_WIDTH), 500.0
    with torch.no_grad():
        expected = unet(latents, time, context).sample
        by_segments = SegmentedUNet(config, dict(unet.state_dict()), CPU).predict(
            latents, torch.full((2,), time), context, 2
        )
        predicted = predict_here(unet, latents, time, context)
    largest = expected.abs().max()
    assert (predicted - expected).abs().max() < 1e-5 * largest
    assert (by_segments - expected).abs().max() < 1e-5 * largest


def test_every_setting_of_diffusers_has_a_rule() -> None:
    """A new release with a new setting fails here: it needs a rule."""
    unused = {
        "mid_block_only_cross_attention", "addition_time_embed_dim", "addition_embed_type_num_heads",
        "projection_class_embeddings_input_dim", "force_upcast",
    }  # fmt: skip
    sizes = {"self", "sample_size", "out_channels", "block_out_channels", "latent_channels"}
    for model, table in ((UNet2DConditionModel, UNET_RULES), (AutoencoderKL, VAE_RULES)):
        assert set(inspect.signature(model.__init__).parameters) - unused - sizes == set(table) - sizes


def test_every_unsupported_setting_is_tested() -> None:
    tested = {(part, name) for part, entry, _ in UNSUPPORTED for name in entry} | {("vae", "in_channels")}
    for part, table in {"unet": UNET_RULES, "vae": VAE_RULES, "scheduler": SCHEDULER_RULES}.items():
        assert {(part, name) for name, setting in table.items() if setting.accepts is None} <= tested


@pytest.mark.parametrize(("part", "entry", "message"), UNSUPPORTED)
def test_unsupported_settings_are_refused(part: str, entry: dict[str, Any], message: str) -> None:
    check_configs(Path("model"), GOOD)
    with pytest.raises(ModelError, match=f"^model.*{message}"):
        check_configs(Path("model"), {**GOOD, part: {**GOOD[part], **entry}})


def test_entries_that_diffusers_ignores_are_ignored() -> None:
    check_configs(Path("model"), {part: {**config, "mystery": 3} for part, config in GOOD.items()})
    check_configs(Path("model"), {**GOOD, "scheduler": {**SD_V1_SCHEDULER, "clip_sample": True, "thresholding": None}})


def test_unused_sampler_settings_are_noted() -> None:
    assert list_sampler_differences(SD_V1_SCHEDULER) == []
    (note,) = list_sampler_differences({**SD_V1_SCHEDULER, "timestep_spacing": "trailing", "steps_offset": 0})
    assert note.startswith('scheduler: timestep_spacing = "trailing", steps_offset = 0: ')
    (note,) = list_sampler_differences({**SD_V1_SCHEDULER, "clip_sample": True})
    assert note.startswith("scheduler: clip_sample = true: ")
    assert "LCMScheduler is for few-step models" in list_sampler_differences({"_class_name": "LCMScheduler"})[0]


def change(model: Path, part: str, **entry: Any) -> None:
    path = model / part / CONFIG_FILES[part]
    write_json(path, {**json.loads(path.read_text()), **entry})


COMMANDS = [
    "inspect model", "plan m.csv --model model", "submit m.csv --inline --model model -o new/job",
    "txt2img cat --model model -o new/images",
]  # fmt: skip
CONVERTING_COMMANDS = ["convert model out", "quantize model out --level fast"]


@pytest.mark.parametrize("model_fixture", ["float_model", "tiny_model"])
@pytest.mark.parametrize(
    ("part", "entry"),
    [("unet", {"time_cond_proj_dim": 256}), ("scheduler", {"rescale_betas_zero_snr": True})],
)
def test_every_command_prints_the_same_error(
    here: Path, request: pytest.FixtureRequest, model_fixture: str, part: str, entry: dict[str, Any]
) -> None:
    shutil.copytree(request.getfixturevalue(model_fixture), here / "model")
    change(here / "model", part, **entry)
    before = snapshot(here)
    with pytest.raises(ModelError) as refused:
        TinySD.from_pretrained("model")
    assert next(iter(entry)) in str(refused.value)
    for command in [*COMMANDS, *(CONVERTING_COMMANDS if model_fixture == "float_model" else [])]:
        done = run_here(*command.split(), cwd=here)
        assert (done.returncode, done.stdout) == (2, ""), command
        assert done.stderr == f"tinysd-batch: {refused.value}\n"
    assert snapshot(here) == before


def test_notes_are_printed(here: Path, float_model: Path) -> None:
    shutil.copytree(float_model, here / "model")
    change(here / "model", "scheduler", timestep_spacing="trailing")
    for command in ("inspect model", CONVERTING_COMMANDS[0]):
        done = run_here(*command.split(), cwd=here)
        assert done.returncode == 0, done.stderr
        assert 'timestep_spacing = "trailing"' in done.stdout + done.stderr


def test_a_unet_without_a_middle_block(here: Path, float_model: Path) -> None:
    """As in segmind/tiny-sd and BK-SDM: convert a float folder and generate at 2 bits."""
    shutil.copytree(float_model, here / "model")
    shutil.rmtree(here / "model" / "unet")
    torch.manual_seed(1)
    width = json.loads((float_model / "unet" / "config.json").read_text())["cross_attention_dim"]
    theirs = UNet2DConditionModel(
        **{
            **SMALL,
            **THREE_CROSS,
            "mid_block_type": None,
            "block_out_channels": [32, 32, 64],
            "norm_num_groups": 8,
            "cross_attention_dim": width,
        }
    ).eval()
    theirs.save_pretrained(here / "model" / "unet")
    write_csv(here / "m.csv", [{"prompt": "cat", "width": 16, "height": 16}])
    for command in (
        CONVERTING_COMMANDS[1],
        "inspect out",
        "plan m.csv --model out",
        "txt2img cat --model out -o images",
    ):
        done = run_here(*command.split(), cwd=here)
        assert done.returncode == 0, done.stderr
    assert list((here / "images").rglob("*.png"))
    model = TinySD.from_pretrained("model", device="cpu", dtype="full")
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 24, width)
    with torch.no_grad(), model.offloader.holding(model.encode_fragment, model.decode_fragment):
        predicted = model.predict_noise(latents, torch.tensor(300.0), context)
        expected = theirs(latents, 300, context).sample
    assert (predicted - expected).abs().max() < 1e-5 * expected.abs().max()
