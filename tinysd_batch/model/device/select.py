"""Which device to draw on, whether this build of torch can use it, and its memory."""

import contextlib
import os
import platform
import re
import resource
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from tinysd_batch.errors import UsageError
from tinysd_batch.model.device.cuda_graph import on_working_stream

NVIDIA_CARDS = Path("/proc/driver/nvidia/gpus")  # a folder per card, wherever NVIDIA's driver is loaded on Linux
DEVICE_NODES = Path("/dev")
OLD_CARDS_BUILD = "https://download.pytorch.org/whl/cu126"  # the last builds with code for Pascal and Volta

CUDA_CONTEXT_BYTES = 350 * 10**6  # 150 to 350 MB are reported, by card and driver; where it can be, it is measured
WORKSPACE_BYTES = 8519680  # of cuBLAS, as torch has it up to Ampere; on Hopper it would be four times as much
LATER_BYTES = 16 * 2**20  # kernels that are loaded when they are first needed
MOST_CONTEXT_BYTES = 750 * 10**6  # that any card was seen to need for CUDA and libraries
WORKSPACES: dict[torch.device, int] = {}  # of cards at work: what the first work of all made libraries take


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; for None the first GPU, or the CPU where there is none.

    Raises UsageError for a device that is not there, for a card that this torch has no code for, and where nothing was
    asked for and there are cards that this torch cannot use: drawing on the CPU then would be a sad surprise.
    """
    if device is None and not torch.cuda.is_available():
        if cards := nvidia_cards():
            raise UsageError(
                f"this machine has {', '.join(cards)}, which torch {torch.__version__} cannot use; {advice()}, "
                f"or draw on the processor with device cpu"
            )
        return torch.device("cpu")
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {chosen}: torch sees no GPU here; use device cpu, or {advice()}")
        check_card(chosen)
        if chosen.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return chosen


def advice() -> str:
    return f"install a CUDA build of torch (for cards older than RTX: pip install torch --index-url {OLD_CARDS_BUILD})"


def check_card(device: torch.device) -> None:
    """Raises UsageError where this build of torch has no code for the card."""
    capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not has_code_for(capability, built_for):
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and torch "
            f"{torch.__version__} is built for {', '.join(built_for)} only; {advice()}"
        )


def has_code_for(capability: tuple[int, int], built_for: Iterable[str]) -> bool:
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


def nvidia_cards(folder: Path = NVIDIA_CARDS, nodes: Path = DEVICE_NODES) -> list[str]:
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


def total_bytes(device: torch.device) -> int:
    """The device's memory; on a CPU the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True, slots=True)
class Overhead:
    """What a process takes of a card besides the tensors that it makes, in bytes."""

    context: int  # CUDA's own, and the libraries' kernels
    workspace: int  # of the libraries, from torch's memory


@cache
def overhead(device: torch.device, dtype: torch.dtype) -> Overhead:
    """Measured, after work of every sort that the model does; a guess where the card is not at hand.

    `device` names a card by its number, as `choose_device` does.
    """
    if device.type != "cuda":
        return Overhead(0, 0)
    if not torch.cuda.is_available():
        return Overhead(CUDA_CONTEXT_BYTES, WORKSPACE_BYTES)
    assert device.index is not None, "two names of a card would be two streams, each with a workspace"
    before = torch.cuda.memory_allocated(device)
    with on_working_stream(device):
        try_everything(device, dtype)
    torch.cuda.synchronize(device)
    workspace = WORKSPACES.setdefault(device, torch.cuda.memory_allocated(device) - before)
    return Overhead(bytes_in_use(device) - torch.cuda.memory_reserved(device) + LATER_BYTES, workspace)


def try_everything(device: torch.device, dtype: torch.dtype) -> None:
    """A convolution, norms, a product and attention, so that libraries load what they need for them."""
    x = torch.zeros(1, 64, 32, 32, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = F.conv2d(F.silu(F.group_norm(x, 32)), torch.zeros(64, 64, 3, 3, device=device, dtype=dtype), padding=1)
    tokens = F.layer_norm(x.flatten(2).transpose(1, 2), [64])  # [1, 1024, 64]
    tokens = F.linear(tokens, torch.zeros(64, 64, device=device, dtype=dtype), tokens[0, 0])
    heads = tokens.view(1, 1024, 8, 8).transpose(1, 2)
    F.scaled_dot_product_attention(heads, heads, heads)


def bytes_in_use(device: torch.device) -> int:
    """Of a card's memory by this process, by the driver's word.

    Where that names no processes, as in containers, all that is in use, but no more than this process may well take.
    """
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["nvidia-smi", "-i", f"GPU-{uuid}", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603
        if own := re.search(rf"^{os.getpid()}, (\d+)$", said, re.MULTILINE):
            return int(own[1]) * 2**20
    free, total = torch.cuda.mem_get_info(device)
    return min(total - free, torch.cuda.memory_reserved(device) + MOST_CONTEXT_BYTES)


@contextlib.contextmanager
def allocating_at_most(nbytes: int, device: torch.device) -> Iterator[None]:
    """Torch takes no more of a card than that; libraries that find no workspace choose other ways of work."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total_bytes(device)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def peak_memory_bytes(device: torch.device) -> int:
    """Torch's peak on a GPU; on the CPU the process's highest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
