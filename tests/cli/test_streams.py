"""Standard streams that cannot be written, for example because a log file fills the disk."""

import contextlib
import io
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.support.jobs import check_whole, draw
from tests.support.program import command, environment, run_here
from tinysd_batch.cli.terminal.streams import name_standard_streams

redirect = contextlib.redirect_stdout
QUICK = ("--inline", "--sampler", "ddim", "--steps", 1, "--scale", 1, "--skip_grid", "--seed", 5)


class Full(io.StringIO):
    """A log file on a disk that is full after some lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.lines = lines

    def flush(self) -> None:
        if self.getvalue().count("\n") > self.lines:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("lines", [0, 3, 5])
def test_log_that_fills_the_disk_ends_the_job_resumable(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    (tmp_path / "m.csv").write_text("prompt\napple\npear\nowl\n")
    words = ("submit", "m.csv", "-o", "job", "--model", tiny_model, *QUICK, "-v")
    with monkeypatch.context() as patch:
        patch.setattr(contextlib, "redirect_stdout", lambda _: redirect(Full(lines)))
        done = run_here(*words, cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr.endswith("tinysd-batch: standard output: No space left on device\n")
    assert run_here(*words, cwd=tmp_path).returncode == 0
    check_whole(tmp_path / "job", 3)


def test_errors_carry_the_name_of_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full(0))
    with name_standard_streams(), pytest.raises(OSError, match="No space left") as error:
        print("x", file=sys.stderr, flush=True)
    assert error.value.filename == "standard error"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"), [(["status", "job"], 5), (["--version"], 5), (["--help"], 5), (["status", "nothing"], 2)]
)
def test_every_command_names_the_full_stream(
    tmp_path: Path, tiny_model: Path, words: list[str], code: int
) -> None:  # fmt: skip
    (tmp_path / "m.csv").write_text("prompt\napple\n")
    draw(tmp_path / "m.csv", tmp_path / "job", tiny_model)
    with Path("/dev/full").open("w") as full:
        run_it = partial(subprocess.run, command(*words), cwd=tmp_path, env=environment(), stdout=full, text=True)
        done = run_it(stderr=subprocess.PIPE)
        assert done.returncode == code
        assert done.stderr.startswith("tinysd-batch: ")
        assert len(done.stderr.splitlines()) == 1
        assert run_it(stderr=full).returncode == code
