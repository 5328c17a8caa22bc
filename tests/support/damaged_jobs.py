"""Damage files of jobs, and run commands on such jobs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tests.support.jobs import read_results
from tests.support.program import run_here

FAST_OPTIONS = ("--sampler", "ddim", "--steps", 1, "--scale", 1, "--seed", 5)
FIVE_ROWS = "prompt\napple\npear\nowl\nfox\nbee\n"
Command = Callable[..., CompletedProcess[str]]


def list_files(job: Path) -> list[Path]:
    """Return the image files of a job in the order of their rows."""
    return [job / row["file_name"] for row in read_results(job)]


def read_generated(job: Path) -> list[int]:
    """Return the indexes of the images that the newest run generated."""
    newest = json.loads((job / "job.json").read_text())["last_run"]["run_id"]
    return [row["index"] for row in read_results(job) if row["run_id"] == newest]


def run_command(command: str, job: Path, *arguments: object) -> CompletedProcess[str]:
    """Run a command on a job in this process."""
    return run_here(command, job, *arguments, cwd=job.parent)


def truncate(size: int) -> Callable[[Path], None]:
    """Return a function that truncates a file to a size, or, if that is negative, by so many bytes."""
    return lambda path: os.truncate(path, path.stat().st_size + size if size < 0 else size)


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_with_link(path: Path) -> None:
    """Move an image file out of the job folder, and link to it."""
    target = path.parents[3] / "elsewhere.png"
    path.rename(target)
    path.symlink_to(target)


def replace_with_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": truncate(0),
    "truncated to 100 bytes": truncate(100),
    "its last byte missing": truncate(-1),
    "its last chunk missing": truncate(-12),
    "a link": replace_with_link,
    "a pipe": replace_with_pipe,
}
