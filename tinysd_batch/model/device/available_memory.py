"""How much memory a process may still take: on a card, or on the machine and within its control groups."""

from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
PROCESS_CGROUPS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
# Limit, use, and what of that use is files' pages that the kernel gives up first, in versions 2 and 1.
CGROUP_V2_FILES = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def get_available_memory_bytes(device: torch.device) -> int | None:
    """Bytes; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = list(iter_cgroup_headroom_bytes())
    if MEMINFO.exists():
        found += [1024 * int(line.split()[1]) for line in MEMINFO.read_text().splitlines() if "MemAvailable" in line]
    return min(found, default=None)


def iter_cgroup_headroom_bytes(own: Path = PROCESS_CGROUPS, mounted: Path = CGROUP_ROOT) -> Iterator[int]:
    """What each of the process's control groups that has a limit leaves it, in bytes.

    A container often sees its own group as the root, under whatever path the host has it; so groups that are not
    there are passed over, and the root is always asked.
    """
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = mounted, CGROUP_V2_FILES
        elif "memory" in controllers.split(","):
            root, names = mounted / "memory", CGROUP_V1_FILES
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            if (left := read_cgroup_headroom_bytes(folder, *names)) is not None:
                yield left


def read_cgroup_headroom_bytes(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if not most.isdigit():  # "max"
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(most) - int((folder / used).read_text()) + int(stat.get(reclaimable, 0))
    except OSError:
        return None
