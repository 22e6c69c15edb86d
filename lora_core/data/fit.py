"""Fit a row that is too long into a given length, keeping what the model is graded on.

An end token is never inserted, and what is cut is counted by the caller:

* a plain `text` is split into rows that overlap by one token: every token stays graded, once;
* else ungraded tokens after the last graded one go first, then the oldest tokens of the prompt (a
  leading BOS stays), so that every graded token is kept as long as one token of context fits;
* if the graded part alone is too long, a quarter of the row is prompt and the rest is the beginning
  of the graded part; the tokens cut off are counted (`graded_cut`).
"""

from lora_core.data.grading import Graded


def truncate(row: Graded, length: int, keep_first: bool = False) -> Graded:
    """Fit a row into `length` tokens as the module's docstring says; at least one stays graded.

    Args:
        row: has a graded token after the first.
        length: tokens to keep, at least 2.
        keep_first: keep the first token (BOS) in front when the prompt is cut.
    """
    first = row.graded.index(True, 1)
    last = len(row.graded) - row.graded[::-1].index(True)  # one past the last graded token
    region = last - first
    # tokens of prompt to keep: what the graded part leaves, or a quarter where it leaves nothing
    prompt = length - region if region < length else max(1, length // 4)
    prompt = min(first, prompt)
    start, stop = first - prompt, first - prompt + length
    kept = list(range(start, min(stop, len(row.ids))))
    if keep_first:
        kept[0] = 0  # in place of the oldest token of the prompt
    ids = [row.ids[i] for i in kept]
    return Graded(ids, [row.graded[i] for i in kept], row.straddles, row.method)


def split_text(row: Graded, length: int) -> list[Graded]:
    """Parts of at most `length` tokens; each starts with the last token of the one before."""
    parts = []
    for start in range(0, len(row.ids) - 1, length - 1):
        ids = row.ids[start : start + length]
        graded = row.graded[start : start + length]
        # the shared token is graded in the part before
        parts.append(Graded(ids, [start == 0 and graded[0], *graded[1:]], 0, row.method))
    return parts
