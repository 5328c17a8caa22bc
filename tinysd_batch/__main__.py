"""Entry point of the commands `tinysd-batch` and `python -m tinysd_batch`."""

import os
import sys

from tinysd_batch.import_path import restrict_import_path

USAGE_ERROR = 2


def main() -> None:
    """Prepare the process, then run the command line."""
    restrict_import_path()  # before anything else is imported
    open_closed_streams()
    check_current_folder()
    from tinysd_batch.cli import main as run_command_line

    run_command_line()


def open_closed_streams() -> None:
    """Open closed standard streams (`2>&-`), so that no other file gets their descriptors."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - open until the end


def check_current_folder() -> None:
    """Exit if the current folder was deleted; libraries would fail with unclear messages."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        sys.stderr.write("tinysd-batch: the current folder was deleted; change to another one and try again\n")
        sys.exit(USAGE_ERROR)


if __name__ == "__main__":
    main()
