"""The precision that `auto` chose, per machine and device, so that a resumed job does not change it in the middle.

A worker reads the record before it loads the model; the driver, which alone holds the job's lock, writes it when a
worker is ready. Workers that begin at once on one machine may measure differently: then the first one counts, and the
driver has the others start again.
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
    from tinysd_batch.model.pipeline import TinySD

PRECISION_FILE = "precision.json"
MAX_RECORD_BYTES = 10_000_000
THREADS_SUFFIX = re.compile(r", \d+ threads\)$")  # at the end of a CPU's name in the results
DTYPES = ("float32", "float16", "bfloat16")

logger = logging.getLogger(__name__)
PrecisionRecord = dict[str, dict[str, str]]  # machine and device -> dtype and reason


def machine_device_key(device: "torch.device") -> str:
    """A machine's devices of one name have one precision."""
    name = f"{device.type} ({platform.machine()})"
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return make_text_storable(f"{platform.node()}/{name}")


def read_precision_record(path: Path) -> PrecisionRecord:
    """The record; empty where there is none yet, and for one that is damaged, with a warning."""
    try:
        found = json.loads(read_file(path, MAX_RECORD_BYTES).decode("utf-8"))
        return {key: check_entry(entry) for key, entry in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s: cannot be read and is not used: %s", path, make_text_storable(str(error)))
        return {}


def check_entry(entry: Any) -> dict[str, str]:
    """An entry of the record. Raises KeyError, TypeError or ValueError where it is not as `update_record` writes it."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r}")
    return {"dtype": entry["dtype"], "reason": make_text_storable(str(entry["reason"]))}


def choose_recorded_precision(path: Path | None, device: "torch.device", *, is_small: bool) -> "PrecisionChoice":
    """What the record says of this machine and device, if that can be computed here; else a new choice."""
    import torch

    from tinysd_batch.model.device.precision import PrecisionChoice, can_use_dtype, choose_precision

    recorded = read_precision_record(path).get(machine_device_key(device)) if path is not None else None
    if recorded is None:
        return choose_precision(None, device, is_small=is_small)
    if can_use_dtype(dtype := getattr(torch, recorded["dtype"]), device):
        return choose_precision(PrecisionChoice(dtype, f"as before in this job: {recorded['reason']}"), device)
    choice = choose_precision(None, device, is_small=is_small)
    logger.warning(
        "%s: the job was begun in %s, which cannot be computed well here; going on in %s: %s",
        machine_device_key(device), recorded["dtype"], choice.name, choice.reason,
    )  # fmt: skip
    return replace(choice, replaces=recorded["dtype"])


def describe_precision(model: "TinySD") -> dict[str, str | None]:
    """What a worker tells the driver of its precision."""
    chosen = model.precision
    return {
        "precision": chosen.name,
        "precision_reason": chosen.reason,
        "precision_replaces": chosen.replaces,
        "precision_key": machine_device_key(model.device),
    }


def record_precision_from_results(path: Path, results: "ResultsTable") -> None:
    """Record what the results say, for a job whose record is damaged, or that 0.1.0 began, which kept none."""
    import pyarrow.compute as pc

    if read_precision_record(path):
        return
    record: PrecisionRecord = {}
    for table in results.read(["node", "device_name", "precision", "degraded", "reused"]):
        usual = pc.and_(pc.equal(pc.list_value_length(table["degraded"]), 0), pc.is_null(table["reused"]))
        rows = table.filter(usual).group_by(["node", "device_name", "precision"]).aggregate([]).to_pylist()
        for row in rows:
            if row["precision"] in DTYPES:
                device = THREADS_SUFFIX.sub(")", row["device_name"] or "")
                record[f"{row['node']}/{device}"] = {"dtype": row["precision"], "reason": "its earlier images have it"}
    if record:
        write_precision_record(path, record)


def write_precision_record(path: Path, record: PrecisionRecord) -> None:
    write_atomically((json.dumps(record, indent=2) + "\n").encode(), path)


def update_precision_record(path: Path, description: Mapping[str, Any]) -> str | None:
    """Record what a worker that is ready computes in, if nothing is recorded yet.

    Returns why the worker must start again, where another one of its machine and device was quicker and chose another
    precision.
    """
    key, chosen = description["precision_key"], description["precision"]
    record = read_precision_record(path)
    recorded = record.get(key, {}).get("dtype")
    if recorded == chosen:
        return None
    if recorded is not None and recorded != description["precision_replaces"]:
        return f"chose {chosen}, where the job computes in {recorded} on {key}"
    logger.info("%s computes in %s: %s", key, chosen, description["precision_reason"])
    record[key] = {"dtype": chosen, "reason": description["precision_reason"]}
    write_precision_record(path, record)
    return None
