"""Keep the current folder and the script's folder off the import path: either may hold anybody's files.

Python puts one of them first, and an empty or relative entry of PYTHONPATH means the current folder, too. A folder that
PYTHONPATH names by its absolute path stays, whatever it is. This module itself imports only what Python has loaded
before there is an import path.
"""

import os
import sys

PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
STANDARD_LIBRARY = os.path.dirname(os.path.abspath(os.__file__))  # noqa: PTH100, PTH120


def restrict_import_path() -> None:
    """Apply it to this process, which is one of the command line: a program that imports us keeps its path."""
    named = absolute_entries(os.environ.get("PYTHONPATH", ""))
    if "PYTHONPATH" in os.environ:  # for the processes that this one starts
        os.environ["PYTHONPATH"] = os.pathsep.join(named)
    sys.path[:] = trusted(sys.path, [current_folder(), script_folder()], named)


def trusted(entries: list[str], untrusted: list[str], named: list[str]) -> list[str]:
    """The entries without the untrusted folders; the folder of this package goes last where it was one of them."""
    allowed = {*named, *installed_folders()}
    kept = [entry for entry in entries if is_absolute(entry) and (entry in allowed or real(entry) not in untrusted)]
    return kept if PACKAGE_ROOT in map(real, kept) or PACKAGE_ROOT in kept else [*kept, PACKAGE_ROOT]


def installed_folders() -> list[str]:
    """Where Python and its packages are, in which somebody may stand, too."""
    site = sys.modules.get("site")
    return [STANDARD_LIBRARY, *(site.getsitepackages() if site is not None else [])]


def absolute_entries(python_path: str) -> list[str]:
    """PYTHONPATH without its empty and relative entries."""
    return [entry for entry in python_path.split(os.pathsep) if is_absolute(entry)]


def is_absolute(entry: str) -> bool:
    return entry.startswith("/")


def real(folder: str) -> str:
    return os.path.realpath(folder)


def current_folder() -> str:
    """Empty where it is gone."""
    try:
        return real(os.getcwd())  # noqa: PTH109
    except OSError:
        return ""


def script_folder() -> str:
    """Empty where there is no script, as with `python -c`."""
    script = sys.argv[0] if sys.argv else ""
    return os.path.dirname(real(script)) if os.path.isfile(script) else ""  # noqa: PTH113, PTH120
