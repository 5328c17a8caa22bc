"""Columns of the results table and their types."""

from collections.abc import Iterable

import pyarrow as pa

from tinysd_batch.errors import ManifestError
from tinysd_batch.text import excerpt

SCHEMA_VERSION = "1"
COVERED_PARTS_KEY = b"tinysd_covers"  # metadata of a sealed file: names of the journal parts that it contains
TIMESTAMP = pa.timestamp("us", tz="UTC")
RESULT_FIELDS = [
    pa.field("index", pa.int64()),
    pa.field("row", pa.int64()),
    pa.field("sample", pa.int32()),
    pa.field("id", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("negative_prompt", pa.string()),
    pa.field("prompt_syntax", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("steps", pa.int32()),
    pa.field("sampler", pa.string()),
    pa.field("scale", pa.float64()),
    pa.field("eta", pa.float64()),
    pa.field("image_id", pa.string()),
    pa.field("status", pa.string()),
    pa.field("file_name", pa.string()),
    pa.field("sha256", pa.string()),
    pa.field("bytes", pa.int64()),
    pa.field("error_class", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("attempts", pa.int32()),
    pa.field("degraded", pa.list_(pa.string())),
    pa.field("n_tokens", pa.int32()),
    pa.field("truncated", pa.string()),
    pa.field("negative_truncated", pa.string()),
    pa.field("model", pa.string()),
    pa.field("model_digest", pa.string()),
    pa.field("precision", pa.string()),
    pa.field("device_name", pa.string()),
    pa.field("worker", pa.string()),
    pa.field("node", pa.string()),
    pa.field("text_s", pa.float64()),
    pa.field("denoise_s", pa.float64()),
    pa.field("decode_s", pa.float64()),
    pa.field("peak_memory_bytes", pa.int64()),
    pa.field("started_at", TIMESTAMP),
    pa.field("finished_at", TIMESTAMP),
    pa.field("run_id", pa.string()),
    pa.field("version", pa.string()),
    pa.field("reused", pa.string()),
]
RESERVED_COLUMNS = {field.name for field in RESULT_FIELDS}


def check_result_columns(schema: pa.Schema) -> None:
    """Raise ValueError if one of `RESULT_FIELDS` is missing or has another type."""
    for field in RESULT_FIELDS:
        position = schema.get_field_index(field.name)
        if position < 0 or schema.field(position).type != field.type:
            raise ValueError(f"column {field.name} is not the {field.type} column that submit writes")


def build_results_schema(extra: Iterable[pa.Field]) -> pa.Schema:
    """Return the schema of a job: `RESULT_FIELDS`, then the extra columns of its manifest.

    An extra column with a reserved name becomes `manifest_<name>`.

    Raises:
        ManifestError: Two columns would have the same name.
    """
    fields = list(RESULT_FIELDS)
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
