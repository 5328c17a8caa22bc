"""What `plan` says of many rows, and of many images a row (case 42), and what it says first (case 35)."""

import io
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.files import write_csv
from tests.support.jobs import draw
from tests.support.program import run_here
from tinysd_batch.config import Settings
from tinysd_batch.errors import UsageError
from tinysd_batch.job.plan import image_id
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.model.checkpoint.info import read_model_info
from tinysd_batch.model.text.tokenizer import count_tokens
from tinysd_batch.records import InvalidRow
from tinysd_batch.report import reading_progress
from tinysd_batch.report.plan import token_counts
from tinysd_batch.report.plan.job_plan import make_plan
from tinysd_batch.report.plan.memory_process import estimate_memory_in_subprocess, read_response
from tinysd_batch.report.plan.memory_table import MemoryEstimate, PlannedBatch, StageMemory, estimate_memory
from tinysd_batch.report.plan.plan_summary import format_memory_fit, read_model_quality
from tinysd_batch.report.plan.plan_text import PlanPrinter
from tinysd_batch.report.plan.token_counts import PromptTokenCounter
from tinysd_batch.report.quality_text import describe_quality
from tinysd_batch.report.reading_progress import ReadingProgress


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def test_images_are_counted_without_making_one(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_id(**_: object) -> str:
        raise AssertionError("an id was computed")

    monkeypatch.setattr("tinysd_batch.job.plan.batches.compute_image_id", no_id)
    (tmp_path / "m.csv").write_text("prompt,n_samples\n" + "red apple,4\n" * 1000)
    started = time.process_time()
    done = run_here("plan", "m.csv", "--model", tiny_model, "--n_iter", "25000", "--skip_save", cwd=tmp_path)
    assert time.process_time() - started < 20
    assert "100,000,000 in 25,000,000 batches" in done.stdout, done.stderr
    assert image_id.compute_image_id is not no_id


def test_ids_are_computed_where_a_job_is_reused(tmp_path: Path, tiny_model: Path) -> None:
    old = write_csv(tmp_path / "old.csv", [{"prompt": "cat", "seed": 1}, {"prompt": "dog", "seed": 2}])
    draw(old, tmp_path / "old", tiny_model)
    write_csv(tmp_path / "new.csv", [{"prompt": "cat", "seed": 1}, {"prompt": "frog", "seed": 2}])
    done = run_here("plan", "new.csv", "--model", tiny_model, "--reuse", "old", cwd=tmp_path)
    assert "1 can be reused from" in line_of(done.stdout, "Images")


def test_a_prompt_is_counted_once(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative prompts, too; and more different ones than are remembered give the right numbers."""
    counted: list[str] = []

    def count_and_note(tokenizer: Any, texts: Sequence[str]) -> list[int]:
        counted.extend(texts)
        return count_tokens(tokenizer, texts)

    monkeypatch.setattr(token_counts, "count_tokens", count_and_note)
    rows = [{"prompt": f"cat {number % 700}", "negative_prompt": "blurry, low quality"} for number in range(2100)]
    manifest = write_csv(tmp_path / "m.csv", rows)
    job = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model)))
    found = list(PromptTokenCounter(job).count_rows(job.read_rows()))
    assert len(counted) == len(set(counted)) == 701
    monkeypatch.setattr(token_counts, "MAX_CACHED_PROMPTS", 10)
    assert [row.prompt for row in PromptTokenCounter(job).count_rows(job.read_rows())] == [row.prompt for row in found]


@pytest.mark.parametrize("syntax", ["seed", "a1111", "none"])
@pytest.mark.parametrize("long_prompts", [False, True])
def test_counts_are_what_the_text_encoder_gets(
    tmp_path: Path, tiny_model: Path, syntax: str, long_prompts: bool
) -> None:
    texts = [
        "red apple", "tabby cat:0.25 white duck:0.75 hybrid", "(a (b:1.2) c) [d]", "x" * 3000, "a, b: c",
        "é ü 猫 🐈 \uff46\uff55\uff4c\uff4c \uff11\uff0c", " ".join(["apple"] * 22), " ".join(["apple"] * 23),
        "<|endoftext|> cat", "Ĳ ﬁ a\u0301",
    ]  # fmt: skip
    manifest = write_csv(tmp_path / "m.csv", [{"prompt": text} for text in texts])
    settings = Settings(model=str(tiny_model), prompt_syntax=syntax, long_prompts=long_prompts)  # type: ignore[arg-type]
    job = open_job(manifest, tmp_path / "job", settings)
    reader = PromptTokenCounter(job)
    for row in reader.count_rows(job.read_rows()):
        assert not isinstance(row, InvalidRow)
        exact = reader.tokenize(row.row.prompt, syntax)
        assert (row.prompt.n_tokens, row.prompt.is_truncated) == (exact.n_tokens, exact.truncated is not None)


def test_a_row_is_a_line_of_the_terminal(tmp_path: Path, tiny_model: Path) -> None:
    """Case 44: a prompt of thousands of weighted parts was a line of 60 kB."""
    parts = " ".join(f"part {number}:1" for number in range(700))
    manifest = write_csv(tmp_path / "m.csv", [{"prompt": parts}, {"prompt": "cat " * 2000}])
    job = open_job(manifest, tmp_path / "job", Settings(model=str(tiny_model)))
    for terminal, most in ((True, 60), (False, 300)):
        console = Console(file=io.StringIO(), width=60, force_terminal=terminal)
        progress = ReadingProgress(console, "Reading")
        printer = PlanPrinter(console, True, progress)
        make_plan(job, printer.print_row, progress=progress)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(lines) == 2
        assert all(re.match(r"row \d: 1 image, \d,?\d+ tokens, truncated: ", line) for line in lines)
        assert all(len(line) <= most for line in lines)


def test_a_long_manifest_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_progress, "SHOW_AFTER_S", 0.02)
    monkeypatch.setattr(reading_progress, "PLAIN_LINE_INTERVAL_S", 0.02)
    for terminal in (False, True):
        console = Console(file=io.StringIO(), width=60, force_terminal=terminal, _environ={"TERM": "xterm"})
        with ReadingProgress(console, "Reading m.csv") as progress:
            progress.rows = 340_000
            time.sleep(0.2)
            with progress.hidden():
                console.print("a row")
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "Reading m.csv: 340,000 rows, elapsed 0:00" in text
        assert ("\x1b[2K" in text) is terminal  # the line is taken away again


def test_a_short_one_and_json_show_none(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    monkeypatch.setattr(reading_progress, "SHOW_AFTER_S", 0.0)
    done = run_here("plan", "m.csv", "--model", tiny_model, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    quiet = Console(file=io.StringIO(), quiet=True)
    with ReadingProgress(quiet, "Reading") as progress:
        assert not progress.thread.is_alive()


# Fits? How long? How good?


def test_the_first_lines_answer(tmp_path: Path, tiny_model: Path) -> None:
    manifest = write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 4}])
    before = run_here("plan", "m.csv", "--model", tiny_model, "-o", "new", cwd=tmp_path).stdout.splitlines()
    assert [line.split("  ")[0] for line in before[:4]] == ["Fits", "", "Takes", "Quality"]
    assert "yes: " in before[0]
    assert "--device cuda --vram-budget 4GB" in before[1]
    assert "not measured on this machine yet: submit with --limit 4" in before[2]
    assert "not measured" in before[3]
    draw(manifest, tmp_path / "old", tiny_model)
    after = run_here("plan", "m.csv", "--model", tiny_model, "-o", "new", cwd=tmp_path).stdout
    assert "for 4 images with 1 worker, at the speed of old" in line_of(after, "Takes")
    done = run_here("plan", "m.csv", "--model", tiny_model, "-o", "old", cwd=tmp_path).stdout
    assert "nothing is left to generate" in line_of(done, "Takes")
    other = run_here("plan", "m.csv", "--model", tiny_model, "-o", "new", "--width", "32", cwd=tmp_path).stdout
    assert "not measured" in line_of(other, "Takes")


def test_a_gpu_that_is_not_here(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    options = "--device", "cuda", "--vram-budget", "4GB"
    told = line_of(run_here("plan", "m.csv", "--model", tiny_model, *options, cwd=tmp_path).stdout, "Fits")
    assert re.search(r"yes: \d+ MB at most, within --vram-budget 4GB \(float16 on cuda, estimated", told)


@pytest.mark.parametrize(
    ("available", "budget", "told"),
    [
        (8 * 10**9, None, "yes: 5.0 GB at most, 8.0 GB available (float32 on cpu)"),
        (4 * 10**9, None, "no: 5.0 GB at most, 4.0 GB available (float32 on cpu); limit it with --vram-budget"),
        (None, None, "unknown: 5.0 GB at most (float32 on cpu); add --vram-budget 4GB for a GPU of 4 GB"),
        (None, "6GB", "yes: 5.0 GB at most, within --vram-budget 6GB (float32 on cpu)"),
    ],
)
def test_whether_it_fits(available: int | None, budget: str | None, told: str) -> None:
    phase = StageMemory("UNet", 5 * 10**9, 1, 1, 0, 1, 0, 0, None, 1, False, False, False)
    batch = PlannedBatch(1, 512, 512, True)
    memory = MemoryEstimate(batch, "cpu", "float32", budget, [phase], available_bytes=available)
    assert format_memory_fit(memory) == told


def test_the_embedded_model_says_how_good_it_is() -> None:
    quality = read_model_quality(read_model_info("embedded"))
    assert str(quality) == f"{describe_quality(30.93)} (PSNR 30.9 dB, level calib, at most 4.7 MB)"


@pytest.mark.parametrize(
    "report", ["", "[]", '{"median_picture_psnr_db": NaN}', '{"median_picture_psnr_db": true}', "{"]
)
def test_a_report_that_says_nothing_is_no_measurement(tmp_path: Path, tiny_model: Path, report: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report" / "report.json").write_text(report)
    assert read_model_quality(read_model_info(str(folder))).psnr_db is None


@pytest.mark.slow
def test_memory_is_planned_in_another_process_alike(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `plan` does where torch is not loaded: the same numbers, the same errors."""
    settings = Settings(model=str(tiny_model), height=16, width=16, steps=2, scale=2.0, device="cpu")
    batch = PlannedBatch(2, 16, 16, True)
    here = estimate_memory(settings, batch)
    monkeypatch.delitem(sys.modules, "torch")
    apart = estimate_memory_in_subprocess(settings, batch)
    assert replace(apart, available_bytes=None) == replace(here, available_bytes=None)


def test_errors_come_through_from_the_other_process() -> None:
    with pytest.raises(UsageError, match="vram_budget = 1 MB"):
        read_response({"error": "UsageError", "message": "vram_budget = 1 MB: too little"})


def test_judgements_are_in_order() -> None:
    assert len({describe_quality(psnr) for psnr in (40, 30, 24, 18, 5)}) == 5
    assert describe_quality(float("-inf")) == describe_quality(-3)


# The options of submit


def test_plan_takes_every_option_of_submit(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 3}, {"prompt": "dog", "n_samples": 3}])
    done = run_here(
        "plan", "m.csv", "--model", tiny_model, "--workers", 2, "--worker-wait", 5, "--limit", 4, "--retry-failed",
        "--take-over", "--address", "127.0.0.1:6379", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["images"], found["batches"], found["rows"]) == (4, 2, 2)
    assert not (tmp_path / "outputs").exists()
