"""The types that columns of a Parquet manifest keep in the results, and their values on the way there.

Between manifest and table a row travels as JSON (job snapshots, other processes). So times and durations travel as the
whole numbers that Arrow stores, decimals as text, and lists and structures as JSON's; the table casts them back.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa


def get_result_type(kind: Any) -> Any:
    """The type in the results: the same, without encodings; text for what has no plain values."""
    if pa.types.is_dictionary(kind):
        return get_result_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return get_result_type(kind.storage_type)
    if pa.types.is_float16(kind):
        return pa.float32()
    if is_number_type(kind) or pa.types.is_decimal(kind) or is_time_type(kind):
        return kind
    return get_nested_result_type(kind) or pa.string()


def get_0_1_0_result_type(kind: Any) -> Any:
    """The type that jobs of version 0.1 gave the column."""
    kept = get_result_type(kind)
    return kept if is_number_type(kept) else pa.string()


def get_nested_result_type(kind: Any) -> Any | None:
    """The same list or structure, if all that it holds is numbers, text and times."""
    if is_list_type(kind):
        return make_list_type(kind, get_leaf_result_type(kind.value_type))
    if pa.types.is_struct(kind):
        parts = [(field.name, get_leaf_result_type(field.type)) for field in kind]
        names = {name for name, _ in parts}
        return pa.struct(parts) if parts and all(part for _, part in parts) and len(names) == len(parts) else None
    return None


def get_leaf_result_type(kind: Any) -> Any | None:
    if pa.types.is_dictionary(kind):
        return get_leaf_result_type(kind.value_type)
    if is_string_type(kind):
        return pa.string()
    if is_number_type(kind) or is_time_type(kind):
        return pa.float32() if pa.types.is_float16(kind) else kind
    return get_nested_result_type(kind)


def make_list_type(kind: Any, item: Any | None) -> Any | None:
    """A list of the same kind, of other items."""
    if item is None:
        return None
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(item, kind.list_size)
    return pa.large_list(item) if pa.types.is_large_list(kind) else pa.list_(item)


def get_transport_type(kind: Any) -> Any:
    """The type as which values of a carried column travel."""
    return pa.string() if pa.types.is_decimal(kind) else replace_time_types(kind, get_integer_type)


def get_integer_type(kind: Any) -> Any:
    return pa.int32() if kind.bit_width == 32 else pa.int64()


def replace_time_types(kind: Any, convert: Callable[[Any], Any]) -> Any:
    """The type with all times in it converted."""
    if is_time_type(kind):
        return convert(kind)
    if is_list_type(kind):
        return make_list_type(kind, replace_time_types(kind.value_type, convert))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, replace_time_types(field.type, convert)) for field in kind])
    return kind


def apply_transport_types(schema: Any, names: Iterable[str]) -> Any:
    """The schema with these columns as they travel."""
    for name in names:
        position = schema.get_field_index(name)
        schema = schema.set(position, pa.field(name, get_transport_type(schema.field(position).type)))
    return schema


def is_number_type(kind: Any) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean))


def is_time_type(kind: Any) -> bool:
    kinds = (pa.types.is_timestamp, pa.types.is_date, pa.types.is_time, pa.types.is_duration)
    return any(is_kind(kind) for is_kind in kinds)


def is_string_type(kind: Any) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in ("string", "large_string", "string_view"))


def is_binary_type(kind: Any) -> bool:
    kinds = ("binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)


def is_list_type(kind: Any) -> bool:
    kinds = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)


def has_binary_leaf(kind: Any) -> bool:
    """Whether bytes are somewhere within a nested value, as an image's are in a table of images."""
    return pa.types.is_nested(kind) and any(
        is_binary_type(part.type) or has_binary_leaf(part.type)
        for part in (kind.field(i) for i in range(kind.num_fields))
    )
