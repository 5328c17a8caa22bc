"""Generate images for a table of prompts with a 2-bit Stable Diffusion.

    from tinysd_batch import TinySD

    model = TinySD.from_pretrained("embedded")
    model.generate("red apple", seed=7).save("apple.png")

Importing the package loads nothing heavy: torch comes with `TinySD`.
"""

from typing import TYPE_CHECKING, Any

from tinysd_batch.threads import set_wait_policy

__version__ = "0.2.0.dev0"
__all__ = ["JobResult", "TinySD", "__version__", "read_results", "submit"]

if TYPE_CHECKING:
    from tinysd_batch.api import JobResult, read_results, submit
    from tinysd_batch.model.pipeline import TinySD

set_wait_policy()  # before anything imports torch


def __getattr__(name: str) -> Any:
    if name == "TinySD":
        from tinysd_batch.model.pipeline import TinySD

        return TinySD
    if name in ("JobResult", "read_results", "submit"):
        from tinysd_batch import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
