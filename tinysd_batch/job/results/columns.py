"""The columns of the results table, declared once."""

from dataclasses import dataclass, replace
from enum import Enum
from types import UnionType

import pyarrow as pa

from tinysd_batch.settings.declaration import Setting
from tinysd_batch.settings.schema import IMAGE_SETTINGS

TIMESTAMP = pa.timestamp("us", tz="UTC")
ARROW_TYPES = {int: pa.int32(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}


class ColumnSource(Enum):
    """The record that has a column's value."""

    REQUEST = "ImageRequest"
    SETTINGS = "ImageRequest.settings"
    RESULT = "ImageResult"
    RUN = "Job.run_columns"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the results table."""

    name: str
    type: pa.DataType
    source: ColumnSource
    meaning: str
    is_kept_on_reuse: bool = False  # a job that reuses the image copies it, as it describes how the image was generated
    # What it is in the metadata of the image, from which a resumed run that finds only the file restores it. None of
    # these names the machine, because people share images, and none is measured, so that files are reproducible.
    embedded_type: type | UnionType | None = None
    is_from_model: bool = False  # the model reports it, in an `ImageOutput`
    is_original: bool = True  # all tables have it; others have it only since a version after 0.1.0


def of_request(name: str, data_type: pa.DataType, meaning: str) -> Column:
    return Column(name, data_type, ColumnSource.REQUEST, meaning)


def of_setting(setting: Setting) -> Column:
    data_type = ARROW_TYPES[setting.value_type.option_type]
    return Column(
        setting.name, data_type, ColumnSource.SETTINGS, "as generated", is_original=setting.is_always_recorded
    )


def of_outcome(name: str, data_type: pa.DataType, meaning: str) -> Column:
    """Declare a column on what became of the image in this job."""
    return Column(name, data_type, ColumnSource.RESULT, meaning)


def of_generation(
    name: str, data_type: pa.DataType, meaning: str, embedded_type: type | UnionType | None = None
) -> Column:
    """Declare a column on how the image was generated."""
    return Column(name, data_type, ColumnSource.RESULT, meaning, is_kept_on_reuse=True, embedded_type=embedded_type)


def of_output(name: str, data_type: pa.DataType, meaning: str, embedded_type: type | UnionType | None = None) -> Column:
    """Declare a column on how the image was generated that the model reports."""
    return replace(of_generation(name, data_type, meaning, embedded_type), is_from_model=True)


def of_run(name: str, data_type: pa.DataType, meaning: str, *, is_kept_on_reuse: bool = False) -> Column:
    return Column(name, data_type, ColumnSource.RUN, meaning, is_kept_on_reuse)


COLUMNS = (
    of_outcome("index", pa.int64(), "the image's number in the job, from 1"),
    of_request("row", pa.int64(), "its manifest row, from 1"),
    of_request("sample", pa.int32(), "its number in the row, from 1"),
    of_request("id", pa.string(), "the row's `id`"),
    of_request("prompt", pa.string(), "as generated"),
    *(of_setting(setting) for setting in IMAGE_SETTINGS.values() if setting.is_column and setting.encodes_prompt),
    of_request("seed", pa.int64(), "as generated"),
    *(of_setting(setting) for setting in IMAGE_SETTINGS.values() if setting.is_column and not setting.encodes_prompt),
    of_request("image_id", pa.string(), "128 bits over everything that decides the pixels; equal ids are equal images"),
    of_outcome(
        "status",
        pa.string(),
        "`ok`, `failed`, `invalid` (the row is wrong; no `index`) or `quarantined` (three workers died or hung on it)",
    ),
    of_outcome("file_name", pa.string(), "the image file, relative to the job folder"),
    of_generation("sha256", pa.string(), "of the image file"),
    of_generation("bytes", pa.int64(), "size of the image file"),
    of_outcome(
        "error_class",
        pa.string(),
        "`out_of_memory`, `not_finite`, `refused` (also: a folder is in the image's place), `invalid_row`, "
        "`worker_died`, `hung`, `device_broken`, or the name of a Python exception",
    ),
    of_outcome("error_message", pa.string(), "one sentence"),
    of_generation("attempts", pa.int32(), "how often it was tried"),
    of_output(
        "degraded", pa.list_(pa.string()), "what was done to generate it: [the values](memory.md#limit-it)", list
    ),
    of_output("n_tokens", pa.int32(), "length of the prompt in tokens", int | None),
    of_output("truncated", pa.string(), "the end of the prompt that the model did not see", str | None),
    of_output("negative_truncated", pa.string(), "the end of the negative prompt that it did not see", str | None),
    of_run("model", pa.string(), "name of the model"),
    of_run("model_digest", pa.string(), "digest of the model folder"),
    of_output("precision", pa.string(), "`float32`, `float16` or `bfloat16`", str),
    of_generation("device_name", pa.string(), "the device that generated it", str),
    of_generation("worker", pa.string(), "the worker that generated it"),
    of_generation("node", pa.string(), "the machine that generated it"),
    of_output(
        "text_s",
        pa.float64(),
        "seconds of text encoding, the image's share of its micro-batch; null for an image that was found on disk "
        "without its row, since files hold no measurements",
    ),
    of_output("denoise_s", pa.float64(), "seconds of denoising, likewise"),
    of_output("decode_s", pa.float64(), "seconds of decoding, likewise"),
    of_output(
        "peak_memory_bytes",
        pa.int64(),
        "torch's peak on a GPU (within a budget at least what was planned for a step); the process's peak resident "
        "size on a CPU; null as `text_s`",
    ),
    of_generation("started_at", TIMESTAMP, "when the micro-batch was started"),
    of_generation("finished_at", TIMESTAMP, "when it was finished"),
    of_run("run_id", pa.string(), "the run that generated it"),
    of_run("version", pa.string(), "the version of the program", is_kept_on_reuse=True),
    of_run("reused", pa.string(), "the job folder that `--reuse` took the image from"),
)
COLUMN_FIELDS = [pa.field(column.name, column.type) for column in COLUMNS]
RESERVED_COLUMNS = frozenset(column.name for column in COLUMNS)
ORIGINAL_COLUMNS = frozenset(column.name for column in COLUMNS if column.is_original)
COLUMNS_BY_SOURCE = {
    source: tuple(column.name for column in COLUMNS if column.source is source) for source in ColumnSource
}
COLUMNS_KEPT_ON_REUSE = tuple(column.name for column in COLUMNS if column.is_kept_on_reuse)
OUTPUT_COLUMNS = tuple(column.name for column in COLUMNS if column.is_from_model)
EMBEDDED_COLUMNS = {column.name: column.embedded_type for column in COLUMNS if column.embedded_type is not None}
