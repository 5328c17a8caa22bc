"""Record the precision that `auto` chose on each machine and device, so that a resumed job does not change it.

A worker reads the record before it loads the model. The driver, which holds the job's lock, writes it when a worker is
ready. Workers that start at the same time on one machine may measure differently: the first one to be ready decides,
and the driver restarts the others.
"""

import json
import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinysd_batch.storage.atomic import read_file, write_atomically
from tinysd_batch.text import make_text_storable

if TYPE_CHECKING:
    import torch

    from tinysd_batch.job.results.table import ResultsTable
    from tinysd_batch.model.device.precision import PrecisionChoice
    from tinysd_batch.model.tiny_sd import TinySD

PRECISION_FILE = "precision.json"
MAX_RECORD_BYTES = 10_000_000
THREADS_SUFFIX = re.compile(r", \d+ threads\)$")  # suffix of the CPU's name in the results
DTYPES = ("float32", "float16", "bfloat16")

logger = logging.getLogger(__name__)
PrecisionRecord = dict[str, dict[str, str]]  # machine and device -> names of dtype and reason


def machine_device_key(device: "torch.device") -> str:
    """Return the key of a device in the record: devices of the same name in one machine share a precision."""
    name = f"{device.type} ({platform.machine()})"
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return make_text_storable(f"{platform.node()}/{name}")


def read_precision_record(path: Path) -> PrecisionRecord:
    """Read the record; empty if there is none, and, with a warning, if it is damaged."""
    try:
        record = json.loads(read_file(path, MAX_RECORD_BYTES).decode("utf-8"))
        return {key: check_entry(entry) for key, entry in record.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s: cannot be read and is ignored: %s", path, make_text_storable(str(error)))
        return {}


def check_entry(entry: Any) -> dict[str, str]:
    """Return a valid entry of the record. Raises KeyError, TypeError or ValueError for any other."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r}")
    return {"dtype": entry["dtype"], "reason": make_text_storable(str(entry["reason"]))}


def choose_recorded_precision(path: Path | None, device: "torch.device", *, is_small: bool) -> "PrecisionChoice":
    """Return the recorded precision of this machine and device if the device supports it, else a new choice."""
    import torch

    from tinysd_batch.model.device.precision import PrecisionChoice, can_use_dtype, choose_precision

    recorded = read_precision_record(path).get(machine_device_key(device)) if path is not None else None
    if recorded is None:
        return choose_precision(None, device, is_small=is_small)
    if can_use_dtype(dtype := getattr(torch, recorded["dtype"]), device):
        return choose_precision(PrecisionChoice(dtype, f"as before in this job: {recorded['reason']}"), device)
    choice = choose_precision(None, device, is_small=is_small)
    logger.warning(
        "%s: the job started with %s, which this device does not support well; continuing with %s: %s",
        machine_device_key(device),
        recorded["dtype"],
        choice.name,
        choice.reason,
    )
    return replace(choice, replaces=recorded["dtype"])


def describe_precision(model: "TinySD") -> dict[str, str | None]:
    """Return what a worker reports to the driver about its precision."""
    choice = model.precision
    return {
        "precision": choice.name,
        "precision_reason": choice.reason,
        "precision_replaces": choice.replaces,
        "precision_key": machine_device_key(model.device),
    }


def record_precision_from_results(path: Path, results: "ResultsTable") -> None:
    """Create a missing or damaged record from the results, for example for a job of 0.1.0, which kept none."""
    import pyarrow.compute as pc

    if read_precision_record(path):
        return
    record: PrecisionRecord = {}
    for table in results.read(["node", "device_name", "precision", "degraded", "reused"]):
        is_unmodified = pc.and_(pc.equal(pc.list_value_length(table["degraded"]), 0), pc.is_null(table["reused"]))
        rows = table.filter(is_unmodified).group_by(["node", "device_name", "precision"]).aggregate([]).to_pylist()
        for row in rows:
            if row["precision"] in DTYPES:
                device = THREADS_SUFFIX.sub(")", row["device_name"] or "")
                record[f"{row['node']}/{device}"] = {"dtype": row["precision"], "reason": "its earlier images have it"}
    if record:
        write_precision_record(path, record)


def write_precision_record(path: Path, record: PrecisionRecord) -> None:
    """Write the record. Raises StorageError."""
    write_atomically((json.dumps(record, indent=2) + "\n").encode(), path)


def update_precision_record(path: Path, description: Mapping[str, Any]) -> str | None:
    """Record the precision of a worker that is ready, unless another worker's is recorded.

    Args:
        path: File of the record.
        description: What the worker returned from `describe_precision`.

    Returns:
        Why the worker must be restarted, if a worker on the same machine and device chose another precision before it.
    """
    key, dtype = description["precision_key"], description["precision"]
    record = read_precision_record(path)
    recorded = record.get(key, {}).get("dtype")
    if recorded == dtype:
        return None
    if recorded is not None and recorded != description["precision_replaces"]:
        return f"chose {dtype}, but the job uses {recorded} on {key}"
    logger.info("%s uses %s: %s", key, dtype, description["precision_reason"])
    record[key] = {"dtype": dtype, "reason": description["precision_reason"]}
    write_precision_record(path, record)
    return None
