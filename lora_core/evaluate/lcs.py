r"""The longest common subsequence of two lists of words, a row of its table at a time.

The table of prefix lengths, L[i][j] for i words of one text and j of the other, has 4·10⁸ cells for
two texts of 20,000 words; filled one by one in Python that takes minutes. But neighbours in a row
differ by 0 or 1, so a row is a string of bits, and a step from row to row is one addition whose
carries run along the whole string (Crochemore et al. 2001; this form is Hyyrö's, 2004):

    V  one bit for each word of the first text: 0 where L grows by one at that word, else 1
    U  = V & (where the next word of the second text stands in the first)
    V' = (V + U) | (V − U)

Why it works: cut V into blocks that end in a 0. In a block only the first match counts, and the
growth moves from the block's end to there. Adding U at the first match sends a carry up to the
block's 0, which becomes 1, while the match becomes 0; V − U gives back the ones that the carry
passed over. In the last block, which no 0 ends, the carry falls off the end, and there is a 0 more
than before: the subsequence is one longer. Python's integers are such strings of any length and add
30 bits at a time, in C: n steps of m / 30.

The rows kept together say where a subsequence runs, which ROUGE-Lsum needs.
"""

from collections.abc import Iterator, Sequence


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """How many words the longest common subsequence has.

    Args:
        a: m words.
        b: n words.

    Returns:
        0 … min(m, n), in O(m n / 30) steps and O(m) bits for each distinct word of `a`.

    Ref:
        Hyyrö 2004, "Bit-Parallel LCS-length Computation Revisited"; Crochemore, Iliopoulos, Pinzon
        & Reid 2001, "A fast and practical bit-vector algorithm for the longest common subsequence
        problem".
    """
    last = (1 << len(a)) - 1
    for row in _rows(a, b):
        last = row
    return len(a) - last.bit_count()


def lcs_places(a: Sequence[str], b: Sequence[str]) -> list[int]:
    """Where one longest common subsequence stands in `a`.

    There may be several. This is the one that rouge-score takes: read from both ends back, a last
    word in common is taken; else `a` is shortened by one where that loses nothing, else `b`.

    Args:
        a: m words.
        b: n words.

    Returns:
        Increasing places in `a`. All n rows are held, m bits each.
    """
    rows = [(1 << len(a)) - 1, *_rows(a, b)]
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif rows[j] >> (i - 1) & 1:  # L grows by nothing at a's last word
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _rows(a: Sequence[str], b: Sequence[str]) -> Iterator[int]:
    """V after each word of b."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    ones = (1 << len(a)) - 1
    v = ones
    for word in b:
        if u := v & places.get(word, 0):
            v = ((v + u) | (v - u)) & ones
        yield v
