"""Every run writes a log, which `status` names."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.files import write_csv
from tests.support.program import environment, run_here
from tinysd_batch.job import job_log
from tinysd_batch.job.job_log import write_job_log

LOG = Path("job") / "_tinysd" / "job.log"


def test_a_run_writes_what_happened_and_status_names_the_log(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "steps": 1}, {"prompt": "", "steps": 1}])
    done = run_here("submit", "m.csv", "--model", tiny_model, "-o", "job", "--inline", cwd=tmp_path)
    assert done.returncode == 3
    text = (tmp_path / LOG).read_text()
    assert "of tinysd-batch" in text
    assert "1 images, 0 of them finished; 1 invalid rows" in text
    assert "WorkerReady" in text
    assert "0 images left, 0 failed" in text
    assert str(LOG) in run_here("status", "job", cwd=tmp_path).stdout


def test_verbose_shows_decisions_of_the_engine(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "steps": 1}])
    command = ["submit", "m.csv", "--model", tiny_model, "--inline", "-o"]
    assert "computing in" not in run_here(*command, "quiet", cwd=tmp_path).stderr
    assert "computing in float32" in run_here(*command, "verbose", "-v", cwd=tmp_path).stderr


def test_a_large_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "MAX_LOG_BYTES", 10)
    logger = logging.getLogger("tinysd_batch.test")
    for message in ("first run", "second run", "third run"):
        with write_job_log(tmp_path):
            logger.debug(message)
    assert "third run" in (tmp_path / "job.log").read_text()
    assert "second run" in (tmp_path / "job.log.1").read_text()


def test_warnings_of_worker_and_driver_go_to_one_file(tmp_path: Path) -> None:
    with write_job_log(tmp_path), write_job_log(tmp_path, "miner2/cuda-0"):
        logging.getLogger("tinysd_batch.model").warning("no kernel")
    lines = (tmp_path / "job.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING tinysd_batch.model: no kernel", "WARNING miner2/cuda-0 tinysd_batch.model: no kernel",
    ]  # fmt: skip


def test_a_log_that_a_full_disk_does_not_take_costs_nothing(tmp_path: Path) -> None:
    """The limit of a file's size stands for the disk: writing beyond it is an OSError, too."""
    script = f"""
import logging, resource
from pathlib import Path
from tinysd_batch.job.job_log import write_job_log

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with write_job_log(Path({str(tmp_path)!r})):
    for number in range(20):
        logging.getLogger("tinysd_batch.test").debug("x" * 100)
print("the run goes on")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the run goes on\n", "")


def test_links_are_not_followed_and_a_log_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / "job.log").symlink_to(tmp_path / "target")
    with write_job_log(tmp_path):
        logging.getLogger("tinysd_batch.test").warning("text")
    assert (tmp_path / "target").read_text() == ""
    with write_job_log(tmp_path / "missing"):
        logging.getLogger("tinysd_batch.test").warning("text")
