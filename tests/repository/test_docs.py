"""README, ARCHITECTURE and CHANGELOG match the program."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from tests.support.paths import ROOT
from tinysd_batch import __version__
from tinysd_batch.cli import app
from tinysd_batch.errors import TinySDError
from tinysd_batch.job.manifest.columns import COLUMN_BY_NAME
from tinysd_batch.job.manifest.readers import READERS_BY_SUFFIX
from tinysd_batch.job.results.schema import RESULT_FIELDS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> dict[str, Any]:
    """Return the commands by name. Typer bundles its own click, so their classes are not click's."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def options() -> Iterator[str]:
    for command in commands().values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                yield from parameter.opts


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help_and_is_in_the_readme(name: str) -> None:
    assert commands()[name].help
    assert f"tinysd-batch {name}" in README


@pytest.mark.parametrize("option", sorted(set(options())))
def test_every_option_is_in_the_readme(option: str) -> None:
    assert f"`{option}`" in README


def test_every_option_has_help() -> None:
    for command in commands().values():
        for parameter in command.params:
            assert getattr(parameter, "help", None), (command.name, parameter.name)


@pytest.mark.parametrize("column", [*COLUMN_BY_NAME, *(field.name for field in RESULT_FIELDS)])
def test_every_column_is_in_the_readme(column: str) -> None:
    assert f"`{column}`" in README


@pytest.mark.parametrize("suffix", READERS_BY_SUFFIX)
def test_every_format_is_in_the_readme(suffix: str) -> None:
    assert f"`{suffix}`" in README


def test_every_exit_code_is_in_the_readme() -> None:
    def error_types(base: type[TinySDError]) -> Iterator[type[TinySDError]]:
        yield base
        for subclass in base.__subclasses__():
            yield from error_types(subclass)

    for code in {kind.exit_code for kind in error_types(TinySDError)} | {0, 3, 129, 130, 143}:
        assert re.search(rf"\| {code} \|", README), code


def test_links_have_targets() -> None:
    for document in (
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "training/README.md",
        "tinysd_batch/embedded/model/README.md",
    ):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"


def test_changelog_has_this_version() -> None:
    assert f"## {__version__.partition('.dev')[0]} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_tests_named_in_the_architecture_exist() -> None:
    """It has a table of the features and defects of tiny-stable-diffusion, with the test of each."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")))
    existing = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 25
    assert named <= existing


def test_package_imports_only_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        re.split(r"[<>=]", name)[0] for name in [*project["dependencies"], *project["optional-dependencies"]["report"]]
    }
    modules = {"pillow": "PIL"}
    allowed = {modules.get(name, name) for name in declared} | {"tinysd_batch"} | sys.stdlib_module_names
    for file in (ROOT / "tinysd_batch").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, (file, names)
