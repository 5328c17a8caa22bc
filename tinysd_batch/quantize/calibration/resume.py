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
from tinysd_batch.model.packed.format import GroupWeight, Layout
from tinysd_batch.quantize.calibration.layerwise import CalibratedLayer
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.storage.atomic import remove_temporaries, write_atomically
from tinysd_batch.storage.lock import hold_lock

WORK_VERSION = 1  # of the method: what another one left is not gone on with
INDEX_FILE = "work.json"
LEVEL_FILE = "level.txt"


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """The folder `OUT.work`."""

    path: Path

    def load_or_generate_trajectories(self, name: str, make: Callable[[], Trajectories]) -> Trajectories:
        """Read what was drawn before, or draw it now and keep it."""
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            drawn = make()
            tensors = {each.name: getattr(drawn, each.name).contiguous() for each in fields(drawn)}
            write_atomically(to_safetensors(tensors), path)
        return Trajectories(**MappedTensors.read(path))

    def load_or_choose_layouts(self, make: Callable[[], dict[str, Layout]]) -> dict[str, Layout]:
        """How the layers are stored, as chosen before, or choose it now and keep it."""
        path = self.path / "layouts.json"
        if not path.exists():
            chosen = {name: [one.bits, one.group_size] for name, one in make().items()}
            write_atomically(json.dumps(chosen).encode(), path)
        return {name: Layout(*one) for name, one in json.loads(path.read_text()).items()}

    def save_layer(self, name: str, solved: CalibratedLayer) -> None:
        tensors = dict(solved.weight.tensors())
        tensors["sqnr_db"] = torch.tensor(solved.sqnr_db)
        if solved.bias is not None:
            tensors["bias"] = solved.bias
        write_atomically(to_safetensors(tensors), self.path / "layers" / f"{name}.safetensors")

    def load_layers(self, layouts: Mapping[str, Layout]) -> dict[str, CalibratedLayer]:
        """The layers that are finished, as `layouts` has them."""
        found = {}
        for path in sorted((self.path / "layers").glob("*.safetensors")):
            tensors = {name: value.clone() for name, value in MappedTensors.read(path).items()}
            sqnr_db, bias = float(tensors.pop("sqnr_db")), tensors.pop("bias", None)
            found[path.stem] = CalibratedLayer(GroupWeight(**tensors, bits=layouts[path.stem].bits), bias, sqnr_db)
        return found

    def load_elapsed_s(self) -> float:
        """What earlier runs took."""
        path = self.path / "seconds.json"
        return float(json.loads(path.read_text())) if path.exists() else 0.0

    def save_elapsed_s(self, seconds: float) -> None:
        write_atomically(json.dumps(seconds).encode(), self.path / "seconds.json")

    def save_level(self, level: str) -> None:
        write_atomically(level.encode(), self.path / LEVEL_FILE)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def resolve_work_path(out: Path) -> Path:
    return out.absolute().parent / f"{out.name}.work"


def read_started_level(out: Path) -> str | None:
    """The level that a stopped run was at; None where there is none."""
    path = resolve_work_path(out) / LEVEL_FILE
    return path.read_text() if path.exists() else None


@contextmanager
def open_work_folder(out: Path, identity: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """The work folder beside `out`, for one process at a time. `identity` says what is being made of what.

    Raises ModelError where it was begun with something else, and JobLockedError where another process has it.
    """
    work = WorkFolder(resolve_work_path(out))
    with hold_lock(work.path / "state" / "lock"):
        path = work.path / INDEX_FILE
        wanted = {"version": WORK_VERSION, **identity}
        if path.exists() and (found := json.loads(path.read_text())) != wanted:
            other = next(name for name in wanted if found.get(name) != wanted[name])
            raise ModelError(
                f"{work.path}: was begun with another {other}; delete it to begin anew, or name another OUT"
            )
        remove_temporaries(work.path, work.path / "layers")
        write_atomically(json.dumps(wanted).encode(), path)
        yield work


def hash_tensors(tensors: Mapping[str, Tensor], release: Callable[[], None]) -> str:
    """BLAKE2b of names and numbers; `release` takes what was read out of memory again."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        release()
    return digest.hexdigest()
