"""Streams and events of the pretended card, and who may have been at work when: vector clocks (Fidge 1988).

Work of one stream is in order. Of two streams one is known to be after the other only through an event or a wait.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tests.support.fake_cuda.graphs import GraphCapture

Clock = dict[int, int]  # of each stream, how much of its work is known to be done


class DataRaceError(AssertionError):
    """Two streams at work with the same memory, neither after the other."""

    raised: ClassVar[list["DataRaceError"]] = []  # raised where nobody hears it, too

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.raised.append(self)


@dataclass(eq=False, slots=True)
class StreamTimeline:
    """A stream's work so far, and of other streams' what is known to be before it."""

    number: int  # 0 is the stream that CUDA begins with
    clock: Clock = field(default_factory=dict)
    capture: "GraphCapture | None" = None  # that its work goes to

    @property
    def now(self) -> int:
        return self.clock.get(self.number, 0)

    def step(self) -> None:
        self.clock[self.number] = self.now + 1

    def learn(self, clock: Clock) -> None:
        """What comes now is after all this."""
        for number, when in clock.items():
            self.clock[number] = max(when, self.clock.get(number, 0))

    def knows(self, number: int, when: int) -> bool:
        return self.clock.get(number, 0) >= when


@dataclass(slots=True)
class MemoryAccesses:
    """Who has last read and written some memory."""

    reads: Clock = field(default_factory=dict)
    writes: Clock = field(default_factory=dict)

    def check(self, timeline: StreamTimeline, what: str, *, writes: bool) -> None:
        """Raises Race where what was done to the memory may still be under way."""
        for kind, clock in (("written", self.writes), ("read", self.reads if writes else {})):
            for number, when in clock.items():
                if not timeline.knows(number, when):
                    raise DataRaceError(
                        f"memory is {what} on stream {timeline.number}, perhaps still {kind} on stream {number}"
                    )

    def note(self, timeline: StreamTimeline, *, writes: bool) -> None:
        self.check(timeline, "written" if writes else "read", writes=writes)
        (self.writes if writes else self.reads)[timeline.number] = timeline.now

    def include(self, other: "MemoryAccesses") -> None:
        for mine, theirs in ((self.reads, other.reads), (self.writes, other.writes)):
            for number, when in theirs.items():
                mine[number] = max(when, mine.get(number, 0))

    def copy(self) -> "MemoryAccesses":
        return MemoryAccesses(dict(self.reads), dict(self.writes))
