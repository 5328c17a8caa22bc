"""Types of setting values: how one is read from a cell, a job file, an option or a Python call, and what it may be.

Every way in reads a setting with the same type, so that a value is right or wrong everywhere, with the same message.
"""

import math
import unicodedata
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tinysd_batch.settings.limits import MAX_PROMPT_CHARACTERS, MAX_SEED
from tinysd_batch.settings.memory_budget import MemoryBudget
from tinysd_batch.settings.sampler_names import find_sampler
from tinysd_batch.text import has_surrogates, normalize_text
from tinysd_batch.values import is_missing, is_missing_number, is_nan, parse_integer

NO_SEED = -1  # in other programs: choose a seed at random


class ValueType(ABC):
    """The values that a setting may have."""

    option_type: ClassVar[type] = str  # of the command line's option
    is_number: ClassVar[bool] = False  # words such as `nan` leave it unset, in job files and options as well
    is_text: ClassVar[bool] = False  # words such as `nan` are text rather than a missing value

    @abstractmethod
    def parse(self, value: Any) -> Any:
        """Return the value to use; None asks for the default. Raises ValueError with the rule that is broken."""

    def is_missing(self, value: Any) -> bool:
        """Whether a cell is empty."""
        return is_missing(value) if self.is_text else is_missing_number(value)

    def read_cell(self, value: Any) -> Any:
        """Return the value of a cell, None if it is empty. Raises ValueError with the rule that is broken."""
        return None if self.is_missing(value) else self.parse(value)

    def is_unset(self, value: Any) -> bool:
        """Whether a value of a job file, an option or a Python call leaves the setting as it is."""
        return value is None or (self.is_missing(value) if self.is_number else is_nan(value))

    def is_valid(self, value: Any) -> bool:
        """Whether a stored value is one that `parse` returns."""
        try:
            parsed = self.parse(value)
        except (ValueError, TypeError):
            return False
        return type(parsed) is type(value) and bool(parsed == value)

    def for_model(self, model: Any) -> "ValueType":  # noqa: ARG002 - most types do not depend on it
        """Return the type of the values that this model (a `ModelInfo`) allows."""
        return self

    def to_json(self, value: Any) -> Any:
        """Return the value as files store it."""
        return value

    def canonical(self, value: Any) -> Any:
        """Return the JSON value that an `image_id` is computed from: equal for values that give equal pixels."""
        return value


@dataclass(frozen=True, slots=True)
class Integer(ValueType):
    """A whole number."""

    option_type = int
    is_number = True
    minimum: int
    maximum: int
    multiple_of: int = 1
    # Bounds that the model sets: name of the bound -> attribute of `ModelInfo`.
    model_bounds: tuple[tuple[str, str], ...] = ()
    range_source: str = ""  # who sets minimum and maximum, for messages

    def parse(self, value: Any) -> int:
        return self.check(parse_integer(value))

    def check(self, number: int) -> int:
        """Return the number. Raises ValueError if it is out of bounds."""
        if not self.minimum <= number <= self.maximum:
            if self.minimum == self.maximum:
                raise ValueError(f"it is {self.minimum}{self.range_source}, and cannot be chosen")
            raise ValueError(f"must be between {self.minimum} and {self.maximum}{self.range_source}")
        if number % self.multiple_of:
            raise ValueError(f"must be a multiple of {self.multiple_of} with this model")
        return number

    def for_model(self, model: Any) -> "Integer":
        bounds = {name: getattr(model, attribute) for name, attribute in self.model_bounds}
        if not bounds:
            return self
        return replace(
            self,
            minimum=max(self.minimum, bounds.get("minimum", self.minimum)),
            maximum=min(self.maximum, bounds.get("maximum", self.maximum)),
            multiple_of=bounds.get("multiple_of", self.multiple_of),
            model_bounds=(),
            range_source=" with this model" if bounds.keys() != {"multiple_of"} else "",
        )


SEEDS = Integer(0, MAX_SEED)


class Seed(ValueType):
    """A seed. -1, which asks other programs for a random seed, asks for the default."""

    option_type = int
    is_number = True

    def parse(self, value: Any) -> int | None:
        number = parse_integer(value)
        return None if number == NO_SEED else SEEDS.check(number)


@dataclass(frozen=True, slots=True)
class Number(ValueType):
    """A finite number."""

    option_type = float
    is_number = True
    minimum: float
    maximum: float

    def parse(self, value: Any) -> float:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(normalize_text(value) if isinstance(value, str) else value)
        except (ValueError, OverflowError, TypeError):
            raise ValueError("a number was expected") from None
        if not math.isfinite(number):
            raise ValueError("must be finite")
        if not self.minimum <= number <= self.maximum:
            raise ValueError(f"must be between {self.minimum:g} and {self.maximum:g}")
        return number + 0.0  # -0.0 is 0.0

    def is_valid(self, value: Any) -> bool:
        return type(value) in (int, float) and self.minimum <= value <= self.maximum  # also False for NaN

    def canonical(self, value: Any) -> float:
        return float(value)


class Flag(ValueType):
    """True or false."""

    option_type = bool

    def parse(self, value: Any) -> bool:
        value = value.item() if hasattr(value, "item") else value  # numpy's type
        if not isinstance(value, bool):
            raise ValueError("true or false was expected")
        return value


@dataclass(frozen=True, slots=True)
class Choice(ValueType):
    """One of a few names."""

    names: tuple[str, ...]

    def parse(self, value: Any) -> str:
        text = self.normalize(value)
        if text not in self.names:
            raise ValueError(f"one of {', '.join(self.names)} was expected")
        return text

    def is_missing(self, value: Any) -> bool:
        return self.normalize(value) not in self.names and is_missing_number(value)

    def normalize(self, value: Any) -> str:
        return normalize_text(str(value)).strip()


class SamplerName(ValueType):
    """A sampler, under our name or another program's."""

    def parse(self, value: Any) -> str:
        return find_sampler(str(value))


@dataclass(frozen=True, slots=True)
class Text(ValueType):
    """Text that nothing is done to, such as a path."""

    is_text = True

    def parse(self, value: Any) -> str:
        if not isinstance(value, str | Path):
            raise ValueError("text was expected")
        return str(value)


@dataclass(frozen=True, slots=True)
class PromptText(ValueType):
    """A prompt: text without invisible characters."""

    is_text = True

    def parse(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("text was expected")
        return check_prompt(normalize_text(value))

    def read_cell(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return None if is_missing(value) else self.parse(value)
        text = normalize_text(value)  # only once, as every row has a prompt of its own
        return None if not text or text.isspace() else check_prompt(text)

    def is_valid(self, value: Any) -> bool:  # 0.1.0 did not normalize prompts
        try:
            return isinstance(value, str) and check_prompt(value) == value
        except ValueError:
            return False

    def canonical(self, value: Any) -> str:
        return unicodedata.normalize("NFC", value)


def check_prompt(text: str) -> str:
    """Return the prompt. Raises ValueError if it is too long or is not valid text."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{len(text)} characters, at most {MAX_PROMPT_CHARACTERS}")
    if "\0" in text:
        raise ValueError("it contains a NUL character")
    if not text.isascii() and has_surrogates(text):
        raise ValueError("it is not UTF-8; save the file as UTF-8")
    return text


class DeviceMemory(ValueType):
    """An amount of device memory."""

    def parse(self, value: Any) -> MemoryBudget:
        return value if isinstance(value, MemoryBudget) else MemoryBudget.parse(value)

    def to_json(self, value: Any) -> Any:
        return None if value is None else str(value)


class ClusterAddress(ValueType):
    """The address of a Ray cluster as `ray start` prints it, or auto, or local."""

    def parse(self, value: Any) -> str:
        address = normalize_text(str(value))
        host, _, port = address.rpartition(":")
        is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
        if address not in ("auto", "local") and not (host and is_port):
            raise ValueError("auto, local or HOST:PORT was expected, as `ray start` prints it")
        if "/" in host:
            raise ValueError("HOST:PORT was expected, without ray:// before it")
        return address
