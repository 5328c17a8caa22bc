"""The work folder `OUT.work`: what calibration has finished, so that an interrupted run can be continued."""

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

WORK_VERSION = 1  # of the method: work left by another version is not continued
INDEX_FILE = "work.json"
LEVEL_FILE = "level.txt"


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """The folder `OUT.work`. Every file is written atomically."""

    path: Path

    def load_or_generate_trajectories(self, name: str, generate: Callable[[], Trajectories]) -> Trajectories:
        """Read the trajectories called `name`, which are generated and saved first if they are missing."""
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            trajectories = generate()
            tensors = {field.name: getattr(trajectories, field.name).contiguous() for field in fields(trajectories)}
            write_atomically(to_safetensors(tensors), path)
        return Trajectories(**MappedTensors.read(path))

    def load_or_choose_layouts(self, choose: Callable[[], dict[str, Layout]]) -> dict[str, Layout]:
        """Read the layouts of all layers, which are chosen and saved first if they are missing."""
        path = self.path / "layouts.json"
        if not path.exists():
            content = {name: [layout.bits, layout.group_size] for name, layout in choose().items()}
            write_atomically(json.dumps(content).encode(), path)
        return {name: Layout(*entry) for name, entry in json.loads(path.read_text()).items()}

    def save_layer(self, name: str, layer: CalibratedLayer) -> None:
        tensors = dict(layer.weight.tensors())
        tensors["sqnr_db"] = torch.tensor(layer.sqnr_db)
        if layer.bias is not None:
            tensors["bias"] = layer.bias
        write_atomically(to_safetensors(tensors), self.path / "layers" / f"{name}.safetensors")

    def load_layers(self, layouts: Mapping[str, Layout]) -> dict[str, CalibratedLayer]:
        """Read all layers that are finished."""
        layers = {}
        for path in sorted((self.path / "layers").glob("*.safetensors")):
            tensors = {name: value.clone() for name, value in MappedTensors.read(path).items()}
            sqnr_db, bias = float(tensors.pop("sqnr_db")), tensors.pop("bias", None)
            layers[path.stem] = CalibratedLayer(GroupWeight(**tensors, bits=layouts[path.stem].bits), bias, sqnr_db)
        return layers

    def load_elapsed_s(self) -> float:
        """Read how many seconds earlier runs took together."""
        path = self.path / "seconds.json"
        return float(json.loads(path.read_text())) if path.exists() else 0.0

    def save_elapsed_s(self, elapsed_s: float) -> None:
        write_atomically(json.dumps(elapsed_s).encode(), self.path / "seconds.json")

    def save_level(self, level: str) -> None:
        write_atomically(level.encode(), self.path / LEVEL_FILE)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def resolve_work_path(out: Path) -> Path:
    """Return the path of `OUT.work`, which lies beside `out`."""
    return out.absolute().parent / f"{out.name}.work"


def read_started_level(out: Path) -> str | None:
    """Return the level of an interrupted run for `out`; None if there was none."""
    path = resolve_work_path(out) / LEVEL_FILE
    return path.read_text() if path.exists() else None


@contextmanager
def open_work_folder(out: Path, identity: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """Open the work folder of `out` for this process alone.

    Args:
        out: The folder that calibration will write.
        identity: What is quantized, and how. An interrupted run is continued only with the same identity.

    Raises:
        ModelError: The folder was started with another identity.
        JobLockedError: Another process holds it.
    """
    work = WorkFolder(resolve_work_path(out))
    with hold_lock(work.path / "state" / "lock"):
        path = work.path / INDEX_FILE
        expected = {"version": WORK_VERSION, **identity}
        if path.exists() and (recorded := json.loads(path.read_text())) != expected:
            difference = next(key for key in expected if recorded.get(key) != expected[key])
            raise ModelError(
                f"{work.path}: was started with another {difference}; delete it to start over, or choose another OUT"
            )
        remove_temporaries(work.path, work.path / "layers")
        write_atomically(json.dumps(expected).encode(), path)
        yield work


def hash_tensors(tensors: Mapping[str, Tensor], release: Callable[[], None]) -> str:
    """Return the BLAKE2b hash of all names, types, shapes and numbers.

    `release` is called after each tensor, to drop the pages that were read from memory.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        release()
    return digest.hexdigest()
