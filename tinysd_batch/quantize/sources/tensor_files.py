"""Tensors of files that others wrote, memory-mapped: safetensors, and pickles of PyTorch where they are allowed.

A pickle is a program. It is looked through before anything of it runs, then read by torch's restricted reader
(`weights_only`), which builds tensors and containers and nothing else. There is no other way in.
"""

import codecs
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.storage.atomic import check_regular_file

# Full SD v1 checkpoints, with optimizer states, need about a megabyte of either.
MAX_HEADER_BYTES = 16 * 2**20
MAX_PICKLE_BYTES = 8 * 2**20
MAX_ZIP_RECORDS = 50_000
MAX_SHORT_STRINGS = 1000

ALLOWED_GLOBALS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.\w+Storage|torch\.Size|_codecs\.encode"
)
# Training programs left these beside the tensors; in our reading an empty object stands for each.
IGNORED_GLOBALS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
FOREIGN_FORMATS = {
    b"GGUF": "a GGUF file, quantized by another program; convert or quantize the float checkpoint it was made from",
    b"version https": "a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`",
    b"<!DOCTYPE": "a web page, not a checkpoint; the download went wrong",
    b"<html": "a web page, not a checkpoint; the download went wrong",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\x89HDF": "an HDF5 file (Keras), not a PyTorch checkpoint",
}


@dataclass(frozen=True, slots=True)
class CheckpointContents:
    """What is in a checkpoint file."""

    tensors: dict[str, Tensor]  # memory-mapped
    other_names: list[str] = field(default_factory=list)  # names of what is no tensor


class IgnoredObject:
    """Stands for an object of a training program, and does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def open_tensors(path: Path, *, allow_pickle: bool = False) -> CheckpointContents:
    """The tensors of a checkpoint file, without reading them yet.

    Raises ModelError for a file that is missing, damaged, of another format or hostile, and for a pickle unless
    `allow_pickle`.
    """
    try:
        check_regular_file(path)
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    if head[8:9] == b"{" and head[4:8] == bytes(4):  # before all others: a header's length may look like their marks
        return open_safetensors(path, head)
    for mark, meaning in FOREIGN_FORMATS.items():
        if head.startswith(mark):
            raise ModelError(f"{path}: this is {meaning}")
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return open_pickle(path, head, allow_pickle=allow_pickle)
    raise ModelError(f"{path}: neither a safetensors file nor a PyTorch checkpoint")


def open_safetensors(path: Path, head: bytes) -> CheckpointContents:
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{path}: damaged: its header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    try:
        return CheckpointContents(MappedTensors.read(path))
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # types that torch does not know
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from None


def open_pickle(path: Path, head: bytes, *, allow_pickle: bool) -> CheckpointContents:
    if not allow_pickle:
        raise ModelError(
            f"{path}: a pickle, which can run code; if you trust its maker, say --allow-pickle; then only tensors "
            f"are read"
        )
    if head[:4] != b"PK\x03\x04":
        raise ModelError(f"{path}: written by PyTorch before 1.6 or another program; save it with a newer PyTorch")
    check_zip_archive(path)
    try:
        with torch.serialization.safe_globals([(IgnoredObject, name) for name in IGNORED_GLOBALS]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - a damaged pickle may raise anything
        raise ModelError(f"{path}: not a readable PyTorch checkpoint: {str(error).splitlines()[0][:200]}") from None
    contents = extract_tensors(loaded, path)
    check_tensor_sizes(contents.tensors, path)
    return contents


def check_zip_archive(path: Path) -> None:
    """Raise ModelError where unpickling would run code, or unpack more than the file holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            check_zip_records(records, path)
            (program,) = (record for record in records if record.filename.endswith("/data.pkl"))
            if program.file_size > MAX_PICKLE_BYTES:
                raise ModelError(
                    f"{path}: its pickle has {program.file_size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read"
                )
            check_pickle(archive.read(program), path)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ModelError(f"{path}: not a readable PyTorch checkpoint: {error}") from None


def check_zip_records(records: list[zipfile.ZipInfo], path: Path) -> None:
    if len(records) > MAX_ZIP_RECORDS:
        raise ModelError(f"{path}: {len(records):,} records; at most {MAX_ZIP_RECORDS:,} are read")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ModelError(f"{path}: compressed, which PyTorch never does; not read")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise ModelError(f"{path}: damaged: its records claim more bytes than the file has")


def check_pickle(program: bytes, path: Path) -> None:
    """Raise ModelError naming the first thing a pickle asks for that is neither tensor nor container."""
    short_words: set[str] = set()
    asked: set[str] = set()
    for operation, argument, _ in pickletools.genops(program):
        if operation.name == "GLOBAL":
            asked.add(str(argument).replace(" ", "."))
        elif operation.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ModelError(f"{path}: its pickle uses {operation.name}, which PyTorch does not write; not read")
        elif isinstance(argument, str) and len(argument) <= 32 and "." not in argument:
            short_words.add(argument)
    for name in sorted(asked):
        if name not in IGNORED_GLOBALS and not ALLOWED_GLOBALS.fullmatch(name):
            raise ModelError(f"{path}: its pickle asks for {name}, which is code and not weights; refused")
    if "_codecs.encode" in asked:
        check_codecs(short_words, path)


def check_codecs(words: set[str], path: Path) -> None:
    """Raise ModelError where `_codecs.encode` could blow bytes up: hex and its like, applied again and again."""
    if len(words) > MAX_SHORT_STRINGS:
        raise ModelError(f"{path}: its pickle holds {len(words):,} words that are no names of tensors; not read")
    for word in words:
        try:
            codecs.lookup(word)
        except (LookupError, ValueError):
            continue
        try:
            "".encode(word)
        except LookupError:
            raise ModelError(f"{path}: its pickle asks for the codec {word}, which no weights need; refused") from None


def extract_tensors(loaded: Any, path: Path) -> CheckpointContents:
    """The tensors of an unpickled checkpoint, which may lie in a `state_dict` among other things."""
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{path}: holds a {type(loaded).__name__}; names with tensors were expected")
    inner = loaded.get("state_dict", loaded)
    if not isinstance(inner, Mapping):
        raise ModelError(f"{path}: its state_dict is a {type(inner).__name__}; names with tensors were expected")
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in inner.items() if not isinstance(value, Tensor)]
    beside = [str(name) for name in loaded if name != "state_dict"] if inner is not loaded else []
    return CheckpointContents(tensors, [*others, *beside])


def check_tensor_sizes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError where tensors are more than the file holds: repeated or stretched by their strides."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized:
            raise ModelError(f"{path}: tensor {name} is sparse or quantized; plain ones are read")
    if sum(value.numel() * value.element_size() for value in tensors.values()) > path.stat().st_size:
        raise ModelError(f"{path}: damaged: its tensors claim more bytes than the file has")
