"""Files and settings shared by all workers of a test run."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

DEFAULT_EXAMPLES = 50  # of hypothesis, per property


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a file or folder shared by all workers of a test run. The first worker that needs it calls `make`."""
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
    """Limit the examples of a slow property: `count` in the default profile, in proportion in others."""
    profile = hypothesis.settings.default
    assert profile is not None
    return hypothesis.settings(max_examples=count * profile.max_examples // DEFAULT_EXAMPLES)
