"""The command line. Each command parses its options, calls one function, prints and exits.

Heavy libraries are imported inside the commands, so that `--help` stays fast.
"""

import contextlib
import sys
from typing import Annotated

import typer

from tinysd_batch import __version__
from tinysd_batch.cli.convert import convert_command
from tinysd_batch.cli.export import export_command
from tinysd_batch.cli.inspect import inspect_command
from tinysd_batch.cli.plan import plan_command
from tinysd_batch.cli.quantize import quantize_command
from tinysd_batch.cli.status import status_command
from tinysd_batch.cli.submit import submit_command
from tinysd_batch.cli.terminal.help_sections import ManifestCommand, SectionedCommand
from tinysd_batch.cli.terminal.streams import name_standard_streams
from tinysd_batch.cli.txt2img import txt2img_command
from tinysd_batch.cli.verify import verify_command
from tinysd_batch.errors import StorageError, TinySDError
from tinysd_batch.text import make_printable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("submit", cls=ManifestCommand)(submit_command)
app.command("plan", cls=ManifestCommand)(plan_command)
app.command("status")(status_command)
app.command("verify")(verify_command)
app.command("export")(export_command)
app.command("txt2img", cls=SectionedCommand)(txt2img_command)
app.command("quantize")(quantize_command)
app.command("convert")(convert_command)
app.command("inspect")(inspect_command)


def print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"tinysd-batch {__version__}")
        raise typer.Exit


@app.callback()
def root_options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Generate images for a table of prompts with a 2-bit Stable Diffusion, on whatever cheap GPUs are at hand."""


def main() -> None:
    """Run a command. A `TinySDError` is printed as one line on stderr and ends in its own exit code."""
    with name_standard_streams():
        try:
            app()
        except TinySDError as error:
            print_error(str(error))
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print_error("stopped")
            sys.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except OSError as error:
            print_error(f"{error.filename or 'system'}: {error.strerror or error}")
            sys.exit(StorageError.exit_code if error.filename else 1)


def print_error(line: str) -> None:
    """Print an error to stderr; do nothing if stderr cannot be written either."""
    with contextlib.suppress(OSError):
        typer.echo(make_printable(f"tinysd-batch: {line}"), err=True)
