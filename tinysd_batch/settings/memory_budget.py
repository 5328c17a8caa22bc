"""Amounts of memory as users write them: `900MB`, `1.5 GiB`, a share of the device's memory, or all but some of it."""

import re
from dataclasses import dataclass
from typing import Self

from tinysd_batch.errors import UsageError
from tinysd_batch.settings.limits import MAX_SEED

BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
AMOUNT = re.compile(r"\s*(-?)(\d+(?:\.\d+)?)\s*([a-z]*)\s*")
MAX_BYTES = MAX_SEED
MIN_BYTES_WITHOUT_UNIT = 100_000  # a smaller number lacks its unit


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """A limit of device memory: a number of bytes, a share of the device's memory, or all of it but some bytes."""

    text: str  # as the user wrote it
    number: float  # bytes, or a share from 0 to 1
    is_share: bool = False
    is_kept_free: bool = False  # the amount is what to leave to others

    @classmethod
    def parse(cls, amount: object) -> Self:
        """Parse bytes, or text: `900MB`, `1.5 GiB`, a share such as `0.5`, or `-500MB` for all but that.

        Raises ValueError for anything else.
        """
        if type(amount) is int and amount >= MIN_BYTES_WITHOUT_UNIT:
            return cls(str(amount), min(amount, MAX_BYTES))
        text = str(amount)
        match = AMOUNT.fullmatch(text.lower())
        is_number = match is not None and match[3] in BYTE_UNITS and float(match[2]) > 0
        if match is None or not is_number or (not match[3] and 1 < float(match[2]) < MIN_BYTES_WITHOUT_UNIT):
            raise ValueError(
                "give a number with a unit, such as 900MB, a share of the device's memory, such as 0.5, or an amount "
                "to leave free, such as -500MB"
            )
        is_share = not match[3] and float(match[2]) <= 1
        number = float(match[2]) * (1 if is_share else BYTE_UNITS[match[3]])
        return cls(text, min(number, MAX_BYTES), is_share, is_kept_free=bool(match[1]))

    def resolve(self, total_bytes: int | None) -> int:
        """Return the budget in bytes on a device with this much memory.

        Raises UsageError if it depends on the device's memory, which is None if it is unknown.
        """
        if total_bytes is None:
            if self.is_share or self.is_kept_free:
                raise UsageError(
                    f"vram_budget = {self.text!r}: the memory of a GPU on another machine is unknown; give an amount "
                    f"such as 900MB"
                )
            return int(self.number)
        amount = self.number * total_bytes if self.is_share else self.number
        return int(total_bytes - amount if self.is_kept_free else amount)

    def __str__(self) -> str:
        return self.text


def parse_budget(amount: MemoryBudget | str | float) -> MemoryBudget:
    """Parse a budget given in Python. Raises UsageError."""
    try:
        return amount if isinstance(amount, MemoryBudget) else MemoryBudget.parse(amount)
    except ValueError as error:
        raise UsageError(f"vram_budget = {amount!r}: {error}") from None


def parse_bytes(amount: str | int | None, name: str) -> int | None:
    """Return the bytes of a number or of text such as `900MB` or `1.5 GiB`. Raises UsageError for anything else."""
    if amount is None or isinstance(amount, int):
        return amount
    match = AMOUNT.fullmatch(amount.lower())
    if match is None or match[1] or match[3] not in BYTE_UNITS:
        raise UsageError(f"{name} = {amount!r}: give bytes or a number with a unit, such as 900MB")
    return int(min(float(match[2]) * BYTE_UNITS[match[3]], MAX_BYTES))
