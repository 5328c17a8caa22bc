"""Schemas of the files of the results table: the columns of a job, and those that a file of another version has."""

import json
from collections.abc import Iterable

import pyarrow as pa

from tinysd_batch.errors import ManifestError
from tinysd_batch.job.results.columns import COLUMN_FIELDS, ORIGINAL_COLUMNS, RESERVED_COLUMNS
from tinysd_batch.text import excerpt

SCHEMA_VERSION = "1"
# Metadata of the files.
VERSION_KEY = b"tinysd_schema"
COVERED_PARTS_KEY = b"tinysd_covers"  # of a sealed file: names of the journal parts that it contains
RESERVED_KEY = b"tinysd_columns"  # names of the columns that are not the manifest's own; missing in files of 0.1.0
FILE_METADATA = {VERSION_KEY: SCHEMA_VERSION.encode(), RESERVED_KEY: json.dumps(sorted(RESERVED_COLUMNS)).encode()}


def read_reserved_columns(schema: pa.Schema) -> frozenset[str]:
    """Return the names of a file's columns that are not the manifest's own. Raises ValueError for damaged metadata."""
    stored = (schema.metadata or {}).get(RESERVED_KEY)
    if stored is None:
        return ORIGINAL_COLUMNS
    names = json.loads(stored)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its list of columns is damaged")
    return frozenset(names)


def check_result_columns(schema: pa.Schema) -> None:
    """Raise ValueError if a column that the file must have is missing or has another type."""
    reserved = read_reserved_columns(schema)
    for field in COLUMN_FIELDS:
        position = schema.get_field_index(field.name)
        if field.name in reserved and (position < 0 or schema.field(position).type != field.type):
            raise ValueError(f"column {field.name} is not the {field.type} column that submit writes")


def list_current_names(schema: pa.Schema) -> list[str]:
    """Return the names that a file's columns have now.

    A column of the manifest keeps its values and type when a version of the program has a column of that name.
    """
    reserved = read_reserved_columns(schema)
    return [name if name in reserved else extra_column_name(name) for name in schema.names]


def build_results_schema(extra: Iterable[pa.Field]) -> pa.Schema:
    """Return the schema of a job: the columns of every job, then the extra columns of its manifest.

    An extra column with a reserved name becomes `manifest_<name>`.

    Raises:
        ManifestError: Two columns would have the same name.
    """
    fields = list(COLUMN_FIELDS)
    for field in extra:
        fields.append(field.with_name(extra_column_name(field.name)))
        if [known.name for known in fields].count(fields[-1].name) > 1:
            name = excerpt(field.name)
            raise ManifestError(
                f"the manifest's column {name} becomes {fields[-1].name} in the results, which is taken"
            )
    return pa.schema(fields)


def keep_earlier_columns(schema: pa.Schema, older: Iterable[pa.Schema]) -> pa.Schema:
    """Extend a schema with the extra columns of older tables, so that none changes its type or is dropped."""
    earlier: dict[str, pa.Field] = {}
    for table in older:
        for field in table:
            if field.name not in RESERVED_COLUMNS:
                earlier.setdefault(field.name, field)
    fields = [earlier.pop(field.name, field) for field in schema]
    return pa.schema([*fields, *earlier.values()])


def extra_column_name(name: str) -> str:
    """Return the name in the results of an extra column of the manifest."""
    return f"manifest_{name}" if name in RESERVED_COLUMNS else name
