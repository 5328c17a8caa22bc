"""Settings of job files, presets and options are read like manifests: the same rules for text, numbers and gaps."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import Capture, call
from tinysd_batch.errors import UsageError
from tinysd_batch.settings.sampler_names import find_sampler
from tinysd_batch.settings.schema import SETTINGS
from tinysd_batch.settings.sources import merge_settings, parse_settings, read_job_file, read_preset


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"steps": 3.0, "seed": 42.0, "quality": 80.0}, {"steps": 3, "seed": 42, "quality": 80}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": -1.0}, {"seed": None}),
        ({"scale": math.nan, "steps": math.nan, "n_iter": math.nan}, {"scale": None, "steps": None, "n_iter": 1}),
        ({"steps": "None", "seed": "nan", "scale": "NULL"}, {"steps": None, "seed": None, "scale": None}),
        ({"scale": 7}, {"scale": 7.0}),
        ({"negative_prompt": "\ufeffblur\u200bry\u00a0sky"}, {"negative_prompt": "blurry sky"}),
        ({"sampler": "Euler\u00a0a"}, {"sampler": "euler_a"}),
        ({"prompt_syntax": "\u200bnone"}, {"prompt_syntax": "none"}),
        ({"format": "\u200bjpg", "prompt_syntax": "a1111\u2060"}, {"format": "jpg", "prompt_syntax": "a1111"}),
    ],
)
def test_every_spelling_of_settings(values: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = merge_settings(parse_settings(values, "settings"))
    assert {name: settings.get(name, SETTINGS[name].default) for name in expected} == expected


@pytest.mark.parametrize(
    "values",
    [{"steps": 2.5}, {"steps": 1e30}, {"seed": -2}, {"steps": True}, {"scale": math.inf}, {"scale": True}, {"f": "x"}],
)
def test_invalid_settings(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"settings: {next(iter(values))} = "):
        parse_settings(values, "settings")


def test_missing_value_is_unset_and_minus_one_unsets_a_seed() -> None:
    layers = [{"scale": 3.0, "seed": 5}, {"scale": math.nan, "seed": -1}]
    assert merge_settings(*(parse_settings(layer, "settings") for layer in layers)) == {"scale": 3.0}


@pytest.mark.parametrize(
    "encode",
    [lambda text: f"\ufeff{text}".encode(), lambda text: text.encode("utf-16"),
     lambda text: text.replace("steps", "\ufeffsteps").encode()],
    ids=["utf-8-sig", "utf-16", "concatenated files"],
)  # fmt: skip
def test_toml_with_byte_order_marks(tmp_path: Path, encode: Any) -> None:
    (tmp_path / "preset.toml").write_bytes(encode('scale = 5\nsteps = 3.0\nnegative_prompt = "größe"\n'))
    expected = {"scale": 5, "steps": 3.0, "negative_prompt": "größe"}
    assert read_preset(tmp_path / "preset.toml") == expected
    (tmp_path / "job.toml").write_bytes(encode('manifest = "m.csv"\nsteps = nan\npreset = ["preset.toml"]\n'))
    assert read_job_file(tmp_path / "job.toml") == (expected, tmp_path / "m.csv", None)


def test_options_and_job_file_of_plan(here: Path, capfd: Capture, tiny_model: Path) -> None:
    (here / "job.toml").write_bytes(b'\xef\xbb\xbfmanifest = "m.csv"\nsteps = 3.0\nseed = -1\nscale = nan\n')
    code, stdout, stderr = call(capfd, "plan", "job.toml", "--model", tiny_model, "--sampler", "k_dpm_2_ancestral")
    assert (code, stderr) == (0, "")
    assert "dpm2_a, 3 steps" in stdout
    code, _, stderr = call(capfd, "plan", "m.csv", "--seed", -1, "--sampler", "DPM++ 2M Karras")
    assert code == 2
    assert (
        "sampler = 'DPM++ 2M Karras': dpmpp_2m is supported, but its Karras schedule is not; write dpmpp_2m" in stderr
    )


SAMPLERS = {
    "plms": "PLMS PNDM PNDMScheduler",
    "ddim": "DDIM DDIMScheduler k_ddim",
    "euler": "Euler k_euler EulerDiscreteScheduler sample_euler",
    "euler_a": "euler_ancestral k_euler_ancestral k_euler_a EulerAncestralDiscreteScheduler Euler\u00a0a",
    "heun": "Heun k_heun HeunDiscreteScheduler",
    "dpm2": "DPM2 dpm_2 k_dpm_2 KDPM2DiscreteScheduler",
    "dpm2_a": "dpm_2_ancestral k_dpm_2_ancestral k_dpm_2_a KDPM2AncestralDiscreteScheduler dpm2_ancestral",
    "lms": "LMS k_lms LMSDiscreteScheduler diffusers.LMSDiscreteScheduler",
    "dpmpp_2m": "dpmpp_2m k_dpmpp_2m DPM++2M DPM++_2M DPMSolverMultistepScheduler DPM-Solver++",
    "unipc": "UniPC uni_pc UniPCMultistepScheduler",
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_names_of_other_programs(sampler: str) -> None:
    assert {name: find_sampler(name) for name in SAMPLERS[sampler].split(" ")} == dict.fromkeys(
        SAMPLERS[sampler].split(" "), sampler
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m is supported, but its Karras schedule is not"),
        ("DPM++ 2M SGM Uniform", "dpmpp_2m is supported, but its SGM uniform schedule is not"),
        ("Euler a Automatic", "euler_a is supported, but its automatic schedule is not"),
        ("k_dpm_2_a_ka", "dpm2_a is supported, but its Karras schedule is not"),
        ("lms_karras", "lms is supported, but its Karras schedule is not"),
        ("dpmpp_2m_k", "dpmpp_2m is supported, but its Karras schedule is not"),
        ("Euler Beta", "euler is supported, but its beta schedule is not"),
        ("DPM++ SDE Karras", "no such sampler; one of plms"),
        ("DPMSolverSinglestepScheduler", "no such sampler"),
        ("uni_pc_bh2", "no such sampler"),
        ("k", "no such sampler"),
        ("Karras", "no such sampler"),
    ],
)
def test_unsupported_samplers(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_sampler(name)
