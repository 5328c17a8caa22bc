"""Every option of the origin's script, and of ours, does what it says."""

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
from tinysd_batch.cli.options import SETTING_OPTIONS
from tinysd_batch.config import Settings
from tinysd_batch.images import read_metadata

FOLDER = Path("outputs/txt2img-samples")


@pytest.fixture
def draw(tmp_path: Path, tiny_model: Path) -> Any:
    """`txt2img` with the tiny model: the pictures' metadata by file name, and what was printed."""

    def txt2img(*arguments: object, expect: int = 0) -> tuple[dict[str, dict[str, Any]], str]:
        done = run_here("txt2img", "--ckpt", tiny_model, *arguments, cwd=tmp_path)
        assert done.returncode == expect, done.stderr
        pictures = sorted((tmp_path / FOLDER).glob("seed_*"))
        return {path.name: read_metadata(path.read_bytes())[1] for path in pictures}, done.stdout + done.stderr

    return txt2img


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# The origin's own commands and options


def test_the_origins_command(draw: Any) -> None:
    prompt = "A peaceful lakeside cabin with a dock, surrounded by tall pine trees and a clear blue sky"
    pictures, _ = draw("--prompt", prompt, "--H", 64, "--W", 32, "--seed", 27)
    (made,) = pictures.values()
    assert list(pictures) == ["seed_27_00001.png"]
    assert (made["prompt"], made["height"], made["width"], made["seed"]) == (prompt, 64, 32, 27)


def test_nothing_is_written_beside_the_pictures(draw: Any, tmp_path: Path) -> None:
    draw("cat", "--seed", 1)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        (FOLDER / "seed_1_00001.png").as_posix()
    ]


def test_the_users_choice_of_cards_stands(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    draw("cat")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_weighted_prompts_need_no_quotes(draw: Any) -> None:
    pictures, _ = draw("--prompt", "tabby", "cat:0.25", "white", "duck:0.75", "hybrid", "--seed", 1)
    (made,) = pictures.values()
    assert made["prompt"] == "tabby cat:0.25 white duck:0.75 hybrid"
    assert made["made"]["n_tokens"] > 5  # the weights are none


def test_the_seed_is_random_printed_and_kept(draw: Any) -> None:
    draw("cat")
    pictures, told = draw("cat")
    seeds = [made["seed"] for made in pictures.values()]
    assert len(set(seeds)) == 2
    assert f"seed {seeds[0]}" in told or f"seed {seeds[1]}" in told


def test_a_second_run_numbers_on_even_after_deletions(draw: Any, tmp_path: Path) -> None:
    draw("cat", "--seed", 5, "--n_samples", 3)
    (tmp_path / FOLDER / "seed_5_00001.png").unlink()
    pictures, _ = draw("cat", "--seed", 5)
    assert list(pictures) == ["seed_5_00004.png", "seed_6_00002.png", "seed_7_00003.png"]


def test_the_55th_picture_is_called_as_the_origin_says(draw: Any, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "seed_9_00054.jpg").touch()
    pictures, _ = draw("cat", "--seed", 1234)
    assert "seed_1234_00055.png" in pictures


def test_n_iter_times_n_samples(draw: Any) -> None:
    pictures, _ = draw("cat", "--n_iter", 2, "--n_samples", 3, "--seed", 10)
    assert [made["seed"] for made in pictures.values()] == [10, 11, 12, 13, 14, 15]


def test_what_decides_the_picture(draw: Any, tmp_path: Path) -> None:
    plain, _ = draw("cat (dog)", "--seed", 1)
    for number, (option, value, name, kept) in enumerate(
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
        pictures, _ = draw("cat (dog)", "--seed", 1, option, value)
        file = f"seed_1_{number:05d}.png"
        assert pictures[file][name] == kept
        one, other = (pixels(tmp_path / FOLDER / each) for each in (*plain, file))
        assert not np.array_equal(one, other), option


def test_ddim_eta(draw: Any, tmp_path: Path) -> None:
    for eta in (0, 0.9):
        pictures, _ = draw("cat", "--seed", 1, "--sampler", "ddim", "--ddim_eta", eta, "--steps", 4)
    assert [made["eta"] for made in pictures.values()] == [0, 0.9]
    one, other = (pixels(tmp_path / FOLDER / name) for name in pictures)
    assert not np.array_equal(one, other)


def test_fixed_code_starts_all_pictures_alike(draw: Any, tmp_path: Path) -> None:
    free, _ = draw("cat", "--seed", 1, "--n_samples", 2)
    fixed, _ = draw("cat", "--seed", 1, "--n_samples", 2, "--fixed_code")
    first, second = (pixels(tmp_path / FOLDER / name) for name in free)
    assert not np.array_equal(first, second)
    third, fourth = (pixels(tmp_path / FOLDER / name) for name in ("seed_1_00003.png", "seed_2_00004.png"))
    assert np.array_equal(first, third)
    assert np.abs(third.astype(int) - fourth).max() <= 1
    assert fixed["seed_1_00003.png"]["image_id"] == free["seed_1_00001.png"]["image_id"]


def test_a_grid_its_rows_and_none(draw: Any, tmp_path: Path) -> None:
    _, told = draw("cat", "--seed", 1, "--n_samples", 4, "--n_rows", 4)
    assert "grid_00001.png" in told
    with Image.open(tmp_path / FOLDER / "grid_00001.png") as grid:
        tall = grid.size
    draw("cat", "--seed", 1, "--n_samples", 4, "--n_rows", 1)
    with Image.open(tmp_path / FOLDER / "grid_00005.png") as grid:
        assert grid.width > 3 * tall[0]
        assert grid.height < tall[1] / 3
    draw("cat", "--seed", 1, "--n_samples", 4, "--skip_grid")
    draw("cat", "--seed", 1)
    assert len(list((tmp_path / FOLDER).glob("grid_*"))) == 2


def test_skip_save_writes_nothing_and_says_how_long_it_took(draw: Any, tmp_path: Path) -> None:
    _, told = draw("cat", "--seed", 1, "--n_samples", 2, "--skip_save")
    assert "2 images in" in told
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_formats(draw: Any, tmp_path: Path, name: str, kind: str) -> None:
    pictures, _ = draw("cat", "--seed", 1, "--format", name)
    (file,) = pictures
    with Image.open(tmp_path / FOLDER / file) as image:
        assert (image.format, image.size) == (kind, (16, 16))
    assert pictures[file]["prompt"] == "cat"


def test_no_metadata(draw: Any) -> None:
    for name in ("png", "jpg", "webp"):
        pictures, _ = draw("cat", "--seed", 1, "--format", name, "--no-metadata")
    assert list(pictures.values()) == [{}, {}, {}]


def test_prompts_from_a_file_in_its_order(draw: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("zebra\n\napple\nmango\n")
    pictures, _ = draw("--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--seed", 1)
    assert [made["prompt"] for made in pictures.values()] == ["zebra", "zebra", "apple", "apple", "mango", "mango"]
    assert [made["seed"] for made in pictures.values()] == [1, 2, 3, 4, 5, 6]


def test_a_bad_line_of_the_file_costs_that_line(draw: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\na:0 b:0\ndog\n")
    pictures, told = draw("--from-file", tmp_path / "prompts.txt", "--seed", 1, expect=3)
    assert [made["prompt"] for made in pictures.values()] == ["cat", "dog"]
    assert "row 2 (line 2) cannot be generated: column prompt = 'a:0 b:0': the prompt's weights sum to 0" in told


def test_how_the_work_is_done_changes_no_picture(draw: Any, tmp_path: Path) -> None:
    (plain,), _ = draw("cat", "--seed", 1)
    for arguments in (["--turbo"], ["--unet_bs", "1"], ["--precision", "full"], ["--device", "cpu"]):
        pictures, _ = draw("cat", "--seed", 1, *arguments)
        one, other = (pixels(tmp_path / FOLDER / name).astype(int) for name in (plain, max(pictures)))
        assert np.abs(one - other).max() <= 1, arguments


def test_latent_channels_and_factor_are_the_models(draw: Any) -> None:
    draw("cat", "--C", 4, "--f", 2)
    assert "f = 8: with the model random 16 it is 2, and cannot be chosen" in draw("cat", "--f", 8, expect=2)[1]
    assert "C = 3: with the model random 16 it is 4" in draw("cat", "--C", 3, expect=2)[1]


def test_long_prompts_are_read_to_the_end(draw: Any, tmp_path: Path) -> None:
    long = " ".join(["apple"] * 30)
    draw(long, "--seed", 1)
    pictures, _ = draw(long, "--seed", 1, "--long-prompts")
    cut, whole = pictures.values()
    assert (cut["made"]["n_tokens"], cut["made"]["truncated"]) == (30, " ".join(["apple"] * 8))
    assert (whole["made"]["n_tokens"], whole["made"]["truncated"]) == (30, None)
    assert cut["image_id"] != whole["image_id"]


def test_every_setting_can_be_set_by_an_option() -> None:
    """Some are submit's own."""
    own = {"workers", "inline", "address", "worker_wait", "strict"}
    assert set(SETTING_OPTIONS) | own == set(Settings.model_fields)
    assert not set(SETTING_OPTIONS) & own


# submit, plan, status and export


def test_rows_share_batches_when_told_to(tmp_path: Path, tiny_model: Path) -> None:
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
    for one, other in zip(*jobs, strict=True):
        difference = pixels(tmp_path / "alone" / one["file_name"]).astype(int) - pixels(
            tmp_path / "mixed" / other["file_name"]
        )
        assert np.abs(difference).max() <= 1


def test_submit_in_another_format_resumes_and_does_not_mix(tmp_path: Path, tiny_model: Path) -> None:
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
def test_pictures_without_a_row_are_adopted_by_what_is_written_inside(
    tmp_path: Path, tiny_model: Path, name: str
) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 2}])
    common = ["submit", "m.csv", "--model", tiny_model, "--inline", "--seed", 1, "--format", name]
    run_here(*common, cwd=tmp_path)
    job = tmp_path / "outputs" / "m"
    before = check_whole(job, 2)
    (job / "results.parquet").unlink()
    run_here(*common, cwd=tmp_path)
    after = check_whole(job, 2)
    assert [row["sha256"] for row in before] == [row["sha256"] for row in after]
    assert [row["denoise_s"] for row in after] == [None, None]  # adopted: the files do not hold it


def test_skip_save_in_a_job(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 2}])
    done = run_here("submit", "m.csv", "--model", tiny_model, "--inline", "--skip_save", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No image was written" in done.stdout
    rows = read_results(tmp_path / "outputs" / "m")
    assert [(row["status"], row["file_name"]) for row in rows] == [("ok", None)] * 2
    assert not (tmp_path / "outputs" / "m" / "images").exists()


def test_a_job_without_contact_sheet(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "prompts.txt").write_text("cat\n")
    common = ["submit", "--from-file", "prompts.txt", "--model", tiny_model, "--inline"]
    run_here(*common, "--skip_grid", cwd=tmp_path)
    assert not (tmp_path / "outputs" / "prompts" / "contact_sheet.png").exists()
    run_here(*common, cwd=tmp_path)
    assert (tmp_path / "outputs" / "prompts" / "contact_sheet.png").exists()


def test_status_of_a_picture(draw: Any, tmp_path: Path) -> None:
    pictures, _ = draw("--prompt", "red apple", "--seed", 7, "--format", "jpg", "--sampler", "heun")
    done = run_here("status", "--image", FOLDER / next(iter(pictures)), cwd=tmp_path)
    assert done.returncode == 0
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (told["prompt"], told["seed"], told["sampler"]) == ("red apple", "7", "heun")
    assert told["image_id"] == pictures["seed_7_00001.jpg"]["image_id"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "m.csv", [
        {"prompt": "tabby cat:0.25 white duck:0.75 hybrid", "seed": "1", "n_samples": "2", "artst": "x"},
        {"prompt": " ".join(["apple"] * 30), "seed": "", "n_samples": "", "artst": ""},
        {"prompt": "cat", "seed": "x", "n_samples": "", "artst": ""},
        {"prompt": "=1+1", "seed": "9", "n_samples": "", "artst": "-2"},
    ])  # fmt: skip


def test_plan_says_what_submit_would_do(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    done = run_here("plan", "m.csv", "--model", tiny_model, cwd=tmp_path)
    assert done.returncode == 3
    assert "tabby cat (0.125) + white duck (0.375) + hybrid (0.5)" in done.stdout
    assert "row 3 (line 4) cannot be generated: column seed = 'x': a whole number was expected" in done.stdout
    assert "30 in the longest prompt, the model's limit is 22; 1 row will be truncated" in done.stdout
    assert "truncated: " + " ".join(["apple"] * 8) in done.stdout
    assert "4 in 3 batches" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv"]


def test_plan_for_machines(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    done = run_here("plan", "m.csv", "--model", tiny_model, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert (told["rows"], told["invalid_rows"], told["images"], told["weighted_rows"], told["cut_rows"]) == (
        4,
        1,
        4,
        1,
        1,
    )
    assert told["faults"] == {"3": "line 4: column seed = 'x': a whole number was expected"}
    assert told["carried_columns"] == ["artst"]
    assert 0 < told["disk_bytes"] < told["free_bytes"]


def test_plan_counts_what_is_there_already(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    run_here("submit", "m.csv", "--model", tiny_model, "--inline", "--limit", 1, cwd=tmp_path)
    done = run_here("plan", "m.csv", "--model", tiny_model, cwd=tmp_path)
    assert "4 in 3 batches; 1 are already generated" in done.stdout


def test_plan_and_a_dry_run_tell_the_memory_of_each_phase(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    planned = run_here("plan", "m.csv", "--model", tiny_model, "--device", "cpu", cwd=tmp_path).stdout
    assert "for 2 images of 16x16 at a time (float32 on cpu)" in " ".join(planned.split())
    rehearsal = "txt2img", "cat", "--dry-run", "--model", tiny_model, "--device"
    tight = run_here(*rehearsal, "cpu", "--vram-budget", "1MB", cwd=tmp_path).stdout
    assert re.search(r"UNet +\d+ kB: .+ of weights resident, the rest streamed through \d+ kB", tight)
    card = run_here(*rehearsal, "cuda", "--vram-budget", "900MB", cwd=tmp_path).stdout
    assert "float16 on cuda" in card
    assert "359 MB assumed for CUDA and its libraries" in card
    none = run_here(*rehearsal, "cpu", "--vram-budget", "300kB", cwd=tmp_path)
    assert none.returncode == 2
    assert "vram_budget = 0.3 MB: generating 16x16 takes at least" in none.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv"]


def test_plan_warns_of_a_full_disk(
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
