r"""How varied texts are: what tuning takes away, and what no score against references shows.

A model tuned on few rows says the right thing, the same way each time. Three measures, from one
text to all of them:

    repetition   of the n-grams of one text, the share that it has already said (seq-rep-n)
    distinct     of all n-grams of all texts, how many different ones there are, as a share
    self_bleu    how well the other texts, as references, foretell a text

repetition is a mean over texts and has a mean's interval. distinct is not: drawn again, a row adds
n-grams but no new ones, so every resample is less varied than the texts and the bootstrap's
interval lies below the figure. Its interval is the jackknife's: each text is left out once, which
needs only how many n-grams it alone has (Heltshe & Forrester 1983 count species so).

distinct and self_bleu depend on how many and how long the texts are: more text repeats more.
Compare figures of the same prompts and the same number of texts.

Li et al. divide the different n-grams by the number of tokens; here, as most implementations do, by
the number of n-grams, so that n different ones of n are 1. For n = 1 both are the same.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lora_core.evaluate.bleu_score import ORDERS, Scoring, row_sums, score
from lora_core.evaluate.bleu_tokens import tokenizer
from lora_core.evaluate.estimate import Estimate, jackknife, mean
from lora_core.evaluate.ngrams import Ngram, ngrams
from lora_core.evaluate.pairs import check_texts


def distinct(texts: Sequence[str], n: int, *, tokenize: str = "13a") -> Estimate:
    """Different n-grams as a share of all n-grams of all texts.

    Args:
        texts: what a model said, one text a row.
        n: of the n-grams, 1 or 2 for distinct-1 and distinct-2.
        tokenize: what cuts texts: "13a", "intl", "char" or "none".

    Returns:
        A share in [0, 1], the higher the more varied; counted in n-grams. Where no text has n
        tokens it is NaN, and its count 0. The interval is the jackknife's over texts, for as many
        texts of such lengths; one text gives none.

    Raises:
        TypeError: a string where a list of strings belongs.
        ValueError: no texts, n below 1, or an unknown tokenizer.

    Ref:
        Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
        arXiv:1510.03055, section 5; Efron & Stein 1981, "The Jackknife Estimate of Variance".
    """
    rows = _rows(texts, n, tokenize)
    totals = [row.total() for row in rows]
    shared_by = Counter(ngram for row in rows for ngram in row)
    alone = [sum(shared_by[ngram] == 1 for ngram in row) for row in rows]
    different, total = len(shared_by), sum(totals)
    if not total:
        return Estimate(math.nan, 0, math.nan, math.nan, f"{n}-grams", method="jackknife")
    without = [
        (different - own) / (total - size)
        for own, size in zip(alone, totals, strict=True)
        if size < total
    ]
    found = jackknife(different / total, without, count=total, unit=f"{n}-grams")
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))  # NaN stays


def repetition(texts: Sequence[str], n: int = 4, *, tokenize: str = "13a") -> Estimate:
    """The share of a text's n-grams that it has said before: seq-rep-n, a mean over texts.

    Args:
        texts: what a model said, one text a row.
        n: of the n-grams.
        tokenize: what cuts texts: "13a", "intl", "char" or "none".

    Returns:
        1 − (different n-grams) / (n-grams) in [0, 1), the lower the better, over the texts that
        have n tokens or more: shorter ones have nothing to repeat, and its count leaves them out.
        Where there is no other, it is NaN and its count 0.

    Raises:
        TypeError: a string where a list of strings belongs.
        ValueError: no texts, n below 1, or an unknown tokenizer.

    Ref:
        Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training", arXiv:1908.04319,
        section 6 (there over a model's tokens).
    """
    rows = repetition_rows(texts, n, tokenize=tokenize)
    shares = [share for share in rows if not math.isnan(share)]
    if not shares:
        return Estimate(math.nan, 0, math.nan, math.nan, "texts")
    return mean(shares, unit="texts")


def repetition_rows(texts: Sequence[str], n: int = 4, *, tokenize: str = "13a") -> list[float]:
    """`repetition` text by text; arguments and errors are its.

    Args:
        texts: what a model said, one text a row.
        n: of the n-grams.
        tokenize: what cuts texts.

    Returns:
        (rows,) shares; NaN for a text of fewer than n tokens.
    """
    rows = _rows(texts, n, tokenize)
    return [1 - len(row) / row.total() if row else math.nan for row in rows]


def self_bleu(texts: Sequence[str], *, tokenize: str = "13a") -> Estimate:
    """The mean BLEU of each text against all others as its references.

    It is `sentence_bleu`, in time that grows as the texts do and not as their square: how often the
    others have an n-gram at most follows from the two largest counts of it.

    Args:
        texts: two or more, one a row.
        tokenize: what cuts texts: "13a", "intl", "char" or "none".

    Returns:
        A mean in [0, 100], the lower the more varied; its interval takes the references as given.

    Raises:
        TypeError: a string where a list of strings belongs.
        ValueError: fewer than two texts, or an unknown tokenizer.

    Ref:
        Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models",
        arXiv:1802.01886.
    """
    cut = tokenizer(tokenize)
    check_texts(texts, "texts")
    if len(texts) < 2:
        raise ValueError("self-BLEU compares each text with the others; got one text alone")
    rows = [cut(text) for text in texts]
    lengths = Counter(map(len, rows))
    largest = _two_largest(rows)
    scores = []
    for row in rows:
        own: Counter[Ngram] = Counter()
        for n in ORDERS:
            own += ngrams(row, n)

        def of_others(ngram: Ngram, own: Counter[Ngram] = own) -> int:
            first, second = largest[ngram]
            return second if own[ngram] == first else first

        others = [k for k, often in lengths.items() if k != len(row) or often > 1]
        sums = row_sums(row, of_others, others)
        scores.append(score(sums, Scoring(effective_order=True))[0])
    return mean(scores, unit="texts")


def _rows(texts: Sequence[str], n: int, tokenize: str) -> list[Counter[Ngram]]:
    cut = tokenizer(tokenize)
    check_texts(texts, "texts")
    return [ngrams(cut(text), n) for text in texts]


def _two_largest(rows: Sequence[Sequence[str]]) -> dict[Ngram, tuple[int, int]]:
    """The largest and the second largest count of each n-gram in a row; equal where two have it."""
    found: dict[Ngram, tuple[int, int]] = {}
    for row in rows:
        for n in ORDERS:
            for ngram, count in ngrams(row, n).items():
                first, second = found.get(ngram, (0, 0))
                found[ngram] = (max(first, count), max(second, min(first, count)))
    return found
