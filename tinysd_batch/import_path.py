"""Remove the current folder and the script's folder from the import path, because either may hold untrusted files.

Python puts one of them first, and an empty or relative entry of PYTHONPATH means the current folder, too. A folder that
PYTHONPATH names by its absolute path stays. This module imports only modules that Python loads before the import path
is set up.
"""

import os
import sys

PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
STANDARD_LIBRARY = os.path.dirname(os.path.abspath(os.__file__))  # noqa: PTH100, PTH120


def restrict_import_path() -> None:
    """Restrict this process's import path. Only the command line does so: a program that imports us keeps its path."""
    chosen = select_absolute_entries(os.environ.get("PYTHONPATH", ""))
    if "PYTHONPATH" in os.environ:  # for processes that this one starts
        os.environ["PYTHONPATH"] = os.pathsep.join(chosen)
    sys.path[:] = filter_trusted(sys.path, [get_current_folder(), get_script_folder()], chosen)


def filter_trusted(entries: list[str], untrusted: list[str], chosen: list[str]) -> list[str]:
    """Return the entries without untrusted folders. If this package's own folder is one of them, it becomes the last.

    Args:
        entries: the import path.
        untrusted: folders to remove, with links resolved.
        chosen: folders that the user has named in PYTHONPATH, which stay.
    """
    allowed = {*chosen, *get_installed_folders()}
    kept = [
        entry
        for entry in entries
        if is_absolute(entry) and (entry in allowed or resolve_folder(entry) not in untrusted)
    ]
    return kept if PACKAGE_ROOT in map(resolve_folder, kept) or PACKAGE_ROOT in kept else [*kept, PACKAGE_ROOT]


def get_installed_folders() -> list[str]:
    """Return the folders of Python and its packages. The current folder may be one of them."""
    site = sys.modules.get("site")
    return [STANDARD_LIBRARY, *(site.getsitepackages() if site is not None else [])]


def select_absolute_entries(python_path: str) -> list[str]:
    """Return the entries of PYTHONPATH without empty and relative ones."""
    return [entry for entry in python_path.split(os.pathsep) if is_absolute(entry)]


def is_absolute(entry: str) -> bool:
    return entry.startswith("/")


def resolve_folder(folder: str) -> str:
    return os.path.realpath(folder)


def get_current_folder() -> str:
    """Return the current folder, or an empty string if it was deleted."""
    try:
        return resolve_folder(os.getcwd())  # noqa: PTH109
    except OSError:
        return ""


def get_script_folder() -> str:
    """Return the script's folder, or an empty string if there is none, as with `python -c`."""
    script = sys.argv[0] if sys.argv else ""
    return os.path.dirname(resolve_folder(script)) if os.path.isfile(script) else ""  # noqa: PTH113, PTH120
