"""Which device to draw on, whether this build of torch can use it, and its memory."""

import os
import platform
import re
import resource
from collections.abc import Iterable
from pathlib import Path

import torch

from tinysd_batch.errors import UsageError

NVIDIA_PROC_FOLDER = Path("/proc/driver/nvidia/gpus")  # a folder per card, wherever NVIDIA's driver is loaded on Linux
DEVICE_NODES = Path("/dev")
OLD_GPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cu126"  # the last builds with code for Pascal and Volta


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; for None the first GPU, or the CPU where there is none.

    Raises UsageError for a device that is not there, for a card that this torch has no code for, and where nothing was
    asked for and there are cards that this torch cannot use: drawing on the CPU then would be a sad surprise.
    """
    if device is None and not torch.cuda.is_available():
        if cards := list_nvidia_gpus():
            raise UsageError(
                f"this machine has {', '.join(cards)}, which torch {torch.__version__} cannot use; {suggest_cuda_build()}, "
                f"or draw on the processor with device cpu"
            )
        return torch.device("cpu")
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {chosen}: torch sees no GPU here; use device cpu, or {suggest_cuda_build()}")
        check_gpu_supported(chosen)
        if chosen.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return chosen


def suggest_cuda_build() -> str:
    return (
        f"install a CUDA build of torch (for cards older than RTX: pip install torch --index-url {OLD_GPU_WHEEL_INDEX})"
    )


def check_gpu_supported(device: torch.device) -> None:
    """Raises UsageError where this build of torch has no code for the card."""
    capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not is_capability_supported(capability, built_for):
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and torch "
            f"{torch.__version__} is built for {', '.join(built_for)} only; {suggest_cuda_build()}"
        )


def is_capability_supported(capability: tuple[int, int], built_for: Iterable[str]) -> bool:
    """Whether one of the architectures (`sm_86`, `compute_90`) runs on a card of this compute capability.

    Code for a card (sm) runs on later ones of the same generation, code to be compiled (compute) on all later ones.
    """
    for architecture in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if match is None:
            continue
        major, minor = int(match[2]), int(match[3])
        if (major == capability[0] and minor <= capability[1]) or (match[1] == "compute" and major < capability[0]):
            return True
    return False


def list_nvidia_gpus(folder: Path = NVIDIA_PROC_FOLDER, nodes: Path = DEVICE_NODES) -> list[str]:
    """The cards that this process may use by the driver's word, whether torch can or not.

    None where the user hid them, or where a container sees the driver but has no card.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not any(nodes.glob("nvidia[0-9]*")):
        return []
    names = []
    for card in sorted(folder.glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", card.read_text(errors="replace"), re.MULTILINE)
        names.append(match[1].strip() if match else "an NVIDIA card")
    return names


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def total_memory_bytes(device: torch.device) -> int:
    """The device's memory; on a CPU the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes(device: torch.device) -> int:
    """Torch's peak on a GPU; on the CPU the process's highest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
