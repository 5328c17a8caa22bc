"""Job status, run progress, and the contact sheet of a job."""

import io
import shutil
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.support.files import write_csv
from tests.support.jobs import draw, read_results
from tests.support.settings import make_image_settings
from tinysd_batch.job.dispatch.job_progress import InvalidRows
from tinysd_batch.job.workers.pool import WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status
from tinysd_batch.report.contact_sheet import CELL_PX, choose_columns, write_contact_sheet
from tinysd_batch.report.formatting import format_count, format_seconds, to_one_line
from tinysd_batch.report.progress_bar import RunProgressBar
from tinysd_batch.report.status import print_status, read_status


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("job")
    manifest = write_csv(folder / "m.csv", [{"prompt": "cat", "n_samples": 7}, {"prompt": "dog", "n_samples": "x"}])
    draw(manifest, folder / "job", tiny_model)
    return folder / "job"


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


def test_sheet_shows_every_image(job: Path) -> None:
    path = write_contact_sheet(job)
    assert path == job / "contact_sheet.png"
    with Image.open(path) as sheet:
        assert sheet.width >= 3 * CELL_PX
        assert sheet.height >= 2 * CELL_PX
        first = sheet.convert("RGB").crop((8, 8, 8 + CELL_PX, 8 + CELL_PX))
    with Image.open(job / read_results(job)[0]["file_name"]) as image:
        assert first.tobytes() == image.convert("RGB").resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS).tobytes()


def test_no_sheet_without_images(tmp_path: Path) -> None:
    assert write_contact_sheet(tmp_path) is None


@pytest.mark.parametrize(("n_images", "columns"), [(1, 1), (2, 2), (6, 3), (24, 6), (100, 13)])
def test_sheet_is_a_little_wider_than_high(n_images: int, columns: int) -> None:
    assert choose_columns(n_images) == columns


def test_status_shows_counts_speed_and_invalid_rows(job: Path) -> None:
    console = plain_console()
    print_status(job, read_status(job), console)
    text = text_of(console)
    assert "finished, model random 16" in text
    assert "ok       7" in text
    assert "invalid  1" in text
    assert "inline on cpu" in text
    assert "row 2 (line 3): invalid: column n_samples = 'x'" in text


def test_status_while_the_driver_merges_the_journal(job: Path, tmp_path: Path) -> None:
    """A journal file may disappear between being listed and being read."""
    running = tmp_path / "job"
    shutil.copytree(job, running)
    journal, sealed = running / "_tinysd" / "journal", running / "results.parquet"
    stop = threading.Event()

    def add_and_remove_journal_file() -> None:
        data = sealed.read_bytes()
        while not stop.is_set():
            (journal / "00000001.parquet").write_bytes(data)
            (journal / "00000001.parquet").unlink()
            time.sleep(0.001)

    thread = threading.Thread(target=add_and_remove_journal_file)
    thread.start()
    try:
        for _ in range(50):
            assert read_status(running).by_status["ok"] == 7
    finally:
        stop.set()
        thread.join()


def test_progress_without_a_terminal_is_plain_lines() -> None:
    console = plain_console()
    with RunProgressBar(console, verbose=True) as progress:
        progress.report_start(3, 1, InvalidRows([InvalidRow(9, "column seed = \x1b[31m: bad")], 1))
        for index, status in ((2, Status.OK), (3, Status.FAILED)):
            request = ImageRequest("cat\x1b]0;evil\x07[red]", 5, make_image_settings(), index=index)
            progress.report_image(
                request, ImageResult(index, status, file_name="images/x.png", error_message="it broke")
            )
    text = text_of(console)
    assert "Resuming: 1 of 3 images are already generated" in text
    assert "row 9: column seed" in text
    assert "images/x.png  seed 5  cat ]0;evil [red]" in text
    assert "Image 3 (row 1): failed: it broke" in text
    assert "\x1b" not in text


def report_one_image(progress: RunProgressBar, index: int) -> None:
    request = ImageRequest("cat", 5, make_image_settings(), index=index)
    progress.report_image(request, ImageResult(index, Status.OK, file_name="images/x.png"))


def test_speed_is_shown_once_measured_and_times_have_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch used to show "7000.00 images/s", with two unlabelled times."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = plain_console()
    progress = RunProgressBar(console, verbose=False)
    progress.report_start(408, 0, InvalidRows())
    now = 112.0
    for index in range(1, 9):  # the first batch of eight
        report_one_image(progress, index)
        assert progress.format_times(now) == "elapsed 0:12"
    now = 114.0
    report_one_image(progress, 9)
    assert progress.format_times(now) == "elapsed 0:14"  # two seconds are too short to measure a speed
    now = 132.0
    for index in range(10, 17):
        report_one_image(progress, index)
    assert progress.format_times(now) == "0.40 images/s, elapsed 0:32, about 16:20 left"
    assert progress.format_times(now + 60) == "0.40 images/s, elapsed 1:32, about 15:20 left"
    assert text_of(console).splitlines() == [
        "1 of 408 images, elapsed 0:12, 0 failed",
        "10 of 408 images, 0.10 images/s, elapsed 0:32, about 1:06:20 left, 0 failed",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [20, 60, 100])
def test_bar_fits_one_line_of_any_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, _environ={"TERM": "xterm"})
    progress = RunProgressBar(console, verbose=False)
    progress.report_start(1_000_000, 0, InvalidRows())
    progress.report_worker(WorkerReady("cpu-0", {"device_name": "cpu"}))
    progress.started_at -= 4000
    progress.first_image_at, progress.last_image_at, progress.timed_images = 1.0, 3001.0, 70
    lines = console.render_lines(progress.bar.get_renderable(), pad=False)
    assert len(lines) == 1
    text = "".join(segment.text for segment in lines[0])
    assert len(text) <= width
    if width >= 60:
        assert "43 s an image, elapsed 1:06:4" in text


def test_formatting() -> None:
    assert [format_count(number, "image") for number in (0, 1, 12345)] == ["0 images", "1 image", "12,345 images"]
    assert [format_seconds(seconds) for seconds in (7.6, 185, 7800)] == ["8 s", "3 min 5 s", "2 h 10 min"]
    assert to_one_line("a\nb\x1b[0m" + "x" * 99, 10) == "a b [0mxx…"
