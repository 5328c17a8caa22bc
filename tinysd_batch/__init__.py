"""Generate images for a table of prompts with a 2-bit Stable Diffusion.

    from tinysd_batch import TinySD

    model = TinySD.from_pretrained("embedded")
    model.generate("red apple", seed=7).save("apple.png")

Importing the package is fast: torch is imported when `TinySD` is first used.
"""

from tinysd_batch.threads import set_wait_policy
from tinysd_batch.version import __version__

__all__ = ["JobResult", "TinySD", "__version__", "read_results", "submit"]

TYPE_CHECKING = False  # not from `typing`: `python -m` could import a typing.py from the current folder here
if TYPE_CHECKING:
    from typing import Any

    from tinysd_batch.api import JobResult, read_results, submit
    from tinysd_batch.model.tiny_sd import TinySD

set_wait_policy()  # before anything imports torch


def __getattr__(name: str) -> "Any":
    if name == "TinySD":
        from tinysd_batch.model.tiny_sd import TinySD

        return TinySD
    if name in ("JobResult", "read_results", "submit"):
        from tinysd_batch import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
