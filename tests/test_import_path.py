"""Files in the current folder are never imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinysd_batch
from tests.support.program import environment
from tinysd_batch.import_path import PACKAGE_ROOT, filter_trusted, select_absolute_entries

NAMES = (
    "diffusers", "torch", "ray", "numpy", "pyarrow", "typer", "rich", "pydantic", "transformers", "PIL", "json", "csv",
    "pathlib", "logging", "typing", "sitecustomize", "usercustomize", "xformers", "accelerate", "safetensors",
)  # fmt: skip


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder of modules that write to a file when they are imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + ' ')\n")
    (folder / "m.csv").write_text("prompt,steps\ncat,1\nowl,1\n")
    return folder


def assert_nothing_imported(trap: Path) -> None:
    imported = trap.parent / "imported"
    assert not imported.exists(), f"imported from the current folder: {imported.read_text()}"


def run_in(trap: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinysd_batch", *map(str, arguments)],
        cwd=trap,
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
    )


def test_status_imports_nothing_from_the_current_folder(trap: Path) -> None:
    done = run_in(trap, "status", ".")
    assert done.returncode == 2, done.stderr
    assert_nothing_imported(trap)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "m.csv", "-o", "job", "--inline"],
        ["submit", "m.csv", "-o", "job", "--workers", "1"],
        ["txt2img", "cat", "--steps", "1"],
        ["plan", "m.csv"],
        ["inspect", "embedded"],
    ],
)
def test_no_command_imports_from_the_current_folder(trap: Path, arguments: list[str]) -> None:
    done = run_in(trap, *arguments)
    assert done.returncode == 0, done.stderr
    assert_nothing_imported(trap)


@pytest.mark.slow
def test_an_empty_entry_of_pythonpath_reaches_no_worker(trap: Path) -> None:
    """Python itself looks for sitecustomize before our code runs, but only in the driver."""
    for name in ("sitecustomize", "usercustomize"):
        (trap / f"{name}.py").unlink()
    root = str(Path(tinysd_batch.__file__).parents[1])
    done = run_in(trap, "submit", "m.csv", "-o", "job", "--workers", 1, PYTHONPATH=f":{root}::.")
    assert done.returncode == 0, done.stderr
    assert_nothing_imported(trap)


def test_untrusted_entries_are_removed() -> None:
    current = "/home/me/job"
    entries = ["", ".", current, "/opt/lib", f"{current}/sub", PACKAGE_ROOT]
    assert filter_trusted(entries, [current], []) == ["/opt/lib", f"{current}/sub", PACKAGE_ROOT]
    assert filter_trusted(entries, [current], [current]) == [current, "/opt/lib", f"{current}/sub", PACKAGE_ROOT]
    library = str(Path(os.__file__).parent)
    assert filter_trusted([library], [library], [])[0] == library
    assert filter_trusted([PACKAGE_ROOT, "/opt/lib"], [PACKAGE_ROOT], []) == ["/opt/lib", PACKAGE_ROOT], (
        "last, in a checkout"
    )


@pytest.mark.parametrize(("python_path", "kept"), [("", []), (":/a", ["/a"]), ("/a:.:lib:/b:", ["/a", "/b"])])
def test_relative_entries_of_pythonpath_are_removed(python_path: str, kept: list[str]) -> None:
    assert select_absolute_entries(python_path) == kept


@pytest.mark.parametrize(
    "arguments", [["status", "/x"], ["submit", "/x/m.csv", "-o", "/x/job", "--inline"], ["--help"]]
)
def test_a_deleted_current_folder_is_reported_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    submit = " ".join([sys.executable, "-m", "tinysd_batch", *arguments])
    done = subprocess.run(
        ["sh", "-c", f"rmdir ../gone && exec {submit}"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "tinysd-batch: the current folder was deleted; change to another one and try again\n"
