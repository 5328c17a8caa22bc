"""Turn a table of prompts into pictures with a 2-bit Stable Diffusion.

    from tinysd_batch import TinySD

    model = TinySD.from_pretrained("embedded")
    model.generate("red apple", seed=7).images[0].save("apple.png")

Importing the package loads nothing heavy: torch comes with `TinySD`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"
__all__ = ["TinySD", "__version__"]

if TYPE_CHECKING:
    from tinysd_batch.model.pipeline import TinySD


def __getattr__(name: str) -> Any:
    if name == "TinySD":
        from tinysd_batch.model.pipeline import TinySD

        return TinySD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
