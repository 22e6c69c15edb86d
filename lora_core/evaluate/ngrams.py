"""Runs of n tokens and how often each occurs: what BLEU, ROUGE and the measures of diversity count.

Counts are kept for every n-gram that occurs, so the cost is that of the text, not of a vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

Ngram = tuple[str, ...]


def ngrams(tokens: Sequence[str], n: int) -> Counter[Ngram]:
    """Count the runs of n tokens.

    Args:
        tokens: of one text.
        n: 1 or more.

    Returns:
        Each run and how often it occurs, in the text's order; empty where the text is shorter.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n-grams need n ≥ 1; got {n}")
    shifted = [tokens[start:] for start in range(n)]
    return Counter(zip(*shifted, strict=False))  # ends with the last whole run
