r"""ROUGE: how much of a reference a summary holds, equal to the package rouge-score's figures.

    rouge1 … rouge9    n-grams that both have, each as often as both have it
    rougeL             the longest common subsequence of words: in order, gaps allowed
    rougeLsum          the same from sentence to sentence, one a line: words of a reference's
                       sentence that are in its common subsequence with any sentence of the summary

Each gives a precision (of what the summary has), a recall (of what the reference has) and their
harmonic mean. Of several references each kind takes the one with the best F1, whole: the three
figures of a row always belong to the same reference. A corpus has the mean of its rows.

Words are runs of a-z and 0-9 after lower case, as in ROUGE-1.5.5. Text in other scripts has no such
words and scores 0, even against itself; `sentence_bleu(…, tokenize="char")` measures such text.

rouge-score fills the table of rougeL cell by cell. Here a row of it is one integer (lcs.py), so two
texts of 20,000 words take a fraction of a second instead of minutes and gigabytes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from lora_core.evaluate.estimate import Estimate, mean
from lora_core.evaluate.lcs import lcs_length, lcs_places
from lora_core.evaluate.ngrams import ngrams
from lora_core.evaluate.pairs import check_pairs, check_references

KINDS = ("rouge1", "rouge2", "rougeL")
MISSING = "stem=True needs nltk (pip install 'lora-core[evaluate]')"
_WORD = re.compile("[a-z0-9]+")


class Overlap(NamedTuple):
    """What a text and a reference have in common, each figure in [0, 1]."""

    precision: float
    """of the text's own parts"""
    recall: float
    """of the reference's parts"""
    f1: float
    """their harmonic mean"""


@dataclass(frozen=True)
class Rouge:
    """One kind of ROUGE over a corpus: means over rows, each in [0, 1]."""

    precision: Estimate
    """of what the predictions have"""
    recall: Estimate
    """of what the references have"""
    f1: Estimate
    """the mean of the rows' F1, not the F1 of the means"""


def rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    kinds: Sequence[str] = KINDS,
    stem: bool = False,
) -> dict[str, Rouge]:
    """ROUGE of a corpus.

    Args:
        predictions: (rows,) texts.
        references: (rows,) lists of one or more texts.
        kinds: of "rouge1" … "rouge9", "rougeL", "rougeLsum".
        stem: whether words of more than three letters are cut to Porter's stem; needs nltk.

    Returns:
        For each kind its three means; rows are resampled for their intervals.

    Raises:
        TypeError: a string where a list of strings belongs.
        ValueError: no rows, other numbers of rows, a row without references, or an unknown kind.
        ImportError: `stem` without nltk.

    Ref:
        Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    check_pairs(predictions, references)
    rows = [rouge_row(p, r, kinds, stem) for p, r in zip(predictions, references, strict=True)]
    return {kind: Rouge(*(mean(column) for column in _columns(rows, kind))) for kind in kinds}


def rouge_row(
    prediction: str,
    references: Sequence[str],
    kinds: Sequence[str] = KINDS,
    stem: bool = False,
) -> dict[str, Overlap]:
    """ROUGE of one text.

    Args:
        prediction: the text.
        references: one or more.
        kinds: as for `rouge`.
        stem: as for `rouge`.

    Returns:
        For each kind the figures against the reference whose F1 is best (of equals the first).

    Raises:
        TypeError: the references or the kinds are no list of strings.
        ValueError: there are none, or an unknown kind.
        ImportError: `stem` without nltk.
    """
    check_references(references)
    scorers = {kind: _scorer(kind) for kind in check_kinds(kinds)}
    said, *rights = (_Text(text, stem) for text in (prediction, *references))
    return {
        kind: max((score(said, right) for right in rights), key=lambda overlap: overlap.f1)
        for kind, score in scorers.items()
    }


def check_kinds(kinds: Sequence[str]) -> Sequence[str]:
    """Refuse kinds of ROUGE that there are not.

    Args:
        kinds: names.

    Returns:
        The same.

    Raises:
        TypeError: one string in place of a list.
        ValueError: none, or an unknown one.
    """
    if isinstance(kinds, str):
        raise TypeError(f"kinds must be a list of names; got the string {kinds!r}")
    for kind in kinds:
        if kind not in ("rougeL", "rougeLsum") and not re.fullmatch("rouge[1-9]", kind):
            raise ValueError(f"kinds must be of rouge1 … rouge9, rougeL, rougeLsum; got {kind!r}")
    if not kinds:
        raise ValueError("kinds is empty: name one, rougeL for one")
    return kinds


class _Text:
    """A text, cut into words when first asked, and once."""

    def __init__(self, text: str, stem: bool) -> None:
        self._text, self._stem = text, _stemmer() if stem else None
        self._words: list[str] | None = None

    @property
    def words(self) -> list[str]:
        if self._words is None:
            self._words = self._cut(self._text)
        return self._words

    def sentences(self) -> list[list[str]]:
        return [self._cut(line) for line in self._text.split("\n")]

    def _cut(self, text: str) -> list[str]:
        words = _WORD.findall(text.lower())
        if self._stem is None:
            return words
        return [self._stem(word) if len(word) > 3 else word for word in words]


Scorer = Callable[[_Text, _Text], Overlap]


def _scorer(kind: str) -> Scorer:
    if kind == "rougeL":
        return _by_subsequence
    if kind == "rougeLsum":
        return _by_sentences
    n = int(kind[-1])
    return lambda said, right: _by_ngrams(said, right, n)


def _by_ngrams(said: _Text, right: _Text, n: int) -> Overlap:
    ours, theirs = ngrams(said.words, n), ngrams(right.words, n)
    return _overlap((ours & theirs).total(), ours.total(), theirs.total())


def _by_subsequence(said: _Text, right: _Text) -> Overlap:
    return _overlap(lcs_length(right.words, said.words), len(said.words), len(right.words))


def _by_sentences(said: _Text, right: _Text) -> Overlap:
    """Lin 2004, section 3.2; a word counts no more often than either text has it."""
    ours, theirs = said.sentences(), right.sentences()
    left = Counter(_joined(ours)) & Counter(_joined(theirs))
    hits = 0
    for sentence in theirs:
        places = {place for one in ours for place in lcs_places(sentence, one)}
        for word in (sentence[place] for place in places):
            if left[word]:
                left[word] -= 1
                hits += 1
    return _overlap(hits, sum(map(len, ours)), sum(map(len, theirs)))


def _joined(sentences: Iterable[list[str]]) -> list[str]:
    return [word for sentence in sentences for word in sentence]


def _overlap(shared: int, ours: int, theirs: int) -> Overlap:
    if not shared:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = shared / ours, shared / theirs
    return Overlap(precision, recall, 2 * precision * recall / (precision + recall))


def _columns(rows: Sequence[dict[str, Overlap]], kind: str) -> list[tuple[float, ...]]:
    """Precisions, recalls and F1 of the rows."""
    return list(zip(*(row[kind] for row in rows), strict=True))


@cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise ImportError(MISSING) from None
    stem: Callable[[str], str] = PorterStemmer().stem
    return lru_cache(maxsize=1 << 16)(stem)
