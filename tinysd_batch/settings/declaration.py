"""What is declared of a setting besides its name and Python type."""

import dataclasses
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

from tinysd_batch.settings.value_types import ValueType


class Panel(StrEnum):
    """Section of a command's help."""

    IMAGES = "Images"
    JOB = "Job"
    MACHINE = "Machine"


class Effect(Enum):
    """What a setting decides, and so whether a job that is resumed may have another value."""

    PIXELS = "the pixels of images; fixed within a job"
    IMAGES = "which images there are; fixed within a job"
    FILES = "how images are saved; fixed within a job"
    ROWS = "how some formats of manifests are read; fixed within a job that has such a manifest"
    RUN = "one run; may differ in the next"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is declared of a setting."""

    value_type: ValueType
    help: str  # of the option
    name: str = ""
    default: Any = None
    model_default: str = ""  # attribute of `ModelInfo` that has the default
    effect: Effect = Effect.PIXELS
    panel: Panel = Panel.IMAGES
    column: str = ""  # what it means as a column of the manifest; empty if it cannot be one
    aliases: tuple[str, ...] = ()  # as a column and in Python
    flags: tuple[str, ...] = ()  # of the command line; `--name` if empty
    metavar: str | None = None
    line_option: str = ""  # letter of the option that InvokeAI has for it after a prompt
    python_name: str = ""  # diffusers' name for it, which `TinySD.generate` uses
    webui_label: str = ""  # in the `parameters` of an image; written if it is not the default
    # Whether every image_id, snapshot of a row and table has it, as those of 0.1.0. Settings that were added later are
    # in ids and snapshots only where they are not at their default, and only in newer tables.
    is_always_recorded: bool = False
    is_shared_in_batch: bool = False  # images with different values cannot be in one micro-batch
    encodes_prompt: bool = False  # decides how the prompts are encoded, and nothing else
    is_for_jobs_only: bool = False  # not an option of txt2img

    @property
    def is_column(self) -> bool:
        return bool(self.column)

    @property
    def generate_name(self) -> str:
        """Its name as an argument of `TinySD.generate`."""
        return self.python_name or self.name

    def to_json(self, settings: object) -> Any:
        """Return the value that these settings have for it, as files store it."""
        return self.value_type.to_json(getattr(settings, self.name))

    def list_flags(self) -> tuple[str, ...]:
        return self.flags or (f"--{self.name.replace('_', '-')}",)


def setting(value_type: ValueType, default: Any = None, *, help: str, **declared: Any) -> Any:
    """Declare a setting as the field of a dataclass; see `Setting`. Without a default a value must be given."""
    declaration = Setting(value_type, help, default=default, **declared)
    metadata = {"setting": declaration}
    if declaration.model_default:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
