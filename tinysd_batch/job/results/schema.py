"""The columns of the results table and their types."""

from collections.abc import Iterable

import pyarrow as pa

from tinysd_batch.errors import ManifestError
from tinysd_batch.text import excerpt

COVERED_PARTS_KEY = b"tinysd_covers"

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


def check_result_columns(schema: pa.Schema) -> None:
    """Raises ValueError where one of our columns is missing or holds something else."""
    for field in RESULT_FIELDS:
        position = schema.get_field_index(field.name)
        if position < 0 or schema.field(position).type != field.type:
            raise ValueError(f"column {field.name} is not the {field.type} that was written")


SCHEMA_VERSION = "1"


RESERVED_COLUMNS = {field.name for field in RESULT_FIELDS}


def build_results_schema(extra: Iterable[pa.Field]) -> pa.Schema:
    """Our columns, then the manifest's own; one of those that bears a name of ours becomes `manifest_<name>`."""
    fields = list(RESULT_FIELDS)
    for field in extra:
        fields.append(field.with_name(extra_column_name(field.name)))
        if [one.name for one in fields].count(fields[-1].name) > 1:
            name = excerpt(field.name)
            raise ManifestError(
                f"the manifest's column {name} becomes {fields[-1].name} in the results, which is taken"
            )
    return pa.schema(fields)


def keep_earlier_columns(schema: pa.Schema, older: Iterable[pa.Schema]) -> pa.Schema:
    """The schema with the manifest's columns of older tables: none changes its type, and none is dropped."""
    kept: dict[str, pa.Field] = {}
    for table in older:
        for field in table:
            if field.name not in RESERVED_COLUMNS:
                kept.setdefault(field.name, field)
    fields = [kept.pop(field.name, field) for field in schema]
    return pa.schema([*fields, *kept.values()])


def extra_column_name(name: str) -> str:
    return f"manifest_{name}" if name in RESERVED_COLUMNS else name
