"""Match the columns of a manifest to the known ones, under our names or those of other programs."""

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tinysd_batch.errors import ManifestError
from tinysd_batch.settings.schema import COLUMN_SETTINGS
from tinysd_batch.text import excerpt, has_surrogates, normalize_text

PROMPT_ALIASES = ("text", "caption")
KNOWN_COLUMNS = ("prompt", "id", *COLUMN_SETTINGS)
ALIASES = {"prompt": PROMPT_ALIASES, **{name: setting.aliases for name, setting in COLUMN_SETTINGS.items()}}
COLUMN_BY_NAME = {name.lower(): column for column in KNOWN_COLUMNS for name in (column, *ALIASES.get(column, ()))}
INTEGER_COLUMNS = tuple(name for name, setting in COLUMN_SETTINGS.items() if setting.value_type.option_type is int)
FLOAT_COLUMNS = tuple(name for name, setting in COLUMN_SETTINGS.items() if setting.value_type.option_type is float)
MAX_NAME_CHARACTERS = 1000
MAX_COLUMNS = 1000
MIN_SIMILARITY = 0.8  # difflib's ratio; below it a name is a different word rather than a typo


class ColumnError(ValueError):
    """Column names that cannot be used. The message says why."""


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """The columns of a table, or the keys of an object."""

    names: tuple[str, ...]  # in the manifest's order: our names of known columns, the manifest's names of others
    source_names: dict[str, str]  # our name -> the manifest's name, for messages; known columns only
    unknown: tuple[str, ...]  # the manifest's names of unknown columns


@lru_cache(maxsize=64)  # the objects of a JSONL file mostly have the same keys
def match_columns(names: tuple[str, ...], own: frozenset[str] = frozenset()) -> ColumnMapping:
    """Match a manifest's column names to the known columns.

    Args:
        names: The names in the manifest.
        own: Names that stay the manifest's own, because its job was started when no column was known by them.

    Raises:
        ColumnError: The names cannot be used.
    """
    check_column_names(names)
    candidates: dict[str, list[str]] = {}
    for name in names:
        if normalize_text(name) not in own and (column := find_column(name)):
            candidates.setdefault(column, []).append(name)
    known = {choose_column_name(column, spellings): column for column, spellings in candidates.items()}
    extra = {name: normalize_text(name) for name in names if name not in known}
    reject_duplicate_columns([name for name in extra.values() if name])
    return ColumnMapping(
        names=tuple(known.get(name) or extra[name] for name in names),
        source_names={column: normalize_text(name).strip() for name, column in known.items()},
        unknown=tuple(name for name in extra.values() if name),
    )


def check_column_names(names: tuple[str, ...]) -> None:
    """Raise ColumnError for names that cannot be used. Columns without a name are checked where they hold a value."""
    named = [name for name in names if name]
    if len(named) > MAX_COLUMNS:
        raise ColumnError(f"{len(named)} columns, at most {MAX_COLUMNS}; remove those that are not needed")
    for name in named:
        if has_surrogates(name):
            raise ColumnError("not UTF-8; save the file as UTF-8")
        if "\0" in name or len(name) > MAX_NAME_CHARACTERS:
            rule = f"at most {MAX_NAME_CHARACTERS} characters, without NUL"
            raise ColumnError(f"column {excerpt(name)}: a name has {rule}")
    reject_duplicate_columns(named)


def reject_duplicate_columns(names: list[str]) -> None:
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise ColumnError(f"column {excerpt(min(duplicates))} appears twice; rename one")


def normalize_column_name(name: str) -> str:
    return normalize_text(name).strip().lower().replace(" ", "_").replace("-", "_")


def find_column(name: str) -> str | None:
    """Return the known column of that name or alias, None if there is none."""
    return COLUMN_BY_NAME.get(normalize_column_name(name))


def choose_column_name(column: str, spellings: list[str]) -> str:
    """Return the name to use where several mean the same column.

    Tables often have a prompt and a caption column: there the name closest to "prompt" wins. Two names of any other
    column are an error.
    """
    if column == "prompt":
        priority = ("prompt", *PROMPT_ALIASES)
        best = min(priority.index(normalize_column_name(name)) for name in spellings)
        spellings = [name for name in spellings if normalize_column_name(name) == priority[best]]
    if len(spellings) > 1:
        raise ColumnError(f"columns {excerpt(spellings[0])} and {excerpt(spellings[1])} both mean {column}; keep one")
    return spellings[0]


def reject_unknown_columns(columns: ColumnMapping) -> None:
    """Raise ColumnError where there are unknown columns."""
    if columns.unknown:
        first, more = columns.unknown[:8], len(columns.unknown) - 8
        similar = find_near_misses(first)
        listed = ", ".join(
            excerpt(name) + (f" (did you mean {similar[name]}?)" if name in similar else "") for name in first
        )
        counted = f"{listed} and {more} more" if more > 0 else listed
        raise ColumnError(f"unknown column {counted}; rename or remove it, or leave out --strict")


def find_near_misses(names: Iterable[str]) -> dict[str, str]:
    """Map unknown names that look like typos to the known names that were probably meant."""
    near_misses = {}
    for name in names:
        matches = difflib.get_close_matches(
            normalize_column_name(name[:MAX_NAME_CHARACTERS]), COLUMN_BY_NAME, n=1, cutoff=MIN_SIMILARITY
        )
        if matches and normalize_column_name(name) not in COLUMN_BY_NAME:
            near_misses[name] = matches[0]
    return near_misses


def match_table_columns(
    path: Path, names: Iterable[str], strict: bool, own: frozenset[str] = frozenset()
) -> ColumnMapping:
    """Match the columns of a file with a header. Raises ManifestError, also where no column is the prompt."""
    header = tuple(names)
    try:
        columns = match_columns(header, own)
        if "prompt" not in columns.source_names:
            raise ColumnError(f"no column named prompt; found {format_names(header)}{suggest_unquoting(header)}")
        if strict:
            reject_unknown_columns(columns)
    except ColumnError as error:
        raise ManifestError(f"{path}: header: {error}") from None
    return columns


def format_names(names: Iterable[str]) -> str:
    """Return the first eight names, quoted."""
    return ", ".join(excerpt(name, 20) for name in [name for name in names if name][:8]) or "nothing"


def suggest_unquoting(header: tuple[str, ...]) -> str:
    """Return the end of a message about a header that is quoted as a whole, "" for any other header."""
    if len(header) == 1 and any(separator in header[0] for separator in ",;\t"):
        return "; the whole line is one cell: save the file again without quotes around its lines"
    return ""
