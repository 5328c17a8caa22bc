"""What `inspect` prints."""

from typing import Any

from rich.console import Console
from rich.table import Table

from tinysd_batch.quantize.evaluate.inspect import Inspection
from tinysd_batch.report.formatting import one_line, say


def print_inspection(found: Inspection, console: Console) -> None:
    """Name, kind and digest, then a line for each part and for each sort of its layers."""
    say(console, f"{one_line(found.name)}: {one_line(found.kind)}")
    if found.refused:
        say(console, f"not taken by convert and quantize: {one_line(found.refused, 300)}")
    for note in found.notes:
        say(console, f"note: {one_line(note, 300)}")
    if found.digest:
        say(console, f"digest {found.digest}")
    if found.correction:
        times = len(found.correction.knots)
        say(console, f"corrects its noise, as measured at {times:,} times and scale {found.correction.scale:g}")
    table = Table("part", "tensors", "weights", "bits each", "bytes", "stored as", box=None, pad_edge=False)
    for column in table.columns[1:5]:
        column.justify = "right"
    for part in found.parts:
        types = ", ".join(f"{name} ({count:,})" for name, count in sorted(part.dtypes.items()))
        bits = f"{8 * part.bytes / part.weights:.2f}" if part.weights else ""
        table.add_row(part.name, f"{part.tensors:,}", millions(part.weights), bits, f"{part.bytes:,}", types)
        for each in part.classes.values():
            table.add_row(f"  {each.name}", "", millions(each.weights), f"{each.bits:.2f}", f"{each.bytes:,}", "")
    console.print(table)


def inspection_as_dict(found: Inspection) -> dict[str, Any]:
    """The same for machines."""
    parts = [
        {"name": part.name, "tensors": part.tensors, "weights": part.weights, "bytes": part.bytes,
         "dtypes": part.dtypes,
         "layers": {each.name: {"weights": each.weights, "bytes": each.bytes, "bits": round(each.bits, 3)}
                    for each in part.classes.values()}}
        for part in found.parts
    ]  # fmt: skip
    correction = found.correction and found.correction.model_dump()
    return {
        "path": found.path, "name": found.name, "kind": found.kind, "refused": found.refused,
        "digest": found.digest, "noise_correction": correction, "parts": parts,
        "notes": found.notes, "fault": found.fault,
    }  # fmt: skip


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
