"""How much more memory this process may take: on a GPU, or on this machine and within its control groups."""

from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
PROCESS_CGROUPS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
# Files with the limit and the usage, and the entry of memory.stat for file pages that the kernel reclaims first.
CGROUP_V2_FILES = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def get_available_memory_bytes(device: torch.device) -> int | None:
    """Return the free bytes of a GPU, or what machine and control groups leave this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = list(iter_cgroup_headroom_bytes())
    if MEMINFO.exists():
        limits += [1024 * int(line.split()[1]) for line in MEMINFO.read_text().splitlines() if "MemAvailable" in line]
    return min(limits, default=None)


def iter_cgroup_headroom_bytes(own: Path = PROCESS_CGROUPS, root: Path = CGROUP_ROOT) -> Iterator[int]:
    """Yield the bytes that each control group with a limit leaves this process.

    A container often sees its own group as the root, under whatever path the host has it. So groups that do not exist
    are skipped, and the root is always read.

    Args:
        own: The file that lists the control groups of this process.
        root: Where control groups are mounted.
    """
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            hierarchy, names = root, CGROUP_V2_FILES
        elif "memory" in controllers.split(","):
            hierarchy, names = root / "memory", CGROUP_V1_FILES
        else:
            continue
        group = hierarchy / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(hierarchy))):
            if (headroom := read_cgroup_headroom_bytes(folder, *names)) is not None:
                yield headroom


def read_cgroup_headroom_bytes(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Return limit minus usage of a control group, reclaimable pages not counted; None if it has no limit."""
    try:
        limit_bytes = (folder / limit).read_text().strip()
        if not limit_bytes.isdigit():  # "max"
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(limit_bytes) - int((folder / usage).read_text()) + int(stat.get(reclaimable, 0))
    except OSError:
        return None
