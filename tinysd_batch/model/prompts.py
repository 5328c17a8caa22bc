"""The origin's weighted prompts: `tabby cat:0.25 white duck:0.75 hybrid`."""

import math
import re

from tinysd_batch.errors import UsageError

# Text up to a colon, then a number up to the next space or the end.
WEIGHTED = re.compile(r"(?P<text>.*?):(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?= |$)(?: |$)", re.DOTALL)


def parse_weighted(prompt: str) -> list[tuple[str, float]]:
    """Sub-prompts and their weights, which sum to 1; one pair where the prompt carries no weights.

    Text after the last weight has weight 1, as in the origin. A colon that no number follows is text.

    Raises UsageError when the weights sum to zero.
    """
    pieces, end = [], 0
    for match in WEIGHTED.finditer(prompt):
        pieces.append((match["text"], float(match["weight"])))
        end = match.end()
    if rest := prompt[end:]:
        pieces.append((rest, 1.0))
    if len(pieces) < 2:
        return [(prompt, 1.0)]
    total = math.fsum(weight for _, weight in pieces)
    if not math.isfinite(total) or abs(total) < 1e-9:
        raise UsageError(f"the prompt's weights sum to {total:g}; give weights with a sum above zero")
    return [(text, weight / total) for text, weight in pieces]
