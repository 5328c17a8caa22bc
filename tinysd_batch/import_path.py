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
    named = select_absolute_entries(os.environ.get("PYTHONPATH", ""))
    if "PYTHONPATH" in os.environ:  # for the processes that this one starts
        os.environ["PYTHONPATH"] = os.pathsep.join(named)
    sys.path[:] = filter_trusted(sys.path, [get_current_folder(), get_script_folder()], named)


def filter_trusted(entries: list[str], untrusted: list[str], named: list[str]) -> list[str]:
    """The entries without the untrusted folders; the folder of this package goes last where it was one of them."""
    allowed = {*named, *get_installed_folders()}
    kept = [
        entry
        for entry in entries
        if is_absolute(entry) and (entry in allowed or resolve_folder(entry) not in untrusted)
    ]
    return kept if PACKAGE_ROOT in map(resolve_folder, kept) or PACKAGE_ROOT in kept else [*kept, PACKAGE_ROOT]


def get_installed_folders() -> list[str]:
    """Where Python and its packages are, in which somebody may stand, too."""
    site = sys.modules.get("site")
    return [STANDARD_LIBRARY, *(site.getsitepackages() if site is not None else [])]


def select_absolute_entries(python_path: str) -> list[str]:
    """PYTHONPATH without its empty and relative entries."""
    return [entry for entry in python_path.split(os.pathsep) if is_absolute(entry)]


def is_absolute(entry: str) -> bool:
    return entry.startswith("/")


def resolve_folder(folder: str) -> str:
    return os.path.realpath(folder)


def get_current_folder() -> str:
    """Empty where it is gone."""
    try:
        return resolve_folder(os.getcwd())  # noqa: PTH109
    except OSError:
        return ""


def get_script_folder() -> str:
    """Empty where there is no script, as with `python -c`."""
    script = sys.argv[0] if sys.argv else ""
    return os.path.dirname(resolve_folder(script)) if os.path.isfile(script) else ""  # noqa: PTH113, PTH120
