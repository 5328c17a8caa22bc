"""Map the tensors of untrusted files: safetensors, and PyTorch's pickles if the user allows them.

A pickle is a program. Its opcodes are checked before any of them runs, then torch's restricted reader (`weights_only`)
loads it, which builds tensors and containers and nothing else. Nothing here loads a pickle in any other way.
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

# A full SD v1 checkpoint with optimizer states needs about 1 MiB of header or pickle.
MAX_HEADER_BYTES = 16 * 2**20
MAX_PICKLE_BYTES = 8 * 2**20
MAX_ZIP_RECORDS = 50_000
MAX_SHORT_STRINGS = 1000

ALLOWED_GLOBALS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.\w+Storage|torch\.Size|_codecs\.encode"
)
# Objects that training programs store beside the tensors; each is loaded as an `IgnoredObject`.
IGNORED_GLOBALS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
# Other formats, by the bytes that a file begins with.
FOREIGN_FORMATS = {
    b"GGUF": "a GGUF file, quantized by another program; convert or quantize the float checkpoint it was made from",
    b"version https": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"<!DOCTYPE": "a web page, not a checkpoint; the download went wrong",
    b"<html": "a web page, not a checkpoint; the download went wrong",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\x89HDF": "an HDF5 file (Keras), not a PyTorch checkpoint",
}


@dataclass(frozen=True, slots=True)
class CheckpointContents:
    """The contents of a checkpoint file."""

    tensors: dict[str, Tensor]  # memory-mapped
    other_names: list[str] = field(default_factory=list)  # of entries that are not tensors


class IgnoredObject:
    """Replaces an object of a training program and does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def open_tensors(path: Path, *, allow_pickle: bool = False) -> CheckpointContents:
    """Map the tensors of a checkpoint file without reading them.

    Raises:
        ModelError: the file is missing, damaged, malicious or of another format, or a pickle without `allow_pickle`.
    """
    try:
        check_regular_file(path)
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    if head[8:9] == b"{" and head[4:8] == bytes(4):  # first: the length of a header may equal other formats' magic
        return open_safetensors(path, head)
    for magic, explanation in FOREIGN_FORMATS.items():
        if head.startswith(magic):
            raise ModelError(f"{path}: this is {explanation}")
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return open_pickle(path, head, allow_pickle=allow_pickle)
    raise ModelError(f"{path}: neither a safetensors file nor a PyTorch checkpoint")


def open_safetensors(path: Path, head: bytes) -> CheckpointContents:
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{path}: damaged: its header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    try:
        return CheckpointContents(MappedTensors.read(path))
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # including dtypes unknown to torch
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from None


def open_pickle(path: Path, head: bytes, *, allow_pickle: bool) -> CheckpointContents:
    if not allow_pickle:
        raise ModelError(
            f"{path}: a pickle, which can run code; if you trust its author, add --allow-pickle (only tensors are read)"
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
    """Raise ModelError if unpickling would run code or decompress more than the file holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            check_zip_records(records, path)
            (pickle_record,) = (record for record in records if record.filename.endswith("/data.pkl"))
            if pickle_record.file_size > MAX_PICKLE_BYTES:
                raise ModelError(
                    f"{path}: its pickle has {pickle_record.file_size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read"
                )
            check_pickle(archive.read(pickle_record), path)
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
    """Raise ModelError naming the first global of a pickle that is neither a tensor nor a container."""
    short_strings: set[str] = set()
    globals_used: set[str] = set()
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL":
            globals_used.add(str(argument).replace(" ", "."))
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ModelError(f"{path}: its pickle uses {opcode.name}, which PyTorch does not write; not read")
        elif isinstance(argument, str) and len(argument) <= 32 and "." not in argument:
            short_strings.add(argument)
    for name in sorted(globals_used):
        if name not in IGNORED_GLOBALS and not ALLOWED_GLOBALS.fullmatch(name):
            raise ModelError(f"{path}: its pickle asks for {name}, which is code and not weights; refused")
    if "_codecs.encode" in globals_used:
        check_codecs(short_strings, path)


def check_codecs(strings: set[str], path: Path) -> None:
    """Raise ModelError if `_codecs.encode` could inflate bytes, as repeated encoding with `hex` does."""
    if len(strings) > MAX_SHORT_STRINGS:
        raise ModelError(f"{path}: its pickle holds {len(strings):,} strings that are not tensor names; not read")
    for string in strings:
        try:
            codecs.lookup(string)
        except (LookupError, ValueError):
            continue
        try:
            "".encode(string)
        except LookupError:
            raise ModelError(
                f"{path}: its pickle asks for the codec {string}, which no weights need; refused"
            ) from None


def extract_tensors(loaded: Any, path: Path) -> CheckpointContents:
    """Return the tensors of an unpickled checkpoint, which may be in a `state_dict` beside other entries."""
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{path}: holds a {type(loaded).__name__}; names with tensors were expected")
    state_dict = loaded.get("state_dict", loaded)
    if not isinstance(state_dict, Mapping):
        raise ModelError(f"{path}: its state_dict is a {type(state_dict).__name__}; names with tensors were expected")
    tensors = {str(name): value for name, value in state_dict.items() if isinstance(value, Tensor)}
    other_names = [str(name) for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if state_dict is not loaded:
        other_names += [str(name) for name in loaded if name != "state_dict"]
    return CheckpointContents(tensors, other_names)


def check_tensor_sizes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError if tensors are larger than the file: the same storage repeated, or expanded by strides."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ModelError(f"{path}: tensor {name} is sparse or quantized; only plain tensors are read")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > path.stat().st_size:
        raise ModelError(f"{path}: damaged: its tensors claim more bytes than the file has")
