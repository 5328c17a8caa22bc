"""Manifests, models, images and job folders may come from untrusted sources: none may affect anything but itself.

Messages for broken files are tested in `tests/cli/test_bad_inputs.py` and `tests/cli/test_damaged_folders.py`,
decompression bombs in manifests in `tests/job/manifest/test_readers.py`.
"""

from pathlib import Path

import pytest

from tests.support.program import Capture, call

ESCAPES = "\x1b[31m\x1b]0;evil\x07\x9b2J\r\b\u202e\u2066\x85"


def is_harmless(text: str) -> bool:
    """Whether text has no control characters except line ends, and none that change its direction."""
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """A working folder, with a model next to it and files outside of it that must not change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    (tmp_path / "outside" / ".tmp-not-ours").write_text("precious")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "m.csv").write_text("prompt\ncat\n")
    (tmp_path / "model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def submit(capture: Capture, *arguments: object) -> tuple[int, str, str]:
    return call(capture, "submit", *(arguments or ["m.csv"]), "--inline", "--model", "../model", "--seed", 5)
