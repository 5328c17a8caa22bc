"""What all workers of a test run share."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

DEFAULT_EXAMPLES = 50  # of a property, by hypothesis


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file or folder that all workers of a test run share: the first that needs it has `make` write it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(f"partial-{path.name}")
            make(partial)
            partial.rename(path)
    return path


def examples(count: int) -> hypothesis.settings:
    """For a property that is slow to test: so many examples by default, in proportion in other profiles."""
    profile = hypothesis.settings.default
    assert profile is not None
    return hypothesis.settings(max_examples=count * profile.max_examples // DEFAULT_EXAMPLES)
