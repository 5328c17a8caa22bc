"""Compiles the processor's kernel for unpacking when the package is built. Without a C compiler it is built without."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("tinysd_batch") / "model" / "packed"


class CustomBuildHook(BuildHookInterface):
    """Puts libraries next to their source; a wheel with libraries in it is for this sort of machine only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - what hatchling passes
        compiled = module_at(Path(self.root) / FOLDER / "cpu_build.py")
        wanted = {target: compiled.path_of(target) for target in compiled.targets_here()}
        for path in compiled.SOURCE.parent.glob("unpack-*"):
            if path not in wanted.values():
                path.unlink()
        self.compile(compiled, {target: path for target, path in wanted.items() if not path.exists()})
        if any(path.exists() for path in wanted.values()):
            build_data["artifacts"].append(f"{FOLDER}/unpack-*.so")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def compile(self, compiled: ModuleType, missing: dict[str, Path]) -> None:
        """Compile what can be; the program works without, and slower."""
        compiler = compiled.compiler()
        if missing and compiler is None:
            self.app.display_warning("no C compiler (cc, gcc, clang): weights will be unpacked by torch's operators")
            return
        for target, path in missing.items():
            try:
                compiled.compile_for(target, compiler, path)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or error
                self.app.display_warning(f"unpack.c was not compiled for {target}: {said}")


def module_at(path: Path) -> ModuleType:
    """A module of the package, which itself cannot be imported here: what it needs is not installed yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
