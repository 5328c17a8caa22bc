"""Print the result of `inspect`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from tinysd_batch.quantize.evaluate.inspect import Inspection
from tinysd_batch.report.formatting import print_line, to_one_line


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print name, type and digest, then a line for each component and for each of its layer types."""
    print_line(console, f"{to_one_line(inspection.name)}: {to_one_line(inspection.model_type)}")
    if inspection.refusal_reason:
        print_line(console, f"not usable by convert and quantize: {to_one_line(inspection.refusal_reason, 300)}")
    for note in inspection.notes:
        print_line(console, f"note: {to_one_line(note, 300)}")
    if inspection.digest:
        print_line(console, f"digest {inspection.digest}")
    if correction := inspection.noise_correction:
        timesteps = len(correction.knots)
        print_line(console, f"noise correction, measured at {timesteps:,} timesteps with scale {correction.scale:g}")
    table = Table("component", "tensors", "weights", "bits each", "bytes", "stored as", box=None, pad_edge=False)
    for column in table.columns[1:5]:
        column.justify = "right"
    for component in inspection.components:
        dtypes = ", ".join(f"{name} ({count:,})" for name, count in sorted(component.dtypes.items()))
        bits = f"{8 * component.bytes / component.weights:.2f}" if component.weights else ""
        weights = format_millions(component.weights)
        table.add_row(component.name, f"{component.tensors:,}", weights, bits, f"{component.bytes:,}", dtypes)
        for group in component.layer_groups.values():
            weights = format_millions(group.weights)
            table.add_row(f"  {group.name}", "", weights, f"{group.bits:.2f}", f"{group.bytes:,}", "")
    console.print(table)


def inspection_as_dict(inspection: Inspection) -> dict[str, Any]:
    """Return the JSON of `inspect --json`, whose keys do not change between versions."""
    components = [
        {
            "name": component.name,
            "tensors": component.tensors,
            "weights": component.weights,
            "bytes": component.bytes,
            "dtypes": component.dtypes,
            "layers": {
                group.name: {"weights": group.weights, "bytes": group.bytes, "bits": round(group.bits, 3)}
                for group in component.layer_groups.values()
            },
        }
        for component in inspection.components
    ]
    return {
        "path": inspection.path,
        "name": inspection.name,
        "kind": inspection.model_type,
        "refused": inspection.refusal_reason,
        "digest": inspection.digest,
        "noise_correction": inspection.noise_correction and inspection.noise_correction.model_dump(),
        "parts": components,
        "notes": inspection.notes,
        "fault": inspection.unusable_reason,
    }


def format_millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
