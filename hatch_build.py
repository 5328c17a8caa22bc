"""Compile the CPU kernel for dequantizing when the package is built. Without a C compiler, build without the kernel."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("tinysd_batch") / "model" / "packed"


class CustomBuildHook(BuildHookInterface):
    """Put libraries next to their source. A wheel with libraries in it is for this platform only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's interface
        cpu_build = load_module(Path(self.root) / FOLDER / "cpu_build.py")
        paths = {target: cpu_build.library_path(target) for target in cpu_build.list_targets()}
        for path in cpu_build.SOURCE.parent.glob("unpack-*"):
            if path not in paths.values():
                path.unlink()
        self.compile(cpu_build, {target: path for target, path in paths.items() if not path.exists()})
        if any(path.exists() for path in paths.values()):
            build_data["artifacts"].append(f"{FOLDER}/unpack-*.so")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def compile(self, cpu_build: ModuleType, missing: dict[str, Path]) -> None:
        """Compile what is missing. Failures are only warnings: the program works without the kernel, but slower."""
        compiler = cpu_build.find_compiler()
        if missing and compiler is None:
            self.app.display_warning("no C compiler (cc, gcc, clang): weights will be dequantized by torch's operators")
            return
        for target, path in missing.items():
            try:
                cpu_build.compile_library(target, compiler, path)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", None) or error
                self.app.display_warning(f"unpack.c was not compiled for {target}: {reason}")


def load_module(path: Path) -> ModuleType:
    """Load a module of the package by its path: importing the package would need what is not installed yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
