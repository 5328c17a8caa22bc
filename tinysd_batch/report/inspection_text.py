"""What `inspect` prints."""

from typing import Any

from rich.console import Console
from rich.table import Table

from tinysd_batch.quantize.evaluate.inspect import Inspection
from tinysd_batch.report.formatting import print_line, to_one_line


def print_inspection(found: Inspection, console: Console) -> None:
    """Name, kind and digest, then a line for each part and for each sort of its layers."""
    print_line(console, f"{to_one_line(found.name)}: {to_one_line(found.model_type)}")
    if found.refusal_reason:
        print_line(console, f"not taken by convert and quantize: {to_one_line(found.refusal_reason, 300)}")
    for note in found.notes:
        print_line(console, f"note: {to_one_line(note, 300)}")
    if found.digest:
        print_line(console, f"digest {found.digest}")
    if found.noise_correction:
        times = len(found.noise_correction.knots)
        print_line(
            console, f"corrects its noise, as measured at {times:,} times and scale {found.noise_correction.scale:g}"
        )
    table = Table("part", "tensors", "weights", "bits each", "bytes", "stored as", box=None, pad_edge=False)
    for column in table.columns[1:5]:
        column.justify = "right"
    for part in found.components:
        types = ", ".join(f"{name} ({count:,})" for name, count in sorted(part.dtypes.items()))
        bits = f"{8 * part.bytes / part.weights:.2f}" if part.weights else ""
        table.add_row(part.name, f"{part.tensors:,}", format_millions(part.weights), bits, f"{part.bytes:,}", types)
        for each in part.layer_groups.values():
            table.add_row(
                f"  {each.name}", "", format_millions(each.weights), f"{each.bits:.2f}", f"{each.bytes:,}", ""
            )
    console.print(table)


def inspection_as_dict(found: Inspection) -> dict[str, Any]:
    """The same for machines."""
    parts = [
        {"name": part.name, "tensors": part.tensors, "weights": part.weights, "bytes": part.bytes,
         "dtypes": part.dtypes,
         "layers": {each.name: {"weights": each.weights, "bytes": each.bytes, "bits": round(each.bits, 3)}
                    for each in part.layer_groups.values()}}
        for part in found.components
    ]  # fmt: skip
    correction = found.noise_correction and found.noise_correction.model_dump()
    return {
        "path": found.path, "name": found.name, "kind": found.model_type, "refused": found.refusal_reason,
        "digest": found.digest, "noise_correction": correction, "parts": parts,
        "notes": found.notes, "fault": found.unusable_reason,
    }  # fmt: skip


def format_millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
