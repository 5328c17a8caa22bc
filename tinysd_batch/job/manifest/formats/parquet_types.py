"""Arrow types of a Parquet manifest's extra columns: in the results, and on the way there.

Between the manifest and the results table, rows are stored as JSON (job snapshots) or sent to other processes. There,
times and durations are the integers that Arrow stores, decimals are text, lists and structs are those of JSON: the
transport types. The results table casts them back to the result types.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa


def get_result_type(arrow_type: Any) -> Any:
    """Return the type in the results: the same type without encodings, or text for types without plain values."""
    if pa.types.is_dictionary(arrow_type):
        return get_result_type(arrow_type.value_type)
    if isinstance(arrow_type, pa.BaseExtensionType):
        return get_result_type(arrow_type.storage_type)
    if pa.types.is_float16(arrow_type):
        return pa.float32()
    if is_number_type(arrow_type) or pa.types.is_decimal(arrow_type) or is_time_type(arrow_type):
        return arrow_type
    return get_nested_result_type(arrow_type) or pa.string()


def get_0_1_0_result_type(arrow_type: Any) -> Any:
    """Return the type that tinysd-batch 0.1.0 gave the column: numbers keep their types, all others are text."""
    result_type = get_result_type(arrow_type)
    return result_type if is_number_type(result_type) else pa.string()


def get_nested_result_type(arrow_type: Any) -> Any | None:
    """Return the same list or struct type if it holds only numbers, text and times, else None."""
    if is_list_type(arrow_type):
        return make_list_type(arrow_type, get_leaf_result_type(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        fields = [(field.name, get_leaf_result_type(field.type)) for field in arrow_type]
        names = {name for name, _ in fields}
        is_supported = fields and all(field_type for _, field_type in fields) and len(names) == len(fields)
        return pa.struct(fields) if is_supported else None
    return None


def get_leaf_result_type(arrow_type: Any) -> Any | None:
    """Return the type of values within a list or struct, None if they cannot be in the results."""
    if pa.types.is_dictionary(arrow_type):
        return get_leaf_result_type(arrow_type.value_type)
    if is_string_type(arrow_type):
        return pa.string()
    if is_number_type(arrow_type) or is_time_type(arrow_type):
        return pa.float32() if pa.types.is_float16(arrow_type) else arrow_type
    return get_nested_result_type(arrow_type)


def make_list_type(list_type: Any, item_type: Any | None) -> Any | None:
    """Return a list type of the same layout (fixed size, large, plain) with other items; None without an item type."""
    if item_type is None:
        return None
    if pa.types.is_fixed_size_list(list_type):
        return pa.list_(item_type, list_type.list_size)
    return pa.large_list(item_type) if pa.types.is_large_list(list_type) else pa.list_(item_type)


def get_transport_type(result_type: Any) -> Any:
    """Return the type of an extra column's values in JSON, between manifest and results table."""
    return pa.string() if pa.types.is_decimal(result_type) else replace_time_types(result_type, get_integer_type)


def get_integer_type(time_type: Any) -> Any:
    return pa.int32() if time_type.bit_width == 32 else pa.int64()


def replace_time_types(arrow_type: Any, convert: Callable[[Any], Any]) -> Any:
    """Return the type with all time types in it converted."""
    if is_time_type(arrow_type):
        return convert(arrow_type)
    if is_list_type(arrow_type):
        return make_list_type(arrow_type, replace_time_types(arrow_type.value_type, convert))
    if pa.types.is_struct(arrow_type):
        return pa.struct([(field.name, replace_time_types(field.type, convert)) for field in arrow_type])
    return arrow_type


def apply_transport_types(schema: Any, names: Iterable[str]) -> Any:
    """Return the schema with the transport types of the named columns."""
    for name in names:
        position = schema.get_field_index(name)
        schema = schema.set(position, pa.field(name, get_transport_type(schema.field(position).type)))
    return schema


def is_number_type(arrow_type: Any) -> bool:
    predicates = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(predicate(arrow_type) for predicate in predicates)


def is_time_type(arrow_type: Any) -> bool:
    predicates = (pa.types.is_timestamp, pa.types.is_date, pa.types.is_time, pa.types.is_duration)
    return any(predicate(arrow_type) for predicate in predicates)


def is_string_type(arrow_type: Any) -> bool:
    return any(getattr(pa.types, f"is_{name}")(arrow_type) for name in ("string", "large_string", "string_view"))


def is_binary_type(arrow_type: Any) -> bool:
    names = ("binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(pa.types, f"is_{name}")(arrow_type) for name in names)


def is_list_type(arrow_type: Any) -> bool:
    names = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{name}")(arrow_type) for name in names)


def has_binary_leaf(arrow_type: Any) -> bool:
    """Whether a nested type contains binary values, as the struct of an image in a data set does."""
    return pa.types.is_nested(arrow_type) and any(
        is_binary_type(field.type) or has_binary_leaf(field.type)
        for field in (arrow_type.field(i) for i in range(arrow_type.num_fields))
    )
