r"""Exact match and token F1 of short answers, after SQuAD's normalisation.

A prediction and a reference are compared as words, with what does not change an answer taken away:

    "The  Eiffel Tower!"  ──lower case──punctuation──a, an, the──spaces──▶  "eiffel tower"

Exact match asks for equal texts. F1 is the harmonic mean of precision and recall over the words
that both have, each as often as both have it. Of several references the best counts.

An answer may be that there is none: the reference "". Saying nothing is then worth 1 and anything
else 0, as in SQuAD 2.0; SQuAD 1.1's script gives an F1 of 0 to two empty texts and is the same
elsewhere. (SQuAD 2.0's script also drops empty references of a question that has others, when it
reads its file. Here what stands in the list counts.)

Only ASCII punctuation is taken away, and only English articles: the scripts' rules are kept for
the sake of comparable figures. Text without spaces between words counts as one word.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from lora_core.evaluate.estimate import Estimate, mean, proportion
from lora_core.evaluate.pairs import check_pairs, check_references

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Take away what does not change an answer: case, ASCII punctuation, articles, extra spaces.

    Args:
        text: an answer.

    Returns:
        Its words, one space between.

    Ref:
        Rajpurkar et al. 2016, "SQuAD", arXiv:1606.05250, section 6.1.
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction is one of the references, after normalisation.

    Args:
        prediction: an answer.
        references: one or more right answers.

    Returns:
        True where one is equal.

    Raises:
        TypeError: the references are no list of strings.
        ValueError: there are none.
    """
    check_references(references)
    said = normalize_answer(prediction)
    return any(said == normalize_answer(reference) for reference in references)


def f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 over words between a prediction and a reference, after normalisation.

    Args:
        prediction: an answer.
        references: one or more right answers.

    Returns:
        2PR / (P + R) in [0, 1], P and R the shared words over the prediction's and the reference's.
        Where either has no words: 1 if neither has, else 0.

    Raises:
        TypeError: the references are no list of strings.
        ValueError: there are none.
    """
    check_references(references)
    said = normalize_answer(prediction).split()
    return max(_overlap(said, normalize_answer(reference).split()) for reference in references)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Estimate:
    """The share of predictions that are one of their references.

    Args:
        predictions: (rows,) answers.
        references: (rows,) lists of one or more right answers.

    Returns:
        A share in [0, 1], not a percentage, with Wilson's interval.

    Raises:
        TypeError: a string where a list of strings belongs.
        ValueError: no rows, other numbers of rows, or a row without references.
    """
    check_pairs(predictions, references)
    return proportion(sum(map(exact, predictions, references)), len(predictions))


def f1_score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Estimate:
    """The mean F1 of predictions against the best of their references.

    Args:
        predictions: (rows,) answers.
        references: (rows,) lists of one or more right answers.

    Returns:
        A mean in [0, 1], not a percentage; rows are resampled for its interval.

    Raises:
        TypeError: a string where a list of strings belongs.
        ValueError: no rows, other numbers of rows, or a row without references.
    """
    check_pairs(predictions, references)
    return mean(list(map(f1, predictions, references)))


def _overlap(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    shared = (Counter(said) & Counter(right)).total()
    # 2PR / (P + R) = 2 shared / (both lengths), in one rounding
    return 2 * shared / (len(said) + len(right))
