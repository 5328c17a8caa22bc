"""`tinysd-batch export`: write the results table for programs that cannot read Parquet."""

from pathlib import Path
from typing import Annotated

import typer

from tinysd_batch.text import make_printable


def export_command(
    job: Annotated[Path, typer.Argument(help="The job folder that submit printed.")],
    table: Annotated[Path, typer.Argument(help="The file to write: .csv, .tsv or .jsonl.")],
) -> None:
    """Write a job's results as CSV, TSV or JSON Lines."""
    from tinysd_batch.export.table import export_table

    rows = export_table(job, table)
    typer.echo(make_printable(f"{table}: {rows:,} rows"))
