"""What keeps the repository readable: plain words, one meaning per name, small modules and rooms."""

import ast
import fnmatch
import re
import statistics
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

MAX_FILE_LINES = 400
MAX_ROOM_MODULES = 14
MAX_MEDIAN_FUNCTION_LINES = 10
FOLDERS = ("tinysd_batch", "tests", "benchmarks", "training", "jobs", "configs", "docs")
TEXT_SUFFIXES = {".py", ".c", ".md", ".toml", ".sh", ".txt", ".csv", ".yaml"}
WORDS: dict[str, Any] = tomllib.loads((ROOT / "tests" / "repository" / "words.toml").read_text(encoding="utf-8"))
BETWEEN_WORDS_OF_A_NAME = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

PACKAGE = sorted((ROOT / "tinysd_batch").rglob("*.py"))


def list_text_files() -> list[Path]:
    """List the tracked text files that people read: all of FOLDERS, and the documents and settings at the root."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [
        ROOT / name
        for name in names
        if Path(name).suffix in TEXT_SUFFIXES
        and (name.startswith(FOLDERS) or "/" not in name)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in WORDS["skipped_files"])
        and (ROOT / name).exists()
    ]


def make_pattern(words: list[str]) -> re.Pattern[str]:
    """Match each word as a whole, in any case, between other letters; `*` at its end matches any ending."""
    alternatives = (
        re.escape(word.removesuffix("*")).replace(r"\ ", r"\s+") + (r"[a-z]*" if word.endswith("*") else r"(?![a-z])")
        for word in words
    )
    return re.compile(rf"(?<![a-z])(?:{'|'.join(alternatives)})", re.IGNORECASE)


BANNED = make_pattern([*WORDS["banned"]])
ALLOWED_PHRASES = make_pattern(WORDS["allowed_phrases"])


def find_banned_words(line: str) -> list[str]:
    """Find banned words of a line, those within identifiers included."""
    line = BETWEEN_WORDS_OF_A_NAME.sub("_", ALLOWED_PHRASES.sub("", line))
    return [" ".join(match.group().lower().split()) for match in BANNED.finditer(line)]


def is_exception(file: str, word: str) -> bool:
    return any(
        word in exception["words"] and fnmatch.fnmatch(file, exception["files"]) for exception in WORDS["exceptions"]
    )


def test_no_word_of_the_old_dialect_comes_back() -> None:
    """The words and what to write instead are in `tests/repository/words.toml`."""
    found = [
        f"{name}:{number}: {word}"
        for file in list_text_files()
        for name in [file.relative_to(ROOT).as_posix()]
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for word in find_banned_words(line)
        if not is_exception(name, word)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("draws a Picture", ["draws", "picture"]),
        ("def foretell_work(): ...", ["foretell"]),
        ("class IdleCard:", ["card"]),
        ("the original, a model card, ImageDraw and git's origin/main", []),
        ("in want of  room", ["want of"]),
    ],
)
def test_words_are_found_within_names_and_sentences(line: str, words: list[str]) -> None:
    assert find_banned_words(line) == words


def find_definitions(kind: type[ast.AST]) -> Iterator[tuple[Path, Any]]:
    for file in PACKAGE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield file, node


def test_no_class_name_has_two_meanings() -> None:
    names = Counter(node.name for _, node in find_definitions(ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_file_is_too_long_and_no_room_too_full() -> None:
    files = [file for file in list_text_files() if file.suffix == ".py"]
    assert [str(file) for file in files if len(file.read_text().splitlines()) > MAX_FILE_LINES] == []
    modules = Counter(file.parent.relative_to(ROOT).as_posix() for file in files)
    assert {room: count for room, count in modules.items() if count > MAX_ROOM_MODULES} == {}


def test_functions_are_short() -> None:
    lines = [node.end_lineno - node.lineno + 1 for _, node in find_definitions(ast.FunctionDef)]
    assert statistics.median(lines) <= MAX_MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize(("folder", "other"), [("tests", "benchmarks"), ("benchmarks", "tests")])
def test_tests_and_benchmarks_share_support_only(folder: str, other: str) -> None:
    imports = {
        module
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {name for name in imports if name.split(".")[0] == other and not name.startswith("tests.support")} == set()
