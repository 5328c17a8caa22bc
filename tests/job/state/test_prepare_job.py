"""`submit JOBFOLDER`, or `submit` of its manifest without options, resumes a job with its own settings."""

import json
import os
import shlex
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.jobs import check_whole, read_results
from tests.support.program import run_here


def submit(here: Path, *words: object, command: str = "submit") -> CompletedProcess[str]:
    return run_here(command, *words, cwd=here)


@pytest.fixture
def job(here: Path, tiny_model: Path) -> Path:
    """A job with two of four images, generated with settings that are not the defaults."""
    (here / "m.csv").write_text("prompt\ncat\nowl\nfox\nbee\n")
    model = os.path.relpath(tiny_model, here)
    started = submit(here, "m.csv", "-o", "a b", "--model", model, "--sampler", "ddim", "--steps", 3, "--scale", 1.5,
                   "--seed", 100, "--inline", "--format", "jpg", "--limit", 2, "--vram-budget", "500MB")  # fmt: skip
    assert started.returncode == 0, started.stderr
    assert "2 images left beyond --limit. To resume:\n  tinysd-batch submit 'a b'\n" in started.stdout
    return here / "a b"


@pytest.mark.parametrize("words", [["a b"], ["a b/"], ["m.csv", "-o", "a b"], ["a b", "-o", "a b"]])
def test_a_job_is_resumed_with_its_own_settings(here: Path, job: Path, words: list[str]) -> None:
    planned = submit(here, *words, "--json", command="plan")
    assert (json.loads(planned.stdout)["images"], json.loads(planned.stdout)["finished"]) == (4, 2)
    done = submit(here, *words)
    assert done.returncode == 0, done.stderr
    rows = check_whole(job, 4)
    assert {(row["steps"], row["scale"], row["sampler"]) for row in rows} == {(3, 1.5, "ddim")}
    assert [row["seed"] for row in rows] == [100, 101, 102, 103]
    assert {row["worker"] for row in rows} == {"inline"}
    assert json.loads((job / "job.json").read_text())["settings"]["vram_budget"] == "500MB"


def test_the_printed_command_works_from_any_folder(
    here: Path, job: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = submit(elsewhere, job, "--limit", 3)
    line = done.stdout.partition("To resume:\n")[2].splitlines()[0]
    program, *words = shlex.split(line)
    assert program == "tinysd-batch"
    assert run_here(*words, cwd=elsewhere).returncode == 0
    check_whole(job, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", 4], "steps: 3 in the job, 4 now"),
        (["--seed", 7], "seed: 100 in the job, 7 now"),
        (["--preset", "p.toml"], "scale: 1.5 in the job, 2.0 now"),
        (["--format", "png"], "format: jpg in the job, png now"),
        (["--model", "embedded"], "the weights differ"),
        (["-o", "other"], "is a job folder, and -o other another one"),
    ],
)
def test_an_option_that_differs_from_the_job_is_refused(
    here: Path, job: Path, flags: list[object], message: str
) -> None:
    (here / "p.toml").write_text("scale = 2.0\n")
    refused = submit(here, "a b", *flags)
    assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    assert len(read_results(job)) == 2


def test_a_job_file_that_differs_from_the_job_is_refused(here: Path, job: Path) -> None:
    (here / "job.toml").write_text('manifest = "m.csv"\noutput = "a b"\nsteps = 9\n')
    assert "steps: 3 in the job, 9 now" in submit(here, "job.toml").stderr
    (here / "job.toml").write_text('manifest = "m.csv"\noutput = "a b"\n')
    assert submit(here, "job.toml").returncode == 0
    check_whole(job, 4)


@pytest.mark.parametrize("steps", ["nan", '"None"', '" "'])
def test_an_empty_setting_in_a_job_file_keeps_that_of_the_job(here: Path, job: Path, steps: str) -> None:
    (here / "job.toml").write_text(f'manifest = "m.csv"\noutput = "a b"\nsteps = {steps}\nseed = -1\n')
    planned = submit(here, "job.toml", "--json", command="plan")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["finished"] == 2


def test_a_saved_setting_that_is_no_longer_valid_can_be_replaced(here: Path, job: Path) -> None:
    saved = json.loads((job / "job.json").read_text())
    saved["settings"] |= {"inline": False, "address": "ray://head:10001"}
    (job / "job.json").write_text(json.dumps(saved))
    refused = submit(here, "a b", command="plan")
    assert refused.returncode == 2
    assert "job.json: settings: address = 'ray://head:10001'" in refused.stderr
    assert submit(here, "a b", "--address", "local", command="plan").returncode == 0


def test_settings_that_do_not_affect_pixels_may_change(here: Path, job: Path) -> None:
    done = submit(here, "a b", "--vram-budget", "600MB", "--max-batch", 2)
    assert done.returncode == 0, done.stderr
    settings = json.loads((job / "job.json").read_text())["settings"]
    assert (settings["vram_budget"], settings["max_batch"], settings["inline"]) == ("600MB", 2, True)


def test_a_given_address_replaces_the_inline_setting_of_the_job(here: Path, job: Path) -> None:
    """The job was started with --inline, which contradicts an address."""
    refused = submit(here, "a b", "--address", "127.0.0.1:9")
    assert refused.returncode == 6, refused.stderr
    assert "no cluster answers there" in refused.stderr
    assert submit(here, "a b", "--address", "local", "--inline").returncode == 0
    check_whole(job, 4)


def test_a_job_without_images_may_be_started_with_other_settings(here: Path, tiny_model: Path) -> None:
    """The first run could not join its cluster and generated nothing, so settings and rows may change."""
    failed = submit(here, "m.csv", "--model", tiny_model, "--steps", 5, "--address", "127.0.0.1:9")
    assert failed.returncode == 6
    assert submit(here, "m.csv", "--model", tiny_model, "--steps", 2, "--inline").returncode == 0
    assert [row["steps"] for row in check_whole(here / "outputs" / "m", 1)] == [2]


def test_a_job_folder_whose_manifest_was_deleted_is_refused(here: Path, job: Path) -> None:
    (here / "m.csv").unlink()
    refused = submit(here, "a b")
    assert (refused.returncode, "m.csv: no such file" in refused.stderr) == (2, True)


def test_the_printed_command_for_a_folder_that_looks_like_an_option(here: Path, tiny_model: Path) -> None:
    (here / "m.csv").write_text("prompt\ncat\nowl\n")
    started = submit(here, "m.csv", "-o", "-x", "--model", tiny_model, "--inline", "--limit", 1)
    assert "tinysd-batch submit ./-x\n" in started.stdout
    done = submit(here, "./-x")
    assert done.returncode == 0, done.stderr
    check_whole(here / "-x", 2)
