"""Write the tables of the documentation from the program: options, columns and exit codes.

    python -m docs.tables            rewrite the tables (`make docs`)
    python -m docs.tables --check    print what would change, and exit with 1 if anything would

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import typer

from tinysd_batch.cli import app
from tinysd_batch.errors import TinySDError
from tinysd_batch.job.manifest.columns import ALIASES, KNOWN_COLUMNS
from tinysd_batch.job.results.columns import COLUMNS
from tinysd_batch.settings.declaration import Panel
from tinysd_batch.settings.schema import COLUMN_SETTINGS

FOLDER = Path(__file__).parent
TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMANDS = ("submit", "plan", "status", "verify", "export", "txt2img", "quantize", "convert", "inspect")

MANIFEST_COLUMNS = {
    "prompt": "the text; `tabby cat:0.25 white duck:0.75 hybrid` mixes its parts by weight ([prompts](prompts.md))",
    "id": "your own name for the row, kept in the results",
    **{name: setting.column for name, setting in COLUMN_SETTINGS.items()},
}
EXIT_CODES = {
    0: "all images generated",
    1: "unexpected error; the job can be resumed",
    2: "command line, settings, model or manifest",
    3: "finished, but some rows are invalid or some images failed; `verify`: something differs",
    4: "another process works on this job",
    5: "disk full, a file, folder or standard output that cannot be written or read, no locks, or most images missing;"
    " resumable",
    6: "no worker could be started or is left, or the first images and a plain one all failed in the same way",
    129: "stopped because the terminal closed; resumable",
    130: "stopped by Ctrl-C; resumable",
    143: "stopped by SIGTERM; resumable",
}


def format_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), ["---"] * len(list(header)), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def manifest_columns() -> str:
    return format_table(["column", "meaning"], ([f"`{name}`", MANIFEST_COLUMNS[name]] for name in KNOWN_COLUMNS))


def column_aliases() -> str:
    rows = (
        [f"`{name}`", ", ".join(f"`{alias}`" for alias in ALIASES[name])] for name in KNOWN_COLUMNS if ALIASES.get(name)
    )
    return format_table(["column", "also called"], rows)


def describe_type(data_type: pa.DataType) -> str:
    if pa.types.is_list(data_type):
        return f"list of {describe_type(data_type.value_type)}"
    names = {"string": "text", "large_string": "text", "double": "float"}
    return "time (UTC)" if pa.types.is_timestamp(data_type) else names.get(str(data_type), str(data_type))


def result_columns() -> str:
    rows = ([f"`{column.name}`", describe_type(column.type), column.meaning] for column in COLUMNS)
    return format_table(["column", "type", "meaning"], rows)


def list_exit_codes() -> set[int]:
    """List the codes of all errors, and those of success, partial failure and signals."""

    def subclasses(error: type[TinySDError]) -> Iterator[type[TinySDError]]:
        yield error
        for subclass in error.__subclasses__():
            yield from subclasses(subclass)

    return {error.exit_code for error in subclasses(TinySDError)} | {0, 3, 129, 130, 143}


def exit_codes() -> str:
    return format_table(["exit code", "meaning"], ([str(code), EXIT_CODES[code]] for code in sorted(list_exit_codes())))


def get_commands() -> dict[str, Any]:
    """Return the commands by name. Typer carries a click of its own, so their classes are not click's."""
    group: Any = typer.main.get_command(app)
    return {name: group.commands[name] for name in COMMANDS}


def get_options(command: Any) -> dict[str, Any]:
    """Return the options of a command by their first name, without --help."""
    return {option.opts[0]: option for option in command.params if option.param_type_name == "option"}


def get_shared_options() -> list[str]:
    """Return the options that all commands which generate images share."""
    commands = get_commands()
    return [
        name
        for name in get_options(commands["submit"])
        if all(name in get_options(commands[c]) for c in ("plan", "txt2img"))
    ]


def option_row(option: Any) -> list[str]:
    """Return the names of an option, short ones last, and its help."""
    names = sorted([*option.opts, *option.secondary_opts], key=lambda name: len(name) == len("-o"))
    return [", ".join(f"`{name}`" for name in names), option.help]


def get_arguments(command: Any) -> list[Any]:
    """Return the arguments of a command that its help shows."""
    return [p for p in command.params if p.param_type_name == "argument" and p.help and p.metavar != ""]


def commands() -> str:
    rows = []
    for name, command in get_commands().items():
        arguments = " ".join(argument.name.upper() for argument in get_arguments(command))
        rows.append([f"[`tinysd-batch {name} {arguments}`](#{name})", inspect.cleandoc(command.help).split("\n\n")[0]])
    return format_table(["command", "what it does"], rows)


def options() -> str:
    shared = get_shared_options()
    parts = []
    for name, command in get_commands().items():
        paragraphs = inspect.cleandoc(command.help).split("\n\n")
        elsewhere = [*shared, *(get_options(get_commands()["submit"]) if name == "plan" else ())]
        own = [
            option
            for key, option in get_options(command).items()
            if key not in elsewhere or option.opts[0] == "--verbose"
        ]
        rows = [[f"`{argument.name.upper()}`", argument.help] for argument in get_arguments(command)]
        rows += [option_row(option) for option in own]
        also = " The [settings](#settings) apply, too." if set(shared) <= set(get_options(command)) else ""
        parts.append(f"## {name}\n\n{' '.join(paragraphs)}{also}\n\n{format_table(['option', 'meaning'], rows)}")
    intro = "Options of `submit`, `plan` and `txt2img`; with underscores they are keys of job files and presets, too."
    parts.append(f"## Settings\n\n{intro}\n")
    for panel in (None, *Panel):
        settings = [get_options(get_commands()["submit"])[name] for name in shared]
        rows = [option_row(option) for option in settings if option.rich_help_panel == panel]
        heading = f"### {panel}\n\n" if panel else ""
        parts.append(heading + format_table(["option", "meaning"], rows))
    return "\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "manifest columns": manifest_columns,
    "column aliases": column_aliases,
    "result columns": result_columns,
    "exit codes": exit_codes,
    "commands": commands,
    "options": options,
}


def fill_tables(text: str) -> str:
    """Return a page with its tables as the program is now."""
    return TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", text)


def find_differences() -> str:
    """Return a diff of the pages against what the program says now; empty if they agree."""
    diff: list[str] = []
    for page in sorted(FOLDER.glob("*.md")):
        before, after = page.read_text(encoding="utf-8"), fill_tables(page.read_text(encoding="utf-8"))
        diff += difflib.unified_diff(
            before.splitlines(True), after.splitlines(True), page.name, f"{page.name} (generated)"
        )
    return "".join(diff)


def main() -> None:
    if "--check" in sys.argv:
        difference = find_differences()
        sys.exit(f"{difference}\n`make docs` rewrites the tables." if difference else 0)
    for page in sorted(FOLDER.glob("*.md")):
        page.write_text(fill_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
