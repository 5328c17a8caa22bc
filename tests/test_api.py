"""The Python API, as the README shows it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinysd_batch
from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tinysd_batch import TinySD, read_results, submit
from tinysd_batch.errors import ManifestError, StorageError, UsageError
from tinysd_batch.images import read_metadata


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TinySD:
    return TinySD.from_pretrained(tiny_model, device="cpu")


def latents(model: TinySD, *args: Any, **kwargs: Any) -> torch.Tensor:
    images: torch.Tensor = model.generate(*args, output_type="latent", **kwargs).images
    return images


@pytest.mark.parametrize("missing", [{}, {"seed": None}, {"seed": -1}, {"seed": float("nan")}])
def test_without_a_seed_a_random_one_is_chosen_and_returned(model: TinySD, missing: dict[str, Any]) -> None:
    output = model.generate(["cat", "dog"], output_type="latent", **missing)
    first, second = output.seeds
    assert second == first + 1
    assert torch.equal(output.images, latents(model, ["cat", "dog"], output.seeds))
    assert output.seeds != model.generate(["cat", "dog"], **missing).seeds


def test_missing_seeds_in_a_list_are_chosen_one_by_one(model: TinySD) -> None:
    output = model.generate("cat", [7, None, 9])
    assert (output.seeds[0], output.seeds[2]) == (7, 9)
    assert 0 <= output.seeds[1] < 2**31


@pytest.mark.parametrize(
    ("arguments", "equivalent"),
    [
        ({"steps": 3}, {"num_inference_steps": 3}),
        ({"ddim_steps": 3.0}, {"num_inference_steps": 3}),
        ({"scale": 3}, {"guidance_scale": 3.0}),
        ({"cfg_scale": [3]}, {"guidance_scale": 3.0}),
        ({"sampler": "Euler a"}, {"sampler": "euler_a"}),
        ({"H": 32.0, "W": "16"}, {"height": 32, "width": 16}),
        ({"steps": 2, "num_inference_steps": 2}, {"num_inference_steps": 2}),
        ({"seed": 1.0}, {"seed": 1}),
        ({"seed": np.int64(1)}, {"seed": 1}),
        ({"seed": np.array([1, 2])}, {"seed": [1, 2]}),
        ({"seed": torch.tensor([1, 2])}, {"seed": [1, 2]}),
        ({"n_samples": 3}, {"seed": [1, 2, 3]}),
        ({"num_images_per_prompt": 2, "seed": [1, 5]}, {"seed": [1, 2, 5, 6]}),
        ({"negative_prompt": "big\u00a0do\u200bg"}, {"negative_prompt": "big dog"}),
        ({"eta": 0.5, "sampler": "DDIM"}, {"ddim_eta": 0.5, "sampler": "ddim"}),
    ],
)
def test_names_and_values_of_the_command_line(
    model: TinySD, arguments: dict[str, Any], equivalent: dict[str, Any]
) -> None:
    assert torch.equal(*(latents(model, "cat", **{"seed": 1, **kwargs}) for kwargs in (arguments, equivalent)))


def test_several_images_of_each_prompt(model: TinySD) -> None:
    output = model.generate(["cat", "dog"], 7, n_samples=2, negative_prompt=["a", "b"], scale=[2, 3])
    assert [
        (image["prompt"], image["negative_prompt"], image["scale"], image["seed"]) for image in output.settings
    ] == [("cat", "a", 2.0, 7), ("cat", "a", 2.0, 8), ("dog", "b", 3.0, 7), ("dog", "b", 3.0, 8)]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stpes": 3}, TypeError, r"unexpected keyword argument 'stpes'; did you mean steps\?"),
        ({"guidence_scale": 3}, TypeError, r"did you mean guidance_scale\?"),
        ({"generator": 3}, TypeError, "use seed"),
        ({"zzz": 3}, TypeError, "unexpected keyword argument 'zzz'$"),
        ({"steps": 3, "num_inference_steps": 4}, UsageError, "two names of one setting"),
        ({"scale": 3, "cfg_scale": 4}, UsageError, "scale = '3' and cfg_scale = '4'"),
        ({"steps": 2.5}, UsageError, "num_inference_steps = 2.5: a whole number was expected"),
        ({"steps": 0}, UsageError, "must be between 1 and 1000"),
        ({"seed": 42.5}, UsageError, "seed = 42.5: a whole number"),
        ({"seed": -2}, UsageError, "seed = -2: must be between"),
        ({"seed": 2**63 - 1, "n_samples": 2}, UsageError, "seed = 9223372036854775808"),
        ({"seed": []}, UsageError, "seed: 0 given"),
        ({"seed": True}, UsageError, "a whole number was expected"),
        ({"sampler": "karras"}, UsageError, "no such sampler"),
        ({"scale": "much"}, UsageError, "guidance_scale = 'much': a number was expected"),
        ({"scale": float("nan")}, UsageError, "guidance_scale = nan: must be finite"),
        ({"eta": 7}, UsageError, "eta = 7: must be between 0 and 1"),
        ({"latents": torch.zeros(1, 4, 8, 8), "n_samples": 2}, UsageError, "latents: 1 given for 2 images"),
        ({"negative_prompt_embeds": torch.zeros(2, 24, 32)}, UsageError, "negative_prompt_embeds: 2 given for a batch"),
        ({"negative_prompt": ["a", None]}, UsageError, "2 given for a batch of 1"),
        ({"prompt": ["a", float("nan")]}, UsageError, "prompt = nan: text was expected"),
        ({"prompt": "a\ud800"}, UsageError, "half a character"),
        ({"output_type": "jpg"}, UsageError, "output_type = 'jpg': one of pil, np, latent"),
        ({"prompt": None}, UsageError, "prompt: give text"),
    ],
)
def test_invalid_arguments_are_refused(
    model: TinySD, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.generate(**{"prompt": "cat", "seed": 1, **arguments})


def test_settings_are_embedded_in_images(model: TinySD, tmp_path: Path) -> None:
    output = model.generate(["red apple", "cat"], 7, negative_prompt="worm", steps=3, scale=4)
    assert output.settings[0]["prompt"] == "red apple"
    embedded = output.images[0].info["parameters"]
    assert embedded.startswith(
        "red apple\nNegative prompt: worm\nSteps: 3, Sampler: PLMS, CFG scale: 4.0, Seed: 7, Size: 16x16"
    )
    for suffix in ("png", "jpg", "webp"):
        paths = output.save(tmp_path / f"a.{suffix}")
        assert [path.name for path in paths] == [f"a_00001.{suffix}", f"a_00002.{suffix}"]
        parameters, settings = read_metadata(paths[0].read_bytes())
        assert parameters == embedded
        assert settings == {"schema": 1, **output.settings[0]}
        repeated = model.generate(
            **{name: settings[name] for name in ("prompt", "negative_prompt", "seed", "steps", "scale", "sampler")}
        )
        assert repeated.images[0].tobytes() == output.images[0].tobytes()
    assert output.images[0].tobytes() == Image.open(tmp_path / "a_00001.png").tobytes()
    (path,) = model.generate("cat", 1).save(tmp_path / "new" / "one.PNG")
    assert path == tmp_path / "new" / "one.PNG"
    assert path.is_file()


def test_unsupported_files_and_outputs_are_not_saved(model: TinySD, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.jpg or \.webp"):
        model.generate("cat", 1).save(tmp_path / "a.gif")
    with pytest.raises(UsageError, match="output_type pil"):
        model.generate("cat", 1, output_type="np").save(tmp_path / "a.png")


def test_a_progress_bar_on_request(model: TinySD, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    model.generate("cat", 1, steps=3)
    assert capsys.readouterr() == ("", "")
    model.generate("cat", 1, steps=3, progress=True, callback=lambda step, *_: steps.append(step))
    out, err = capsys.readouterr()
    assert (out, steps) == ("", [0, 1, 2])
    assert "3/3" in err


def test_repr_names_model_device_and_precision(model: TinySD) -> None:
    assert repr(model) == "TinySD('random 16', device='cpu', precision='float32')"
    assert model.precision.reason == "the model is too small to gain from half precision on a CPU"


def test_a_job_and_its_results(tiny_model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(
        here / "m.csv", [{"prompt": "red apple", "seed": "42", "note": "a"}, {"prompt": "", "seed": "", "note": "b"}]
    )
    options: dict[str, Any] = {"model": tiny_model, "inline": True, "ddim_steps": 2}
    first = submit("m.csv", limit=1, **options)
    assert first.folder == Path("outputs/m")
    assert (first.images, first.generated, first.left, first.invalid_rows) == (1, 1, 0, 1)
    assert capsys.readouterr() == ("", "")
    write_csv(here / "n.csv", [{"prompt": "red apple", "seed": "42", "note": "a"}] * 2)
    second = submit(here / "n.csv", here / "job", reuse=first.folder, progress=True, **options)
    assert (second.generated, second.reused, second.failed) == (0, 2, 0)
    check_whole(here / "job", 2)
    table = read_results(here / "job")
    assert table.column_names[-1] == "note"
    assert table.num_rows == 2
    assert second.read_results(["note", "seed"]).to_pylist() == [{"note": "a", "seed": 42}] * 2
    with pytest.raises(UsageError, match="no column nothing"):
        read_results(here / "job", ["nothing"])
    with pytest.raises(UsageError, match="not a job folder"):
        read_results(here)


def test_a_job_file(tiny_model: Path, here: Path) -> None:
    (here / "job.toml").write_text(
        f'manifest = "m.csv"\nmodel = "{tiny_model}"\nsteps = 2\ninline = true\noutput = "out"'
    )
    assert submit("job.toml", steps=1.0, seed=np.int64(7)).folder == Path("out")
    assert read_results("out", ["steps", "seed"]).to_pylist() == [{"steps": 1, "seed": 7}]
    assert read_results("out", "seed").to_pylist() == [{"seed": 7}]


def test_a_job_with_numpy_and_torch_numbers_and_lost_files(tiny_model: Path, here: Path) -> None:
    options: dict[str, Any] = {
        "model": tiny_model,
        "inline": True,
        "cfg": torch.tensor(3.0),
        "num_images": np.float32(2),
    }
    first = submit("m.csv", "job", ddim_steps=torch.tensor(1), vram_budget=0.5, seed=7, **options)
    assert (first.images, first.generated) == (2, 2)
    assert read_results("job", ["scale", "steps"]).to_pylist() == [{"scale": 3.0, "steps": 1}] * 2
    for file in (here / "job" / "images").rglob("*.png"):
        file.unlink()
    with pytest.raises(StorageError, match="redo-missing"):
        submit("job")
    assert submit("job", redo_missing=True).generated == 2


def test_a_fraction_of_memory_as_a_number(tiny_model: Path) -> None:
    shares = (TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=share) for share in (0.5, "0.5"))
    assert len({model.planner.budget_bytes for model in shares}) == 1


def test_unknown_settings_are_refused(here: Path) -> None:
    with pytest.raises(TypeError, match=r"submit\(\) got an unexpected keyword argument 'stpes'; did you mean steps\?"):
        submit("m.csv", stpes=3)
    with pytest.raises(UsageError, match="two names of one setting"):
        submit("m.csv", steps=3, num_inference_steps=4)
    with pytest.raises(UsageError, match=r"steps = 2\.5"):
        submit("m.csv", steps=2.5)
    with pytest.raises(ManifestError, match="no such file"):
        submit("none.csv", inline=True)


def test_the_package_lists_its_public_names() -> None:
    assert {"JobResult", "TinySD", "read_results", "submit"} <= set(dir(tinysd_batch))
    with pytest.raises(AttributeError, match="has no attribute 'Tiny'"):
        tinysd_batch.Tiny  # noqa: B018
