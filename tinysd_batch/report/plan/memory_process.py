"""Estimate memory in a subprocess, so that torch and diffusers do not add to the memory that a long manifest needs.

Importing them takes about 300 MB, reading a million rows about 150 MB. With two processes each stays below 400 MB.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinysd_batch import errors
from tinysd_batch.import_path import PACKAGE_ROOT
from tinysd_batch.report.plan.memory_table import MemoryEstimate, PlannedBatch, StageMemory, estimate_memory
from tinysd_batch.settings.schema import Settings
from tinysd_batch.settings.sources import parse_settings

# -P keeps Python from importing modules of the current folder. The package's own folder is appended because it may not
# be installed. Ctrl-C reaches both processes; the default handler keeps the subprocess from printing a traceback.
SUBPROCESS_CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path.append(sys.argv[1])
from tinysd_batch.report.plan.memory_process import respond_to_request
respond_to_request()
"""


def estimate_memory_in_subprocess(
    settings: Settings, batch: PlannedBatch, precision_file: Path | None = None
) -> MemoryEstimate:
    """Do what `estimate_memory` does, in a subprocess unless this process has imported torch already."""
    if "torch" in sys.modules:
        return estimate_memory(settings, batch, precision_file)
    request = {
        "settings": settings.to_json(),
        "batch": asdict(batch),
        "precision_file": None if precision_file is None else str(precision_file.absolute()),
    }
    process = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-P", "-c", SUBPROCESS_CODE, PACKAGE_ROOT],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:  # for example, killed because memory ran out
        return estimate_memory(settings, batch, precision_file)
    return read_response(json.loads(process.stdout.splitlines()[-1]))


def read_response(response: dict[str, Any]) -> MemoryEstimate:
    """Return the estimate, or raise the error that the subprocess reported."""
    if "error" in response:
        raise getattr(errors, response["error"])(response["message"])
    stages = [StageMemory(**stage) for stage in response.pop("stages")]
    batch = PlannedBatch(**response.pop("batch"))
    return MemoryEstimate(batch=batch, stages=stages, **response)


def respond_to_request() -> None:
    """Read a request from stdin, and write the estimate, or the error, to stdout as JSON."""
    request = json.loads(sys.stdin.read())
    try:
        precision_file = Path(request["precision_file"]) if request["precision_file"] is not None else None
        batch = PlannedBatch(**request["batch"])
        settings = Settings(**parse_settings(request["settings"], "settings"))
        response = asdict(estimate_memory(settings, batch, precision_file))
    except errors.TinySDError as error:
        response = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(response) + "\n")
