"""From spans of characters to graded tokens.

A tokenizer says for each token which characters it came from. A token counts by where it starts, so
that a token that reaches over a boundary belongs to the side of its first character; those that
reach into a graded part from outside are counted, because the model is not taught them.
"""

from bisect import bisect_left
from collections.abc import Sequence

from lora_core.data.chat import Span


def grade_offsets(
    offsets: Sequence[tuple[int, int]], spans: Sequence[Span]
) -> tuple[list[bool], int]:
    """Grade tokens by where they start.

    Args:
        offsets: (start, end) in characters, per token.
        spans: (start, end) in characters, ascending, apart from each other.

    Returns:
        Per token whether its start lies in a span; and how many tokens start before a span and
        reach into it.

    Raises:
        ValueError: token starts run backwards (offsets of a broken tokenizer).
    """
    starts = [start for start, _ in offsets]
    if starts != sorted(starts):
        raise ValueError(
            "the tokenizer's offsets run backwards; they cannot tell which tokens are graded"
        )
    graded = [False] * len(starts)
    straddles = 0
    for start, end in spans:
        first, stop = bisect_left(starts, start), bisect_left(starts, end)
        graded[first:stop] = [True] * (stop - first)
        for before in range(first - 1, -1, -1):
            if offsets[before][1] <= start:
                break
            straddles += not graded[before]  # in the span before: graded there
    return graded, straddles
