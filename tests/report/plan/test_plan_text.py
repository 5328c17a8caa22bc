"""The plan of many rows and of many images per row, and its summary."""

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
from tests.support.settings import make_settings
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


def test_images_are_counted_without_enumerating_them(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_id(**_: object) -> str:
        raise AssertionError("an image id was computed")

    monkeypatch.setattr("tinysd_batch.job.plan.batches.compute_image_id", no_id)
    (tmp_path / "m.csv").write_text("prompt,n_samples\n" + "red apple,4\n" * 1000)
    started = time.process_time()
    done = run_here("plan", "m.csv", "--model", tiny_model, "--n_iter", "25000", "--skip_save", cwd=tmp_path)
    assert time.process_time() - started < 20
    assert "100,000,000 in 25,000,000 batches" in done.stdout, done.stderr
    assert image_id.compute_image_id is not no_id


def test_ids_are_computed_when_a_job_is_reused(tmp_path: Path, tiny_model: Path) -> None:
    old = write_csv(tmp_path / "old.csv", [{"prompt": "cat", "seed": 1}, {"prompt": "dog", "seed": 2}])
    draw(old, tmp_path / "old", tiny_model)
    write_csv(tmp_path / "new.csv", [{"prompt": "cat", "seed": 1}, {"prompt": "frog", "seed": 2}])
    done = run_here("plan", "new.csv", "--model", tiny_model, "--reuse", "old", cwd=tmp_path)
    assert "1 can be reused from" in line_of(done.stdout, "Images")


def test_distinct_prompts_are_counted_once(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also negative prompts. More distinct prompts than the cache holds give the same counts."""
    counted: list[str] = []

    def count_and_record(tokenizer: Any, texts: Sequence[str]) -> list[int]:
        counted.extend(texts)
        return count_tokens(tokenizer, texts)

    monkeypatch.setattr(token_counts, "count_tokens", count_and_record)
    rows = [{"prompt": f"cat {number % 700}", "negative_prompt": "blurry, low quality"} for number in range(2100)]
    manifest = write_csv(tmp_path / "m.csv", rows)
    job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model)})
    counted_rows = list(PromptTokenCounter(job).count_rows(job.read_rows()))
    assert len(counted) == len(set(counted)) == 701
    monkeypatch.setattr(token_counts, "MAX_CACHED_PROMPTS", 10)
    assert [row.prompt for row in PromptTokenCounter(job).count_rows(job.read_rows())] == [
        row.prompt for row in counted_rows
    ]


@pytest.mark.parametrize("syntax", ["seed", "a1111", "none"])
@pytest.mark.parametrize("long_prompts", [False, True])
def test_token_counts_match_the_text_encoder_input(
    tmp_path: Path, tiny_model: Path, syntax: str, long_prompts: bool
) -> None:
    texts = [
        "red apple", "tabby cat:0.25 white duck:0.75 hybrid", "(a (b:1.2) c) [d]", "x" * 3000, "a, b: c",
        "é ü 猫 🐈 \uff46\uff55\uff4c\uff4c \uff11\uff0c", " ".join(["apple"] * 22), " ".join(["apple"] * 23),
        "<|endoftext|> cat", "Ĳ ﬁ a\u0301",
    ]  # fmt: skip
    manifest = write_csv(tmp_path / "m.csv", [{"prompt": text} for text in texts])
    settings = {"model": str(tiny_model), "prompt_syntax": syntax, "long_prompts": long_prompts}
    job = open_job(manifest, tmp_path / "job", settings)
    reader = PromptTokenCounter(job)
    for row in reader.count_rows(job.read_rows()):
        assert not isinstance(row, InvalidRow)
        exact = reader.tokenize(row.row.prompt, syntax)
        assert (row.prompt.n_tokens, row.prompt.is_truncated) == (exact.n_tokens, exact.truncated is not None)


def test_row_fits_one_line_of_the_terminal(tmp_path: Path, tiny_model: Path) -> None:
    """A prompt with thousands of weighted parts used to print a line of 60 kB."""
    parts = " ".join(f"part {number}:1" for number in range(700))
    manifest = write_csv(tmp_path / "m.csv", [{"prompt": parts}, {"prompt": "cat " * 2000}])
    job = open_job(manifest, tmp_path / "job", {"model": str(tiny_model)})
    for is_terminal, max_characters in ((True, 60), (False, 300)):
        console = Console(file=io.StringIO(), width=60, force_terminal=is_terminal)
        progress = ReadingProgress(console, "Reading")
        printer = PlanPrinter(console, True, progress)
        make_plan(job, printer.print_row, progress=progress)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(lines) == 2
        assert all(re.match(r"row \d: 1 image, \d,?\d+ tokens, truncated: ", line) for line in lines)
        assert all(len(line) <= max_characters for line in lines)


def test_long_manifest_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_progress, "SHOW_AFTER_S", 0.02)
    monkeypatch.setattr(reading_progress, "PLAIN_LINE_INTERVAL_S", 0.02)
    for is_terminal in (False, True):
        console = Console(file=io.StringIO(), width=60, force_terminal=is_terminal, _environ={"TERM": "xterm"})
        with ReadingProgress(console, "Reading m.csv") as progress:
            progress.rows = 340_000
            time.sleep(0.2)
            with progress.hidden():
                console.print("a row")
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "Reading m.csv: 340,000 rows, elapsed 0:00" in text
        assert ("\x1b[2K" in text) is is_terminal  # the line is removed again


def test_short_manifest_and_json_show_no_progress(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    monkeypatch.setattr(reading_progress, "SHOW_AFTER_S", 0.0)
    done = run_here("plan", "m.csv", "--model", tiny_model, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    quiet = Console(file=io.StringIO(), quiet=True)
    with ReadingProgress(quiet, "Reading") as progress:
        assert not progress.thread.is_alive()


# Fits? How long? How good?


def test_first_lines_summarize_the_plan(tmp_path: Path, tiny_model: Path) -> None:
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
    another_size = run_here("plan", "m.csv", "--model", tiny_model, "-o", "new", "--width", "32", cwd=tmp_path).stdout
    assert "not measured" in line_of(another_size, "Takes")


def test_plan_for_an_absent_gpu(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    options = "--device", "cuda", "--vram-budget", "4GB"
    line = line_of(run_here("plan", "m.csv", "--model", tiny_model, *options, cwd=tmp_path).stdout, "Fits")
    assert re.search(r"yes: \d+ MB at most, within --vram-budget 4GB \(float16 on cuda, estimated", line)


@pytest.mark.parametrize(
    ("available", "budget", "expected"),
    [
        (8 * 10**9, None, "yes: 5.0 GB at most, 8.0 GB available (float32 on cpu)"),
        (4 * 10**9, None, "no: 5.0 GB at most, 4.0 GB available (float32 on cpu); limit it with --vram-budget"),
        (None, None, "unknown: 5.0 GB at most (float32 on cpu); add --vram-budget 4GB for a GPU of 4 GB"),
        (None, "6GB", "yes: 5.0 GB at most, within --vram-budget 6GB (float32 on cpu)"),
    ],
)
def test_memory_fit(available: int | None, budget: str | None, expected: str) -> None:
    stage = StageMemory("UNet", 5 * 10**9, 1, 1, 0, 1, 0, 0, None, 1, False, False, False)
    batch = PlannedBatch(1, 512, 512, True)
    memory = MemoryEstimate(batch, "cpu", "float32", budget, [stage], available_bytes=available)
    assert format_memory_fit(memory) == expected


def test_quality_of_the_embedded_model() -> None:
    quality = read_model_quality(read_model_info("embedded"))
    assert str(quality) == f"{describe_quality(30.93)} (PSNR 30.9 dB, level calib, at most 4.7 MB)"


@pytest.mark.parametrize(
    "report", ["", "[]", '{"median_picture_psnr_db": NaN}', '{"median_picture_psnr_db": true}', "{"]
)
def test_report_without_a_valid_psnr(tmp_path: Path, tiny_model: Path, report: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report" / "report.json").write_text(report)
    assert read_model_quality(read_model_info(str(folder))).psnr_db is None


@pytest.mark.slow
def test_memory_estimate_in_a_subprocess_is_equal(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` uses a subprocess if torch is not imported: same numbers, same errors."""
    settings = make_settings(model=str(tiny_model), height=16, width=16, steps=2, scale=2.0, device="cpu")
    batch = PlannedBatch(2, 16, 16, True)
    expected = estimate_memory(settings, batch)
    monkeypatch.delitem(sys.modules, "torch")
    actual = estimate_memory_in_subprocess(settings, batch)
    assert replace(actual, available_bytes=None) == replace(expected, available_bytes=None)


def test_errors_of_the_subprocess_are_raised() -> None:
    with pytest.raises(UsageError, match="vram_budget = 1 MB"):
        read_response({"error": "UsageError", "message": "vram_budget = 1 MB: too little"})


def test_quality_descriptions_are_in_order() -> None:
    assert len({describe_quality(psnr) for psnr in (40, 30, 24, 18, 5)}) == 5
    assert describe_quality(float("-inf")) == describe_quality(-3)


# The options of submit


def test_plan_accepts_every_option_of_submit(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_samples": 3}, {"prompt": "dog", "n_samples": 3}])
    done = run_here(
        "plan", "m.csv", "--model", tiny_model, "--workers", 2, "--worker-wait", 5, "--limit", 4, "--retry-failed",
        "--take-over", "--address", "127.0.0.1:6379", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    assert (plan["images"], plan["batches"], plan["rows"]) == (4, 2, 2)
    assert not (tmp_path / "outputs").exists()
