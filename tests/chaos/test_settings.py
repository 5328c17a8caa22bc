"""Every setting that decides pixels gives the same files when the job is killed and resumed."""

import random
from pathlib import Path

import pytest

from tests.support.files import write_csv
from tests.support.jobs import check_whole
from tests.support.processes import sleep_part_of_an_image, start_submit, wait_for_images
from tests.support.program import run
from tests.support.settings import TELLING_PROMPT, TELLING_SETTINGS, get_other_value, make_settings
from tinysd_batch.settings.declaration import Effect
from tinysd_batch.settings.schema import COLUMN_SETTINGS, IMAGE_SETTINGS, SETTINGS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

COLUMNS = [name for name in IMAGE_SETTINGS if name in COLUMN_SETTINGS]
JOB_WIDE = [name for name, each in SETTINGS.items() if each.effect is Effect.PIXELS and name not in COLUMNS]
COPIES = 2  # of each row, which share a micro-batch
STEPS = 10


def write_rows(folder: Path, settings: list[str]) -> Path:
    """Write a manifest whose rows have each another value of one of these settings, or of none."""
    base = make_settings(**{**TELLING_SETTINGS, "steps": STEPS})
    row = {"prompt": TELLING_PROMPT, "seed": "", **dict.fromkeys(COLUMNS, ""), "steps": STEPS}
    changed = [{**row, name: get_other_value(IMAGE_SETTINGS[name], getattr(base, name))} for name in settings]
    return write_csv(folder / "m.csv", [each for each in [row, *changed] for _ in range(COPIES)])


def kill_and_resume(folder: Path, model: str, options: list[str]) -> list[str]:
    """Run the job whole, and again with two kills. Return the digests of its files, which are equal."""
    arguments = ["--max-batch", "4", "--inline", *options]
    whole = run("submit", "m.csv", "--model", model, "--seed", "1", "-o", "whole", *arguments, cwd=folder)
    assert whole.returncode == 0, whole.stderr
    seed = random.randrange(10**6)
    print(f"kill seed {seed}")
    killed = 0
    for goal in (1, 4):
        process = start_submit(folder, Path(model), *arguments)
        wait_for_images(folder / "job", goal, process)
        sleep_part_of_an_image(folder / "job", random.Random(seed))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    assert killed, "the job was too quick to be killed"
    last = run("submit", "m.csv", "--model", model, "--seed", "1", "-o", "job", *arguments, cwd=folder)
    assert last.returncode == 0, last.stderr
    images = len((folder / "m.csv").read_text().splitlines()) - 1
    digests = [[row["sha256"] for row in check_whole(folder / name, images)] for name in ("whole", "job")]
    assert digests[0] == digests[1]
    return digests[0]


def test_a_job_with_all_values_of_columns(tmp_path: Path) -> None:
    write_rows(tmp_path, COLUMNS)
    digests = kill_and_resume(tmp_path, "embedded", ["--seed", "1"])
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("name", JOB_WIDE)
def test_a_job_with_another_value_of_a_setting(tmp_path: Path, tiny_model: Path, name: str) -> None:
    write_rows(tmp_path, ["negative_prompt", "sampler", "scale"])
    if name == "model":
        kill_and_resume(tmp_path, str(tiny_model), [])
        return
    value = get_other_value(SETTINGS[name], getattr(make_settings(), name))
    flag = SETTINGS[name].list_flags()[0]
    kill_and_resume(tmp_path, "embedded", [flag] if value is True else [flag, str(value)])
