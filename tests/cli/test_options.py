"""Every option of tiny-stable-diffusion's script, and of ours, has its effect."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.support.files import write_csv
from tests.support.jobs import check_whole, read_results
from tests.support.program import run_here
from tinysd_batch.images import read_metadata

FOLDER = Path("outputs/txt2img-samples")


@pytest.fixture
def txt2img(tmp_path: Path, tiny_model: Path) -> Any:
    """Run `txt2img` with the tiny model. Return the images' metadata by file name, and the output."""

    def run(*arguments: object, expect: int = 0) -> tuple[dict[str, dict[str, Any]], str]:
        done = run_here("txt2img", "--ckpt", tiny_model, *arguments, cwd=tmp_path)
        assert done.returncode == expect, done.stderr
        images = sorted((tmp_path / FOLDER).glob("seed_*"))
        return {path.name: read_metadata(path.read_bytes())[1] for path in images}, done.stdout + done.stderr

    return run


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# Commands and options of tiny-stable-diffusion


def test_command_line_of_tiny_stable_diffusion(txt2img: Any) -> None:
    prompt = "A peaceful lakeside cabin with a dock, surrounded by tall pine trees and a clear blue sky"
    images, _ = txt2img("--prompt", prompt, "--H", 64, "--W", 32, "--seed", 27)
    (settings,) = images.values()
    assert list(images) == ["seed_27_00001.png"]
    assert (settings["prompt"], settings["height"], settings["width"], settings["seed"]) == (prompt, 64, 32, 27)


def test_txt2img_writes_only_images(txt2img: Any, tmp_path: Path) -> None:
    txt2img("cat", "--seed", 1)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        (FOLDER / "seed_1_00001.png").as_posix()
    ]


def test_cuda_visible_devices_is_not_changed(txt2img: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    txt2img("cat")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_weighted_prompts_need_no_quotes(txt2img: Any) -> None:
    images, _ = txt2img("--prompt", "tabby", "cat:0.25", "white", "duck:0.75", "hybrid", "--seed", 1)
    (settings,) = images.values()
    assert settings["prompt"] == "tabby cat:0.25 white duck:0.75 hybrid"
    assert settings["made"]["n_tokens"] > 5  # the weights are not tokens


def test_random_seed_is_printed_and_stored(txt2img: Any) -> None:
    txt2img("cat")
    images, output = txt2img("cat")
    seeds = [settings["seed"] for settings in images.values()]
    assert len(set(seeds)) == 2
    assert f"seed {seeds[0]}" in output or f"seed {seeds[1]}" in output


def test_second_run_continues_numbers_after_deletions(txt2img: Any, tmp_path: Path) -> None:
    txt2img("cat", "--seed", 5, "--n_samples", 3)
    (tmp_path / FOLDER / "seed_5_00001.png").unlink()
    images, _ = txt2img("cat", "--seed", 5)
    assert list(images) == ["seed_5_00004.png", "seed_6_00002.png", "seed_7_00003.png"]


def test_file_name_of_the_55th_image(txt2img: Any, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "seed_9_00054.jpg").touch()
    images, _ = txt2img("cat", "--seed", 1234)
    assert "seed_1234_00055.png" in images


def test_n_iter_times_n_samples(txt2img: Any) -> None:
    images, _ = txt2img("cat", "--n_iter", 2, "--n_samples", 3, "--seed", 10)
    assert [settings["seed"] for settings in images.values()] == [10, 11, 12, 13, 14, 15]


def test_options_that_change_the_image(txt2img: Any, tmp_path: Path) -> None:
    plain, _ = txt2img("cat (dog)", "--seed", 1)
    for number, (option, value, name, stored) in enumerate(
        [
            ("--ddim_steps", 3, "steps", 3),
            ("--scale", 3.5, "scale", 3.5),
            ("--sampler", "dpm2_a", "sampler", "dpm2_a"),
            ("--sampler", "DPM++ 2M", "sampler", "dpmpp_2m"),
            ("--negative-prompt", "worm", "negative_prompt", "worm"),
            ("--prompt-syntax", "a1111", "prompt_syntax", "a1111"),
        ],
        start=2,
    ):
        images, _ = txt2img("cat (dog)", "--seed", 1, option, value)
        file = f"seed_1_{number:05d}.png"
        assert images[file][name] == stored
        default, changed = (pixels(tmp_path / FOLDER / image) for image in (*plain, file))
        assert not np.array_equal(default, changed), option


def test_ddim_eta(txt2img: Any, tmp_path: Path) -> None:
    for eta in (0, 0.9):
        images, _ = txt2img("cat", "--seed", 1, "--sampler", "ddim", "--ddim_eta", eta, "--steps", 4)
    assert [settings["eta"] for settings in images.values()] == [0, 0.9]
    without_noise, with_noise = (pixels(tmp_path / FOLDER / name) for name in images)
    assert not np.array_equal(without_noise, with_noise)


def test_fixed_code_starts_all_images_from_the_same_noise(txt2img: Any, tmp_path: Path) -> None:
    free, _ = txt2img("cat", "--seed", 1, "--n_samples", 2)
    fixed, _ = txt2img("cat", "--seed", 1, "--n_samples", 2, "--fixed_code")
    first, second = (pixels(tmp_path / FOLDER / name) for name in free)
    assert not np.array_equal(first, second)
    third, fourth = (pixels(tmp_path / FOLDER / name) for name in ("seed_1_00003.png", "seed_2_00004.png"))
    assert np.array_equal(first, third)
    assert np.abs(third.astype(int) - fourth).max() <= 1
    assert fixed["seed_1_00003.png"]["image_id"] == free["seed_1_00001.png"]["image_id"]


def test_grid_and_its_number_of_rows(txt2img: Any, tmp_path: Path) -> None:
    _, output = txt2img("cat", "--seed", 1, "--n_samples", 4, "--n_rows", 4)
    assert "grid_00001.png" in output
    with Image.open(tmp_path / FOLDER / "grid_00001.png") as grid:
        tall = grid.size
    txt2img("cat", "--seed", 1, "--n_samples", 4, "--n_rows", 1)
    with Image.open(tmp_path / FOLDER / "grid_00005.png") as grid:
        assert grid.width > 3 * tall[0]
        assert grid.height < tall[1] / 3
    txt2img("cat", "--seed", 1, "--n_samples", 4, "--skip_grid")
    txt2img("cat", "--seed", 1)
    assert len(list((tmp_path / FOLDER).glob("grid_*"))) == 2


def test_skip_save_writes_nothing_and_prints_the_time(txt2img: Any, tmp_path: Path) -> None:
    _, output = txt2img("cat", "--seed", 1, "--n_samples", 2, "--skip_save")
    assert "2 images in" in output
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("name", "pillow_format"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_formats(txt2img: Any, tmp_path: Path, name: str, pillow_format: str) -> None:
    images, _ = txt2img("cat", "--seed", 1, "--format", name)
    (file,) = images
    with Image.open(tmp_path / FOLDER / file) as image:
        assert (image.format, image.size) == (pillow_format, (16, 16))
    assert images[file]["prompt"] == "cat"


def test_no_metadata(txt2img: Any) -> None:
    for name in ("png", "jpg", "webp"):
        images, _ = txt2img("cat", "--seed", 1, "--format", name, "--no-metadata")
    assert list(images.values()) == [{}, {}, {}]


def test_prompts_from_a_file_keep_their_order(txt2img: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("zebra\n\napple\nmango\n")
    images, _ = txt2img("--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--seed", 1)
    assert [settings["prompt"] for settings in images.values()] == [
        "zebra",
        "zebra",
        "apple",
        "apple",
        "mango",
        "mango",
    ]
    assert [settings["seed"] for settings in images.values()] == [1, 2, 3, 4, 5, 6]


def test_invalid_line_of_a_file_is_skipped(txt2img: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\na:0 b:0\ndog\n")
    images, output = txt2img("--from-file", tmp_path / "prompts.txt", "--seed", 1, expect=3)
    assert [settings["prompt"] for settings in images.values()] == ["cat", "dog"]
    assert "row 2 (line 2) cannot be generated: column prompt = 'a:0 b:0': the prompt's weights sum to 0" in output


def test_execution_options_do_not_change_the_image(txt2img: Any, tmp_path: Path) -> None:
    (plain,), _ = txt2img("cat", "--seed", 1)
    for arguments in (["--turbo"], ["--unet_bs", "1"], ["--precision", "full"], ["--device", "cpu"]):
        images, _ = txt2img("cat", "--seed", 1, *arguments)
        expected, actual = (pixels(tmp_path / FOLDER / name).astype(int) for name in (plain, max(images)))
        assert np.abs(expected - actual).max() <= 1, arguments


def test_latent_channels_and_factor_must_match_the_model(txt2img: Any) -> None:
    txt2img("cat", "--C", 4, "--f", 2)
    assert "f = 8: it is 2 with this model, and cannot be chosen (random 16)" in txt2img("cat", "--f", 8, expect=2)[1]
    assert "C = 3: it is 4 with this model" in txt2img("cat", "--C", 3, expect=2)[1]


def test_long_prompts_are_encoded_in_full(txt2img: Any, tmp_path: Path) -> None:
    long = " ".join(["apple"] * 30)
    txt2img(long, "--seed", 1)
    images, _ = txt2img(long, "--seed", 1, "--long-prompts")
    truncated, full = images.values()
    assert (truncated["made"]["n_tokens"], truncated["made"]["truncated"]) == (30, " ".join(["apple"] * 8))
    assert (full["made"]["n_tokens"], full["made"]["truncated"]) == (30, None)
    assert truncated["image_id"] != full["image_id"]


# submit, plan, status and export


def test_max_batch_combines_rows(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": f"p{number}", "seed": number, "scale": 2 + number} for number in range(5)]
    write_csv(tmp_path / "m.csv", rows)
    jobs = []
    for name, options in (("alone", []), ("mixed", ["--max-batch", 3])):
        done = run_here("submit", "m.csv", "--model", tiny_model, "--inline", "-o", name, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        jobs.append(check_whole(tmp_path / name, 5))
    assert [row["image_id"] for row in jobs[0]] == [row["image_id"] for row in jobs[1]]
    started = [row["started_at"] for row in jobs[1]]
    assert len(set(started[:3])) == len(set(started[3:])) == 1
    for alone, mixed in zip(*jobs, strict=True):
        difference = pixels(tmp_path / "alone" / alone["file_name"]).astype(int) - pixels(
            tmp_path / "mixed" / mixed["file_name"]
        )
        assert np.abs(difference).max() <= 1


def test_resumed_job_keeps_its_image_format(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 3}])
    common = ["submit", "m.csv", "--model", tiny_model, "--inline", "--seed", 1]
    assert run_here(*common, "--format", "webp", "--limit", 1, cwd=tmp_path).returncode == 0
    refused = run_here(*common, "--format", "png", cwd=tmp_path)
    assert refused.returncode == 2
    assert "format: webp in the job, png now" in refused.stderr
    assert run_here(*common, cwd=tmp_path).returncode == 0
    rows = check_whole(tmp_path / "outputs" / "m", 3)
    assert [row["file_name"][-5:] for row in rows] == [".webp"] * 3


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_images_without_a_row_are_adopted_by_their_metadata(tmp_path: Path, tiny_model: Path, name: str) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 2}])
    common = ["submit", "m.csv", "--model", tiny_model, "--inline", "--seed", 1, "--format", name]
    run_here(*common, cwd=tmp_path)
    job = tmp_path / "outputs" / "m"
    before = check_whole(job, 2)
    (job / "results.parquet").unlink()
    run_here(*common, cwd=tmp_path)
    after = check_whole(job, 2)
    assert [row["sha256"] for row in before] == [row["sha256"] for row in after]
    assert [row["denoise_s"] for row in after] == [None, None]  # adopted: files do not store times


def test_skip_save_in_a_job(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 2}])
    done = run_here("submit", "m.csv", "--model", tiny_model, "--inline", "--skip_save", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No image was written" in done.stdout
    rows = read_results(tmp_path / "outputs" / "m")
    assert [(row["status"], row["file_name"]) for row in rows] == [("ok", None)] * 2
    assert not (tmp_path / "outputs" / "m" / "images").exists()


def test_job_without_contact_sheet(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\n")
    common = ["submit", "--from-file", "prompts.txt", "--model", tiny_model, "--inline"]
    run_here(*common, "--skip_grid", cwd=tmp_path)
    assert not (tmp_path / "outputs" / "prompts" / "contact_sheet.png").exists()
    run_here(*common, cwd=tmp_path)
    assert (tmp_path / "outputs" / "prompts" / "contact_sheet.png").exists()


def test_status_of_an_image(txt2img: Any, tmp_path: Path) -> None:
    images, _ = txt2img("--prompt", "red apple", "--seed", 7, "--format", "jpg", "--sampler", "heun")
    done = run_here("status", "--image", FOLDER / next(iter(images)), cwd=tmp_path)
    assert done.returncode == 0
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (shown["prompt"], shown["seed"], shown["sampler"]) == ("red apple", "7", "heun")
    assert shown["image_id"] == images["seed_7_00001.jpg"]["image_id"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "m.csv", [
        {"prompt": "tabby cat:0.25 white duck:0.75 hybrid", "seed": "1", "n_samples": "2", "artst": "x"},
        {"prompt": " ".join(["apple"] * 30), "seed": "", "n_samples": "", "artst": ""},
        {"prompt": "cat", "seed": "x", "n_samples": "", "artst": ""},
        {"prompt": "=1+1", "seed": "9", "n_samples": "", "artst": "-2"},
    ])  # fmt: skip


def test_plan_reports_rows_tokens_and_batches(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    done = run_here("plan", "m.csv", "--model", tiny_model, cwd=tmp_path)
    assert done.returncode == 3
    assert "tabby cat (0.125) + white duck (0.375) + hybrid (0.5)" in done.stdout
    assert "row 3 (line 4) cannot be generated: column seed = 'x': a whole number was expected" in done.stdout
    assert "30 in the longest prompt, the model's limit is 22; 1 row will be truncated" in done.stdout
    assert "truncated: " + " ".join(["apple"] * 8) in done.stdout
    assert "4 in 3 batches" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv"]


def test_plan_as_json(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    done = run_here("plan", "m.csv", "--model", tiny_model, "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    counts = [plan[key] for key in ("rows", "invalid_rows", "images", "weighted_rows", "cut_rows")]
    assert counts == [4, 1, 4, 1, 1]
    assert plan["faults"] == {"3": "line 4: column seed = 'x': a whole number was expected"}
    assert plan["carried_columns"] == ["artst"]
    assert 0 < plan["disk_bytes"] < plan["free_bytes"]


def test_plan_counts_generated_images(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    run_here("submit", "m.csv", "--model", tiny_model, "--inline", "--limit", 1, cwd=tmp_path)
    done = run_here("plan", "m.csv", "--model", tiny_model, cwd=tmp_path)
    assert "4 in 3 batches; 1 are already generated" in done.stdout


def test_plan_and_dry_run_report_memory_of_each_stage(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    planned = run_here("plan", "m.csv", "--model", tiny_model, "--device", "cpu", cwd=tmp_path).stdout
    assert "for 2 images of 16x16 at a time (float32 on cpu)" in " ".join(planned.split())
    dry_run = "txt2img", "cat", "--dry-run", "--model", tiny_model, "--device"
    tight = run_here(*dry_run, "cpu", "--vram-budget", "1MB", cwd=tmp_path).stdout
    assert re.search(r"UNet +\d+ kB: .+ of weights resident, the rest streamed through \d+ kB", tight)
    gpu = run_here(*dry_run, "cuda", "--vram-budget", "900MB", cwd=tmp_path).stdout
    assert "float16 on cuda" in gpu
    assert "359 MB assumed for CUDA and its libraries" in gpu
    too_small = run_here(*dry_run, "cpu", "--vram-budget", "300kB", cwd=tmp_path)
    assert too_small.returncode == 2
    assert "vram_budget = 0.3 MB: generating 16x16 takes at least" in too_small.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv"]


def test_plan_warns_about_a_full_disk(
    manifest: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinysd_batch.report.plan.job_plan.BYTES_PER_PIXEL", {"png": 1e15})
    done = run_here("plan", "m.csv", "--model", tiny_model, cwd=tmp_path)
    assert done.returncode == 5
    assert "free: not enough" in done.stdout


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_export(manifest: Path, tmp_path: Path, tiny_model: Path, suffix: str) -> None:
    run_here("submit", "m.csv", "--model", tiny_model, "--inline", cwd=tmp_path)
    done = run_here("export", "outputs/m", f"table.{suffix}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 rows" in done.stdout
    text = (tmp_path / f"table.{suffix}").read_text(encoding="utf-8")
    if suffix == "jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["prompt"] for row in rows][-1] == "=1+1"
    else:
        assert len(text.splitlines()) == 6
        assert "'=1+1" in text
        assert ("," if suffix == "csv" else "\t") + '"\'-2"' in text
