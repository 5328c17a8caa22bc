"""Compile unpack.c to one library per CPU type, when the package is built (hatch_build.py).

Imports only the standard library, because nothing else is installed during a build.
"""

import hashlib
import platform
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("unpack.c")
FLAGS = ["-O3", "-shared", "-fPIC", "-Wno-psabi"]  # psabi: a note on vector arguments; all functions are inlined
BASELINE = "plain"  # any CPU of the architecture
TARGETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    BASELINE: [],
}  # fastest first


def library_path(target: str) -> Path:
    """Return a target's library path. Its name has a digest of source and flags, so that it cannot be outdated."""
    digest = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, TARGETS)).encode()).hexdigest()[:12]
    return SOURCE.with_name(f"unpack-{digest}-{target}.so")


def choose_target(capability: str) -> str:
    """Return the target for a CPU capability as torch reports it ("AVX512", "AVX2", "DEFAULT", ...)."""
    return next((target for target in TARGETS if capability.lower().startswith(target)), BASELINE)


def list_targets() -> list[str]:
    """Return the targets of this machine's architecture."""
    return list(TARGETS) if platform.machine() in ("x86_64", "AMD64") else [BASELINE]


def find_compiler() -> str | None:
    """Return the path of a C compiler, if there is one."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def compile_library(target: str, compiler: str, out: Path) -> None:
    """Compile a target. Raises CalledProcessError with the compiler's output, OSError if it cannot be run."""
    partial = out.with_suffix(".partial")
    command = [compiler, *FLAGS, *TARGETS[target], "-o", str(partial), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - the machine's own compiler
    partial.replace(out)
