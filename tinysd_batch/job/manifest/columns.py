"""Column names: ours, what other programs call them, and which of a manifest's columns is which."""

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tinysd_batch.errors import ManifestError
from tinysd_batch.text import excerpt, has_surrogates, normalize_text

KNOWN_COLUMNS = (
    "prompt",
    "id",
    "negative_prompt",
    "prompt_syntax",
    "seed",
    "height",
    "width",
    "steps",
    "scale",
    "sampler",
    "eta",
    "n_iter",
    "n_samples",
)
ALIASES = {
    "prompt": ("text", "caption"),
    "negative_prompt": ("negative",),
    "height": ("h",),
    "width": ("w",),
    "steps": ("num_inference_steps", "ddim_steps", "step"),
    "scale": ("cfg_scale", "guidance_scale", "cfg"),
    "sampler": ("sampler_name",),
    "eta": ("ddim_eta",),
    "n_samples": ("num_images", "num_images_per_prompt", "batch_size"),
}
COLUMN_BY_NAME = {name: column for column in KNOWN_COLUMNS for name in (column, *ALIASES.get(column, ()))}
MAX_NAME_CHARACTERS = 1000
MAX_COLUMNS = 1000
INTEGER_COLUMNS = ("seed", "height", "width", "steps", "n_iter", "n_samples")
FLOAT_COLUMNS = ("scale", "eta")
MIN_SIMILARITY = 0.8  # of 1, as difflib measures; below it a name is another word rather than a slip


class ColumnError(ValueError):
    """Column names that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """The columns of a table, or the keys of an object."""

    names: tuple[str, ...]  # in the manifest's order: our name for what we know, the manifest's own for the rest
    source_names: dict[str, str]  # our name -> the manifest's, for messages
    unknown: tuple[str, ...]


@lru_cache(maxsize=64)  # the objects of a JSONL file mostly have the same keys
def match_columns(names: tuple[str, ...]) -> ColumnMapping:
    """Which column is which. Raises ColumnError."""
    check_column_names(names)
    found: dict[str, list[str]] = {}
    for name in names:
        if column := find_column(name):
            found.setdefault(column, []).append(name)
    taken = {choose_column_name(column, spellings): column for column, spellings in found.items()}
    carried = {name: normalize_text(name) for name in names if name not in taken}
    reject_duplicate_columns([name for name in carried.values() if name])
    return ColumnMapping(
        names=tuple(taken.get(name) or carried[name] for name in names),
        source_names={column: normalize_text(name).strip() for name, column in taken.items()},
        unknown=tuple(name for name in carried.values() if name),
    )


def check_column_names(names: tuple[str, ...]) -> None:
    """ColumnMapping without a name are looked at where they hold something."""
    named = [name for name in names if name]
    if len(named) > MAX_COLUMNS:
        raise ColumnError(f"{len(named)} columns, at most {MAX_COLUMNS}; leave out what is not needed")
    for name in named:
        if has_surrogates(name):
            raise ColumnError("not UTF-8; save the file as UTF-8")
        if "\0" in name or len(name) > MAX_NAME_CHARACTERS:
            rule = f"at most {MAX_NAME_CHARACTERS} characters, without NUL"
            raise ColumnError(f"column {excerpt(name)}: a name has {rule}")
    reject_duplicate_columns(named)


def reject_duplicate_columns(names: list[str]) -> None:
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ColumnError(f"column {excerpt(min(doubled))} stands there twice; rename one")


def normalize_column_name(name: str) -> str:
    return normalize_text(name).strip().lower().replace(" ", "_").replace("-", "_")


def find_column(name: str) -> str | None:
    """Our column of that name, if there is one."""
    return COLUMN_BY_NAME.get(normalize_column_name(name))


def choose_column_name(column: str, spellings: list[str]) -> str:
    """The one that counts. Captions often stand beside prompts, so there the better name wins."""
    if column == "prompt":
        order = ("prompt", *ALIASES["prompt"])
        best = min(order.index(normalize_column_name(name)) for name in spellings)
        spellings = [name for name in spellings if normalize_column_name(name) == order[best]]
    if len(spellings) > 1:
        raise ColumnError(f"columns {excerpt(spellings[0])} and {excerpt(spellings[1])} both mean {column}; keep one")
    return spellings[0]


def reject_unknown_columns(columns: ColumnMapping) -> None:
    """Raise ColumnError when there are columns that nothing is made of."""
    if columns.unknown:
        first, more = columns.unknown[:8], len(columns.unknown) - 8
        meant = find_near_misses(first)
        named = ", ".join(excerpt(one) + (f" (did you mean {meant[one]}?)" if one in meant else "") for one in first)
        counted = f"{named} and {more} more" if more > 0 else named
        raise ColumnError(f"unknown column {counted}; rename or remove it, or leave out --strict")


def find_near_misses(names: Iterable[str]) -> dict[str, str]:
    """Unknown names that look like slips -> what was probably meant."""
    found = {}
    for name in names:
        alike = difflib.get_close_matches(
            normalize_column_name(name[:MAX_NAME_CHARACTERS]), COLUMN_BY_NAME, n=1, cutoff=MIN_SIMILARITY
        )
        if alike and normalize_column_name(name) not in COLUMN_BY_NAME:
            found[name] = alike[0]
    return found


def match_table_columns(path: Path, names: Iterable[str], strict: bool) -> ColumnMapping:
    """The columns of a file that names them once. Raises ManifestError."""
    header = tuple(names)
    try:
        columns = match_columns(header)
        if "prompt" not in columns.source_names:
            raise ColumnError(f"no column named prompt; found {format_names(header)}{suggest_unquoting(header)}")
        if strict:
            reject_unknown_columns(columns)
    except ColumnError as error:
        raise ManifestError(f"{path}: header: {error}") from None
    return columns


def format_names(names: Iterable[str]) -> str:
    return ", ".join(excerpt(name, 20) for name in [name for name in names if name][:8]) or "nothing"


def suggest_unquoting(header: tuple[str, ...]) -> str:
    if len(header) == 1 and any(separator in header[0] for separator in ",;\t"):
        return "; the whole line is one cell: save the file again, without quotes around its lines"
    return ""
