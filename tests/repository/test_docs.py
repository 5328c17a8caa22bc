"""The documentation describes the program that is here."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from docs.tables import find_differences, get_commands
from tests.support.paths import ROOT
from tinysd_batch import __version__
from tinysd_batch.job.manifest.readers import READERS_BY_SUFFIX

PAGES = [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "training" / "README.md",
    ROOT / "tinysd_batch" / "embedded" / "model" / "README.md",
]  # fmt: skip
MAX_README_LINES = 140


def test_generated_tables_are_up_to_date() -> None:
    assert not find_differences(), "`make docs` rewrites them"


def test_every_command_and_option_has_help() -> None:
    for name, command in get_commands().items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), (name, parameter.name)


@pytest.mark.parametrize("name", get_commands())
def test_every_command_is_in_the_readme_or_the_page_on_models(name: str) -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "models.md").read_text()
    assert f"tinysd-batch {name}" in text


@pytest.mark.parametrize("suffix", READERS_BY_SUFFIX)
def test_every_manifest_format_is_documented(suffix: str) -> None:
    assert f"`{suffix}`" in (ROOT / "docs" / "manifest.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def make_anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {make_anchor(heading) for heading in headings}, f"{target}#{anchor}"


def test_every_page_is_linked() -> None:
    """From another page, directly or by its folder."""
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            linked |= set(path.glob("*.md")) if path.is_dir() else {path}
    assert {page for page in (ROOT / "docs").rglob("*.md") if page.resolve() not in linked} == set()


def test_the_changelog_knows_this_version() -> None:
    version = __version__.partition(".dev")[0]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def find_test_names() -> set[str]:
    return {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_the_tests_that_the_documentation_names_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    assert len(named) > 25
    assert named - find_test_names() == set()


PATH_IN_TEXT = re.compile(r"`((?:tinysd_batch|tests|benchmarks|training|configs|jobs|docs)/[\w./-]+)`")
ROOM_IN_TEXT = re.compile(r"`((?:cli|report|export|job|model|quantize|storage)/[\w/]+(?:\.py|\.c)?)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_the_documentation_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # it names files of earlier versions
    text = page.read_text(encoding="utf-8")
    build_outputs = ("training/build",)
    missing = [name for name in PATH_IN_TEXT.findall(text) if not (ROOT / name).exists()]
    assert [name for name in missing if not name.startswith(build_outputs)] == []
    package = ROOT / "tinysd_batch"
    rooms = [name for name in ROOM_IN_TEXT.findall(text) if not name.endswith(("/tmp", ".parquet"))]
    assert [name for name in rooms if not any((package / f"{name}{suffix}").exists() for suffix in ("", ".py"))] == []


def read_answers() -> list[tuple[str, str]]:
    rows = re.findall(
        r"^\| (Where [^|]*\?) \| ([^|]*) \|$", (ROOT / "docs" / "contributing.md").read_text(), re.MULTILINE
    )
    return [(question, answer) for question, answer in rows]


def test_there_are_nine_questions() -> None:
    assert len(read_answers()) == 9


@pytest.mark.parametrize(("question", "answer"), read_answers())
def test_every_question_has_an_answer_that_exists(question: str, answer: str) -> None:
    """`file`: `name`, or `file` alone; in a class as `Class.method`."""
    locations = re.findall(r"`(tinysd_batch/[\w/.]+)`(?:: `([\w.]+)`)?", answer)
    assert locations
    for file, name in locations:
        text = (ROOT / file).read_text(encoding="utf-8")
        for part in name.split(".") if name else ():
            assert re.search(rf"^\s*(?:def {part}\(|class {part}\b|{part}\b.*=)", text, re.MULTILINE), (file, name)


def test_the_package_imports_only_what_it_declares() -> None:
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
