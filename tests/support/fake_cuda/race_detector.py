"""Detect data races between streams of the fake GPU with vector clocks (Fidge 1988).

Operations of one stream run in order. An operation is known to run after one of another stream only if its stream
waited for an event, or for the other stream, in between.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tests.support.fake_cuda.graphs import GraphCapture

Clock = dict[int, int]  # by stream: how many of its operations are known to be complete


class DataRaceError(AssertionError):
    """Two streams access the same memory, and neither is known to run after the other."""

    raised: ClassVar[list["DataRaceError"]] = []  # all, including those raised where exceptions are ignored

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.raised.append(self)


@dataclass(eq=False, slots=True)
class StreamTimeline:
    """The operations of a stream, and those of other streams that are known to be complete before its next one."""

    number: int  # 0 is CUDA's default stream
    clock: Clock = field(default_factory=dict)
    capture: "GraphCapture | None" = None  # that its operations are recorded in

    @property
    def now(self) -> int:
        return self.clock.get(self.number, 0)

    def step(self) -> None:
        self.clock[self.number] = self.now + 1

    def wait_for(self, clock: Clock) -> None:
        """Let later operations run after all of these."""
        for number, when in clock.items():
            self.clock[number] = max(when, self.clock.get(number, 0))

    def is_after(self, number: int, when: int) -> bool:
        """Whether the next operation is known to run after operation `when` of a stream."""
        return self.clock.get(number, 0) >= when


@dataclass(slots=True)
class MemoryAccesses:
    """The last reads and writes of a piece of memory, by stream."""

    reads: Clock = field(default_factory=dict)
    writes: Clock = field(default_factory=dict)

    def check(self, timeline: StreamTimeline, access: str, *, writes: bool) -> None:
        """Raise DataRaceError if an earlier, conflicting access may still be running."""
        for earlier, clock in (("written", self.writes), ("read", self.reads if writes else {})):
            for number, when in clock.items():
                if not timeline.is_after(number, when):
                    raise DataRaceError(
                        f"memory is {access} on stream {timeline.number}, perhaps still {earlier} on stream {number}"
                    )

    def record(self, timeline: StreamTimeline, *, writes: bool) -> None:
        self.check(timeline, "written" if writes else "read", writes=writes)
        (self.writes if writes else self.reads)[timeline.number] = timeline.now

    def include(self, other: "MemoryAccesses") -> None:
        for clock, other_clock in ((self.reads, other.reads), (self.writes, other.writes)):
            for number, when in other_clock.items():
                clock[number] = max(when, clock.get(number, 0))

    def copy(self) -> "MemoryAccesses":
        return MemoryAccesses(dict(self.reads), dict(self.writes))
