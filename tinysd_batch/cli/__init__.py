"""The command line. Each command parses, calls one function, prints, and exits; heavy imports happen inside."""

import contextlib
import sys
from typing import Annotated

import typer

from tinysd_batch.cli.convert import convert
from tinysd_batch.cli.export import export
from tinysd_batch.cli.hints import ManifestCommand
from tinysd_batch.cli.inspect import inspect
from tinysd_batch.cli.plan import plan
from tinysd_batch.cli.quantize import quantize
from tinysd_batch.cli.status import status
from tinysd_batch.cli.submit import submit
from tinysd_batch.cli.terminal.streams import name_standard_streams
from tinysd_batch.cli.txt2img import txt2img
from tinysd_batch.cli.verify import verify
from tinysd_batch.errors import StorageError, TinySDError
from tinysd_batch.text import make_printable
from tinysd_batch.version import __version__

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command(cls=ManifestCommand)(submit)
app.command(cls=ManifestCommand)(plan)
app.command()(status)
app.command()(verify)
app.command()(export)
app.command()(txt2img)
app.command()(quantize)
app.command()(convert)
app.command()(inspect)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tinysd-batch {__version__}")
        raise typer.Exit


@app.callback()
def root_options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Turn a table of prompts into pictures with a 2-bit Stable Diffusion, on whatever cheap cards are at hand."""


def main() -> None:
    """Run a command; an error of ours is one line on stderr and its own exit code."""
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
    """Print an error to stderr, unless that cannot be written either."""
    with contextlib.suppress(OSError):
        typer.echo(make_printable(f"tinysd-batch: {line}"), err=True)
