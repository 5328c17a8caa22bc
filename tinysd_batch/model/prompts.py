"""The origin's weighted prompts: `tabby cat:0.25 white duck:0.75 hybrid`."""

import math
import re

from tinysd_batch.errors import UsageError

SMALLEST_SUM = 1e-9

# A colon, then a number up to the next space or the end.
WEIGHT = re.compile(r":([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)(?: |$)")


def parse_weighted(prompt: str) -> list[tuple[str, float]]:
    """Sub-prompts and their weights, which sum to 1; one pair where the prompt carries no weights.

    Text after the last weight has weight 1, as in the origin. A colon that no number follows is text.

    Raises UsageError when the weights sum to zero or are not finite.
    """
    pieces, end = [], 0
    for match in WEIGHT.finditer(prompt):
        pieces.append((prompt[end : match.start()], float(match[1])))
        end = match.end()
    if rest := prompt[end:]:
        pieces.append((rest, 1.0))
    if len(pieces) < 2:
        return [(prompt, 1.0)]
    total = sum(weight for _, weight in pieces)
    if not math.isfinite(total) or abs(total) < SMALLEST_SUM:
        raise UsageError(f"the prompt's weights sum to {total:g}; give weights with a sum above zero")
    return [(text, weight / total) for text, weight in pieces]
