"""The wait policy of threads is set before torch is imported, unless the user has set one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.program import environment
from tinysd_batch import TinySD, threads

OUR_POLICY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": threads.WAIT_POLICY["GOMP_SPINCOUNT"]}


def run_python(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in environment().items() if name not in threads.WAIT_POLICY_VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code], env={**without, **more}, capture_output=True, text=True, check=True, timeout=60
    )


@pytest.mark.parametrize(
    ("module", "user_variables"),
    [
        ("tinysd_batch.job.workers.worker", {}),
        ("tinysd_batch", {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("tinysd_batch", {"GOMP_SPINCOUNT": "infinity"}),
        ("tinysd_batch", {"KMP_BLOCKTIME": "200"}),
    ],
)
def test_the_wait_policy_is_set_unless_the_user_has_set_one(module: str, user_variables: dict[str, str]) -> None:
    code = (
        f"import {module}, json, os, sys; assert 'torch' not in sys.modules; "
        f"names = set({sorted(threads.WAIT_POLICY_VARIABLES)}) & os.environ.keys(); "
        "print(json.dumps({name: os.environ[name] for name in names}))"
    )
    assert json.loads(run_python(code, **user_variables).stdout) == (user_variables or OUR_POLICY)


def test_openmp_reads_the_policy() -> None:
    """GNU OpenMP, which torch's wheels contain, prints the settings that it has read."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    library = next(Path(spec.origin).parent.glob("lib/libgomp*"), None)
    if library is None:
        pytest.skip("this torch has no GNU OpenMP")
    display = run_python(
        f"import tinysd_batch, ctypes; ctypes.CDLL({str(library)!r})", OMP_DISPLAY_ENV="VERBOSE"
    ).stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in display
    assert f"GOMP_SPINCOUNT = '{OUR_POLICY['GOMP_SPINCOUNT']}'" in display


@pytest.mark.parametrize(("before", "during"), [(2, 1), (1, 1)])
def test_a_small_model_generates_on_one_thread(tiny_model: Path, before: int, during: int) -> None:
    """Even if torch was imported first, with another wait policy. The user's number of threads is restored."""
    model = TinySD.from_pretrained(tiny_model, device="cpu")
    seen: set[int] = set()
    original = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        model.generate("cat", 1, callback=lambda *_: seen.add(torch.get_num_threads()))
        assert torch.get_num_threads() == before
        with pytest.raises(ZeroDivisionError):
            model.generate("cat", 1, callback=lambda *_: 1 / 0)  # type: ignore[arg-type]
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(original)
    assert seen == {during}


def test_importing_torch_first_logs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads, "was_torch_imported_first", False)
    monkeypatch.setattr(os, "environ", {})
    threads.set_wait_policy()
    threads.warn_if_threads_spin(1)
    assert not caplog.records
    threads.warn_if_threads_spin(2)
    assert "import tinysd_batch first" in caplog.text
