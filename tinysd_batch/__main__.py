"""Entry point of the command `tinysd-batch` and of `python -m tinysd_batch`."""

import os
import sys

from tinysd_batch.import_path import restrict_import_path

USAGE_ERROR = 2


def main() -> None:
    """Make the process safe to work in, then run the command line."""
    restrict_import_path()  # before anything else is imported
    open_closed_streams()
    check_current_folder()
    from tinysd_batch.cli import main as run

    run()


def open_closed_streams() -> None:
    """A stream that was closed (`2>&-`) must not become the descriptor of a file that is opened later."""
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - open until the end


def check_current_folder() -> None:
    """Libraries end the process with messages of their own where the current folder was removed."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        sys.stderr.write("tinysd-batch: the current folder is gone; change to one that exists, and try again\n")
        sys.exit(USAGE_ERROR)


if __name__ == "__main__":
    main()
