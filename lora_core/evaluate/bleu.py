r"""BLEU, equal to sacreBLEU's figure to the rounding of a float.

    BLEU = 100 · BP · (p₁ p₂ p₃ p₄)^¼       BP = 1 where c > r, else exp(1 − r/c)

p_n is the share of the predictions' n-grams that a reference has, each counted no more often than
the reference that has it most often. c is the predictions' length in tokens, and r, row by row,
that of the reference nearest in length (of two equally near, the shorter). All three are sums over
the corpus: BLEU is no mean of rows, and the BLEU of one row says little.

A p_n of 0 makes the product 0, so it is smoothed (Chen & Cherry 2014). For m n-grams:

    exp     1 / (2ᵏ m) for the k-th order without a match; what mteval does, and the default
    floor   ε / m, with ε = 0.1
    add-k   one is added to matches and to m, of every order above 1
    none    it stays 0

Orders for which the predictions have no n-grams at all (m = 0) give 0 as well, unless
`effective_order` ends the product at the last order that has some; texts of three words need it.

The interval resamples rows (Koehn 2004), which is cheap: what a row adds to the sums is ten
integers, so a resample is a product of how often each row was drawn with a matrix of (rows, 10).
sacreBLEU draws from another seed and prints the mean of the resamples ± half the interval's width;
here the figure is that of the rows as they are, and both ends are given.

Not here: tokenizers with models or dictionaries of their own (zh, ja-mecab, spm, flores). `char`
serves text without spaces between words.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from lora_core.evaluate.bleu_score import ORDERS, Scoring, row_sums, score
from lora_core.evaluate.bleu_tokens import tokenize_13a, tokenizer
from lora_core.evaluate.estimate import RESAMPLES, Estimate, bootstrap
from lora_core.evaluate.ngrams import Ngram, ngrams
from lora_core.evaluate.pairs import check_pairs, check_references

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Bleu", "bleu", "bleu_counts", "sentence_bleu", "tokenize_13a"]


@dataclass(frozen=True)
class Bleu:
    """BLEU of a corpus, with what it is made of."""

    estimate: Estimate
    """the score in [0, 100], and its interval"""
    precisions: tuple[float, ...]
    """percent, for n = 1 … 4, smoothed"""
    brevity_penalty: float
    """in [0, 1]; 1 where the predictions are no shorter than the references"""
    lengths: tuple[int, int]
    """tokens of the predictions, and of the references nearest to them in length"""
    signature: str
    """how it was computed, in sacreBLEU's words"""

    def __str__(self) -> str:
        shares = "/".join(f"{p:.1f}" for p in self.precisions)
        c, r = self.lengths
        return f"BLEU {self.estimate}, {shares}, BP {self.brevity_penalty:.3f} ({c} to {r} tokens)"


def bleu(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: str = "13a",
    smooth: str = "exp",
    smooth_value: float | None = None,
    lowercase: bool = False,
    effective_order: bool = False,
) -> Bleu:
    """BLEU of a corpus.

    Args:
        predictions: (rows,) texts, not tokenized (else tokenize="none").
        references: (rows,) lists of one or more texts; rows may differ in how many.
        tokenize: "13a", "intl", "char" or "none".
        smooth: "exp", "floor", "add-k" or "none".
        smooth_value: ε of floor, k of add-k; None: 0.1 and 1.
        lowercase: whether case is ignored.
        effective_order: whether orders without any n-gram are left out of the product.

    Returns:
        The score and its parts.

    Raises:
        TypeError: a string where a list of strings belongs.
        ValueError: no rows, other numbers of rows, a row without references, or an option out of
            range.

    Ref:
        Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation",
        section 2.3; Post 2018, arXiv:1804.08771; Koehn 2004, "Statistical Significance Tests for
        Machine Translation Evaluation", for the interval.
    """
    import numpy as np

    scoring = Scoring(smooth, smooth_value, effective_order)
    check_pairs(predictions, references)
    rows = [
        bleu_counts(prediction, row, tokenize=tokenize, lowercase=lowercase)
        for prediction, row in zip(predictions, references, strict=True)
    ]
    # float64 holds these integers exactly, and its products are fast
    stats = np.array(rows, dtype=np.float64)

    def of(draw: "npt.NDArray[np.int64]") -> float:
        drawn = np.bincount(draw, minlength=len(stats)) @ stats  # (10,)
        return score(drawn.tolist(), scoring)[0]

    estimate = bootstrap(len(stats), of)
    sums = stats.sum(axis=0).tolist()
    _, precisions, penalty = score(sums, scoring)
    numbers = {len(row) for row in references}
    words = {
        "nrefs": numbers.pop() if len(numbers) == 1 else "var",
        "bs": RESAMPLES,
        "seed": 0,
        "case": "lc" if lowercase else "mixed",
        "eff": "yes" if effective_order else "no",
        "tok": tokenize,
        "smooth": scoring,
        "version": _version(),
    }
    signature = "|".join(f"{key}:{value}" for key, value in words.items())
    return Bleu(estimate, tuple(precisions), penalty, (int(sums[0]), int(sums[1])), signature)


def sentence_bleu(
    prediction: str,
    references: Sequence[str],
    *,
    tokenize: str = "13a",
    smooth: str = "exp",
    smooth_value: float | None = None,
    lowercase: bool = False,
    effective_order: bool = True,
) -> float:
    """BLEU of one text.

    Args:
        prediction: the text.
        references: one or more.
        tokenize: as for `bleu`.
        smooth: as for `bleu`.
        smooth_value: as for `bleu`.
        lowercase: as for `bleu`.
        effective_order: as for `bleu`; on, since one text is often shorter than four tokens.

    Returns:
        The score in [0, 100].

    Raises:
        TypeError: the references are no list of strings.
        ValueError: there are none, or an option out of range.
    """
    scoring = Scoring(smooth, smooth_value, effective_order)
    check_references(references)
    counts = bleu_counts(prediction, references, tokenize=tokenize, lowercase=lowercase)
    return score(counts, scoring)[0]


def bleu_counts(
    prediction: str, references: Sequence[str], *, tokenize: str = "13a", lowercase: bool = False
) -> list[int]:
    """What a row adds to the corpus's sums, by which BLEU of any choice of rows is scored.

    Args:
        prediction: a text.
        references: one or more.
        tokenize: as for `bleu`.
        lowercase: as for `bleu`.

    Returns:
        Ten counts; their sums over rows are what `lora_core.evaluate.bleu_score.score` takes.

    Raises:
        ValueError: an unknown tokenizer.
    """
    cut = tokenizer(tokenize)
    texts = ((text.lower() if lowercase else text).rstrip() for text in (prediction, *references))
    said, *rights = map(cut, texts)
    most: Counter[Ngram] = Counter()
    for right in rights:
        for n in ORDERS:
            most |= ngrams(right, n)  # of each n-gram the larger count
    return row_sums(said, most.__getitem__, map(len, rights))


def _version() -> str:
    try:
        return f"lora-core-{metadata.version('lora-core')}"
    except metadata.PackageNotFoundError:  # run from its sources
        return "lora-core-not-installed"
