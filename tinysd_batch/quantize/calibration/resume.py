"""What calibration has finished, on disk beside the folder to be written, so that a stopped run goes on."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.packed.format import Layout, PackedWeight
from tinysd_batch.quantize.calibration.layerwise import Solved
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.storage.atomic import sweep_temporaries, write_atomically
from tinysd_batch.storage.lock import lock

VERSION = 1  # of the method: what another one left is not gone on with
INDEX = "work.json"
LEVEL = "level.txt"


@dataclass(frozen=True, slots=True)
class Work:
    """The folder `OUT.work`."""

    path: Path

    def trajectories(self, name: str, make: Callable[[], Trajectories]) -> Trajectories:
        """Read what was drawn before, or draw it now and keep it."""
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            drawn = make()
            tensors = {each.name: getattr(drawn, each.name).contiguous() for each in fields(drawn)}
            write_atomically(to_safetensors(tensors), path)
        return Trajectories(**MappedTensors.read(path))

    def layouts(self, make: Callable[[], dict[str, Layout]]) -> dict[str, Layout]:
        """How the layers are stored, as chosen before, or choose it now and keep it."""
        path = self.path / "layouts.json"
        if not path.exists():
            chosen = {name: [one.bits, one.group_size] for name, one in make().items()}
            write_atomically(json.dumps(chosen).encode(), path)
        return {name: Layout(*one) for name, one in json.loads(path.read_text()).items()}

    def keep_layer(self, name: str, solved: Solved) -> None:
        tensors = dict(solved.weight.tensors())
        tensors["sqnr_db"] = torch.tensor(solved.sqnr_db)
        if solved.bias is not None:
            tensors["bias"] = solved.bias
        write_atomically(to_safetensors(tensors), self.path / "layers" / f"{name}.safetensors")

    def layers(self, layouts: Mapping[str, Layout]) -> dict[str, Solved]:
        """The layers that are finished, as `layouts` has them."""
        found = {}
        for path in sorted((self.path / "layers").glob("*.safetensors")):
            tensors = {name: value.clone() for name, value in MappedTensors.read(path).items()}
            sqnr_db, bias = float(tensors.pop("sqnr_db")), tensors.pop("bias", None)
            found[path.stem] = Solved(PackedWeight(**tensors, bits=layouts[path.stem].bits), bias, sqnr_db)
        return found

    def seconds(self) -> float:
        """What earlier runs took."""
        path = self.path / "seconds.json"
        return float(json.loads(path.read_text())) if path.exists() else 0.0

    def keep_seconds(self, seconds: float) -> None:
        write_atomically(json.dumps(seconds).encode(), self.path / "seconds.json")

    def keep_level(self, level: str) -> None:
        write_atomically(level.encode(), self.path / LEVEL)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def place_of(out: Path) -> Path:
    return out.absolute().parent / f"{out.name}.work"


def level_begun(out: Path) -> str | None:
    """The level that a stopped run was at; None where there is none."""
    path = place_of(out) / LEVEL
    return path.read_text() if path.exists() else None


@contextmanager
def open_work(out: Path, identity: Mapping[str, Any]) -> Iterator[Work]:
    """The work folder beside `out`, for one process at a time. `identity` says what is being made of what.

    Raises ModelError where it was begun with something else, and JobLockedError where another process has it.
    """
    work = Work(place_of(out))
    with lock(work.path / "state" / "lock"):
        path = work.path / INDEX
        wanted = {"version": VERSION, **identity}
        if path.exists() and (found := json.loads(path.read_text())) != wanted:
            other = next(name for name in wanted if found.get(name) != wanted[name])
            raise ModelError(
                f"{work.path}: was begun with another {other}; delete it to begin anew, or name another OUT"
            )
        sweep_temporaries(work.path, work.path / "layers")
        write_atomically(json.dumps(wanted).encode(), path)
        yield work


def digest_of(tensors: Mapping[str, Tensor], release: Callable[[], None]) -> str:
    """BLAKE2b of names and numbers; `release` takes what was read out of memory again."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        release()
    return digest.hexdigest()
