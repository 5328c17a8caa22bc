"""Plan memory in a process of its own, so that torch and diffusers do not add to what a long manifest takes.

Importing them takes some 300 MB, reading a million rows some 150 MB; apart, each process stays below 400 MB.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinysd_batch import errors
from tinysd_batch.config import Settings
from tinysd_batch.import_path import PACKAGE_ROOT
from tinysd_batch.report.plan.memory_table import MemoryEstimate, PlannedBatch, StageMemory, estimate_memory

# Without -P Python would import from the current folder; the package itself may lie beside it, not installed. Ctrl-C
# reaches both processes, and only this one has something to say about it.
SUBPROCESS_CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path.append(sys.argv[1])
from tinysd_batch.report.plan.memory_process import answer
answer()
"""


def estimate_memory_in_subprocess(
    settings: Settings, batch: PlannedBatch, precision_file: Path | None = None
) -> MemoryEstimate:
    """As `plan_memory`, in another process unless this one has torch already."""
    if "torch" in sys.modules:
        return estimate_memory(settings, batch, precision_file)
    recorded = str(precision_file.absolute()) if precision_file is not None else None
    question = json.dumps({"settings": settings.model_dump(), "batch": asdict(batch), "precision_file": recorded})
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-P", "-c", SUBPROCESS_CODE, PACKAGE_ROOT],
        input=question,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:  # killed for its memory, say
        return estimate_memory(settings, batch, precision_file)
    return read_response(json.loads(done.stdout.splitlines()[-1]))


def read_response(found: dict[str, Any]) -> MemoryEstimate:
    if "error" in found:
        raise getattr(errors, found["error"])(found["message"])
    phases = [StageMemory(**phase) for phase in found.pop("phases")]
    batch = PlannedBatch(**found.pop("batch"))
    return MemoryEstimate(batch=batch, phases=phases, **found)


def answer() -> None:
    """Read a question from stdin and write the plan, or what is wrong, to stdout as JSON."""
    question = json.loads(sys.stdin.read())
    try:
        recorded = Path(question["precision_file"]) if question["precision_file"] is not None else None
        found = asdict(estimate_memory(Settings(**question["settings"]), PlannedBatch(**question["batch"]), recorded))
    except errors.TinySDError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")
