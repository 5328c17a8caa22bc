"""Select a device, check that this build of torch supports it, and read its name and memory."""

import os
import platform
import re
import resource
from collections.abc import Iterable
from pathlib import Path

import torch

from tinysd_batch.errors import UsageError

NVIDIA_PROC_FOLDER = Path("/proc/driver/nvidia/gpus")  # on Linux the NVIDIA driver keeps one folder per GPU here
DEVICE_NODES = Path("/dev")
OLD_GPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cu126"  # the last builds with code for Pascal and Volta


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the requested device; if None, the first GPU, or the CPU where there is no GPU.

    Raises:
        UsageError: the device does not exist, this build of torch has no code for the GPU, or no device was requested
            and the machine has GPUs that torch cannot use (falling back to the CPU silently would be very slow).
    """
    if device is None and not torch.cuda.is_available():
        if gpus := list_nvidia_gpus():
            raise UsageError(
                f"this machine has {', '.join(gpus)}, which torch {torch.__version__} cannot use; "
                f"{suggest_cuda_build()}, or generate on the CPU with device cpu"
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
        f"install a CUDA build of torch (for GPUs older than RTX: pip install torch --index-url {OLD_GPU_WHEEL_INDEX})"
    )


def check_gpu_supported(device: torch.device) -> None:
    """Raise UsageError if this build of torch has no code for the GPU."""
    capability, architectures = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not is_capability_supported(capability, architectures):
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and torch "
            f"{torch.__version__} is built for {', '.join(architectures)} only; {suggest_cuda_build()}"
        )


def is_capability_supported(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Whether code for one of the architectures (`sm_86`, `compute_90`) runs on a GPU of this compute capability.

    Machine code (sm) runs on later GPUs of the same generation. PTX (compute) is compiled at load time and runs on all
    later GPUs.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if match is None:
            continue
        major, minor = int(match[2]), int(match[3])
        if (major == capability[0] and minor <= capability[1]) or (match[1] == "compute" and major < capability[0]):
            return True
    return False


def list_nvidia_gpus(folder: Path = NVIDIA_PROC_FOLDER, nodes: Path = DEVICE_NODES) -> list[str]:
    """Return the names of the GPUs that the NVIDIA driver reports, whether torch can use them or not.

    Empty if the user hid them with CUDA_VISIBLE_DEVICES, or in a container that sees the driver but has no GPU.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not any(nodes.glob("nvidia[0-9]*")):
        return []
    names = []
    for path in sorted(folder.glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        names.append(match[1].strip() if match else "an NVIDIA GPU")
    return names


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def total_memory_bytes(device: torch.device) -> int:
    """Return the device's memory; for the CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes(device: torch.device) -> int:
    """Return torch's peak allocation on a GPU; on the CPU, the process's peak resident set size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
