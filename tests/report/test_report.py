import io
import shutil
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.tools import draw, read_results, write_csv
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, SamplingParams, Status
from tinysd_batch.report.contact_sheet import CELL_PX, columns_for, write_contact_sheet
from tinysd_batch.report.progress import RunProgress
from tinysd_batch.report.status import print_status, read_status
from tinysd_batch.report.text import count, duration, one_line


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


def test_the_sheet_shows_every_picture(job: Path) -> None:
    path = write_contact_sheet(job)
    assert path == job / "contact_sheet.png"
    with Image.open(path) as sheet:
        assert sheet.width >= 3 * CELL_PX
        assert sheet.height >= 2 * CELL_PX
        first = sheet.convert("RGB").crop((8, 8, 8 + CELL_PX, 8 + CELL_PX))
    with Image.open(job / read_results(job)[0]["file_name"]) as picture:
        assert first.tobytes() == picture.convert("RGB").resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS).tobytes()


def test_no_pictures_no_sheet(tmp_path: Path) -> None:
    assert write_contact_sheet(tmp_path) is None


@pytest.mark.parametrize(("pictures", "columns"), [(1, 1), (2, 2), (6, 3), (24, 6), (100, 13)])
def test_a_sheet_is_a_little_wider_than_high(pictures: int, columns: int) -> None:
    assert columns_for(pictures) == columns


def test_status_tells_counts_speed_and_faults(job: Path) -> None:
    console = plain_console()
    print_status(job, read_status(job), console)
    text = text_of(console)
    assert "finished, model random 16" in text
    assert "ok       7" in text
    assert "invalid  1" in text
    assert "inline on cpu" in text
    assert "row 2 (line 3): invalid: column n_samples = 'x'" in text


def test_status_while_the_driver_seals(job: Path, tmp_path: Path) -> None:
    """A journal part may vanish between being listed and being read."""
    busy = tmp_path / "job"
    shutil.copytree(job, busy)
    journal, sealed = busy / "_tinysd" / "journal", busy / "results.parquet"
    stop = threading.Event()

    def seal_and_unseal() -> None:
        data = sealed.read_bytes()
        while not stop.is_set():
            (journal / "00000001.parquet").write_bytes(data)
            (journal / "00000001.parquet").unlink()
            time.sleep(0.001)

    thread = threading.Thread(target=seal_and_unseal)
    thread.start()
    try:
        for _ in range(50):
            assert read_status(busy).by_status["ok"] == 7
    finally:
        stop.set()
        thread.join()


def test_progress_off_a_terminal_is_plain_lines_without_escapes() -> None:
    console = plain_console()
    params = SamplingParams(64, 64, 5, "plms", 0.0)
    with RunProgress(console, verbose=True) as progress:
        progress.started(3, 1, [InvalidRow(9, "column seed = \x1b[31m: bad")])
        for index, status in ((2, Status.OK), (3, Status.FAILED)):
            request = ImageRequest(index, 1, 1, "cat\x1b]0;evil\x07[red]", "", 5, 1.0, params, "", "f")
            progress.image(request, ImageResult(index, status, file_name="images/x.png", error_message="it broke"))
    text = text_of(console)
    assert "Resuming: 1 of 3 images are there already" in text
    assert "row 9: column seed" in text
    assert "images/x.png  seed 5  cat ]0;evil [red]" in text
    assert "Image 3 (row 1): failed: it broke" in text
    assert "\x1b" not in text


def test_words() -> None:
    assert [count(number, "image") for number in (0, 1, 12345)] == ["0 images", "1 image", "12,345 images"]
    assert [duration(seconds) for seconds in (7.6, 185, 7800)] == ["8 s", "3 min 5 s", "2 h 10 min"]
    assert one_line("a\nb\x1b[0m" + "x" * 99, 10) == "a b [0mxx…"
