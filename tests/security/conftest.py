"""Manifests, models, pictures and job folders may come from anybody: none may do more than cost itself.

What broken files of each kind are told is in `test_bad_inputs.py` and `test_damaged_folders.py`; bombs in manifests are
in `job/test_formats.py`.
"""

from pathlib import Path

import pytest

from tests.support.program import Capture, call

ESCAPES = "\x1b[31m\x1b]0;evil\x07\x9b2J\r\b\u202e\u2066\x85"


def is_harmless(text: str) -> bool:
    """No control characters but line ends, nothing that turns the direction of text."""
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """A folder to work in, a model beside it, and outside of it what nobody may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    (tmp_path / "outside" / ".tmp-not-ours").write_text("precious")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "m.csv").write_text("prompt\ncat\n")
    (tmp_path / "model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def submit(capture: Capture, *more: object) -> tuple[int, str, str]:
    return call(capture, "submit", *(more or ["m.csv"]), "--inline", "--model", "../model", "--seed", 5)
