"""unpack.c as libraries, one for each sort of processor. Run when the package is built (hatch_build.py).

Nothing but the standard library is imported here: a build has no more.
"""

import hashlib
import platform
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("unpack.c")
FLAGS = ["-O3", "-shared", "-fPIC", "-Wno-psabi"]  # the note on vectors as arguments: all functions are inlined
BASELINE = "plain"  # any processor of the architecture
TARGETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    BASELINE: [],
}  # the fastest first


def library_path(target: str) -> Path:
    """Where the library for a target is to be: its name has a digest of what made it, so that none outlives that."""
    digest = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, TARGETS)).encode()).hexdigest()[:12]
    return SOURCE.with_name(f"unpack-{digest}-{target}.so")


def choose_target(capability: str) -> str:
    """The target for what torch says of a processor ("AVX512", "AVX2", "DEFAULT", ...)."""
    return next((target for target in TARGETS if capability.lower().startswith(target)), BASELINE)


def list_targets() -> list[str]:
    """Those of this machine's architecture."""
    return list(TARGETS) if platform.machine() in ("x86_64", "AMD64") else [BASELINE]


def find_compiler() -> str | None:
    """The C compiler of this machine, if it has one."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def compile_library(target: str, with_compiler: str, out: Path) -> None:
    """Raises CalledProcessError with what the compiler says, OSError where it cannot be run."""
    partial = out.with_suffix(".partial")
    command = [with_compiler, *FLAGS, *TARGETS[target], "-o", str(partial), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - the machine's own compiler
    partial.replace(out)
