r"""Measures of answers by name: what each needs, and what it makes of them.

    exact, f1             equal to a reference; words in common with it (squad.py)
    bleu, rouge           n-grams in common with the references (bleu.py, rouge.py)
    bertscore, embedding  nearness in an encoder's eyes (bertscore.py, embedding.py)
    distinct, repetition  how varied the answers are, without a reference (diversity.py)

A metric says beforehand what it needs, so that a missing reference is found before an hour of
generation and not after it. An empty answer is scored as the empty text that it is, and how many
there are is a figure of its own: a model that says nothing can look well in a mean.

Each metric gives `Figure`s, by which two models on the same questions are compared (figures.py).
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lora_core.data import Tokenizer
from lora_core.evaluate.answers import Answer
from lora_core.evaluate.bertscore import bert_score
from lora_core.evaluate.bleu import bleu, bleu_counts
from lora_core.evaluate.bleu_score import Scoring, score
from lora_core.evaluate.bleu_tokens import tokenize_13a
from lora_core.evaluate.diversity import distinct, repetition, repetition_rows
from lora_core.evaluate.embedding import similarity_rows
from lora_core.evaluate.estimate import Estimate, proportion
from lora_core.evaluate.figures import Figure, of_scores
from lora_core.evaluate.ngrams import Ngram, ngrams
from lora_core.evaluate.rouge import KINDS, rouge_row
from lora_core.evaluate.squad import exact, f1

Encoder = tuple[nn.Module, Tokenizer]
References = Sequence[Sequence[str]]
Make = Callable[[Sequence[str], References, Encoder | None], dict[str, Figure]]


@dataclass(frozen=True)
class Metric:
    """A measure of answers."""

    says: str
    """what it tells, in a few words"""
    figures: Make
    """texts, references and an encoder -> figures by name"""
    references: bool = True
    """whether it needs references"""
    encoder: bool = False
    """whether it needs an encoder"""


class _Asked(Protocol):
    """What a question and an answer have in common."""

    @property
    def references(self) -> tuple[str, ...]:
        """Good answers."""

    @property
    def where(self) -> str:
        """file:line."""


def check_metrics(names: Sequence[str], *, encoder: bool = True) -> None:
    """Refuse names of metrics that there are not, or whose encoder is missing.

    Args:
        names: of `METRICS`.
        encoder: whether one is there.

    Raises:
        ValueError: no name, an unknown one (with the nearest that exists), one twice, or one that
            needs the encoder that is not there, or an encoder that none needs.
    """
    if not names:
        raise ValueError(f"no metric is named; there are {', '.join(METRICS)}")
    for place, name in enumerate(names):
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no metric {name!r} (there are {', '.join(METRICS)}){hint}")
        if name in names[:place]:
            raise ValueError(f"metric {name!r} is named twice")
    needing = [name for name in names if METRICS[name].encoder]
    if needing and not encoder:
        raise ValueError(f"{needing[0]} needs an encoder's folder: give --encoder DIR")
    if encoder and not needing:
        raise ValueError(f"no metric of {', '.join(names)} needs an encoder")


def check_references(rows: Sequence[_Asked], names: Iterable[str]) -> None:
    """Refuse rows without the references that a metric needs.

    Args:
        rows: questions or answers.
        names: of metrics.

    Raises:
        ValueError: names the metric and the first such row.
    """
    needing = [name for name in names if METRICS[name].references]
    bare = [row for row in rows if not row.references]
    if needing and bare:
        raise ValueError(
            f"{bare[0].where}: metric {needing[0]} compares with references, and this row has none "
            f"({len(bare)} of {len(rows)} rows have none): add them, or leave the metric out"
        )


def metric_figures(
    answers: Sequence[Answer], names: Sequence[str], encoder: Encoder | None = None
) -> dict[str, Figure]:
    """Figures of answers, each able to be compared with another model's (see `difference`).

    Args:
        answers: with references where a metric needs them.
        names: of `METRICS`.
        encoder: an encoder and its tokenizer, for the metrics that need one.

    Returns:
        Figures by name, in the order of the metrics; and `empty_answers`, the share of answers
        with no text but white space.

    Raises:
        ValueError: no answers, an unknown metric, or one that lacks what it needs.
    """
    check_metrics(names, encoder=encoder is not None)
    if not answers:
        raise ValueError("there are no answers to measure")
    check_references(answers, names)
    texts = [answer.text for answer in answers]
    references = [answer.references for answer in answers]
    found: dict[str, Figure] = {}
    for name in names:
        found |= METRICS[name].figures(texts, references, encoder)
    empty = [not text.strip() for text in texts]
    found["empty_answers"] = of_scores(empty, proportion(sum(empty), len(empty)))
    return found


def measure(
    answers: Sequence[Answer], names: Sequence[str], encoder: Encoder | None = None
) -> dict[str, Estimate]:
    """`metric_figures` as estimates alone; arguments and errors are its.

    Args:
        answers: with references where a metric needs them.
        names: of `METRICS`.
        encoder: an encoder and its tokenizer.

    Returns:
        Estimates by name of figure.

    Raises:
        ValueError: as `metric_figures`.
    """
    figures = metric_figures(answers, names, encoder)
    return {name: figure.estimate for name, figure in figures.items()}


# --- one maker a metric ---


def _exact(texts: Sequence[str], references: References, _: Encoder | None) -> dict[str, Figure]:
    hits = [exact(text, known) for text, known in zip(texts, references, strict=True)]
    return {"exact_match": of_scores(hits, proportion(sum(hits), len(hits)))}


def _f1(texts: Sequence[str], references: References, _: Encoder | None) -> dict[str, Figure]:
    return {"f1": of_scores(list(map(f1, texts, references)))}


def _bleu(texts: Sequence[str], references: References, _: Encoder | None) -> dict[str, Figure]:
    import numpy as np

    sums = np.array([bleu_counts(*row) for row in zip(texts, references, strict=True)], float)
    scoring = Scoring()

    def on(draw: Any) -> float:
        return score(sums[draw].sum(axis=0).tolist(), scoring)[0]

    return {"bleu": Figure(bleu(texts, references).estimate, len(texts), on)}


def _rouge(texts: Sequence[str], references: References, _: Encoder | None) -> dict[str, Figure]:
    rows = [rouge_row(text, known) for text, known in zip(texts, references, strict=True)]
    return {kind: of_scores([row[kind].f1 for row in rows]) for kind in KINDS}


def _distinct(texts: Sequence[str], _: References, __: Encoder | None) -> dict[str, Figure]:
    return {f"distinct_{n}": _distinct_figure(texts, n) for n in (1, 2)}


def _distinct_figure(texts: Sequence[str], n: int) -> Figure:
    import numpy as np

    numbers: dict[Ngram, int] = {}
    rows = []
    for text in texts:
        counts = ngrams(tokenize_13a(text), n)
        ids = [numbers.setdefault(ngram, len(numbers)) for ngram in counts]
        rows.append((np.array(ids, np.int64), counts.total()))

    def on(draw: Any) -> float:
        seen = np.zeros(len(numbers), bool)
        total = 0
        for row in draw:
            ids, count = rows[row]
            seen[ids] = True
            total += count
        return float(seen.sum() / total) if total else math.nan

    return Figure(distinct(texts, n), len(texts), on)


def _repetition(texts: Sequence[str], _: References, __: Encoder | None) -> dict[str, Figure]:
    return {"repetition_4": of_scores(repetition_rows(texts, 4), repetition(texts, 4))}


def _bertscore(
    texts: Sequence[str], references: References, encoder: Encoder | None
) -> dict[str, Figure]:
    assert encoder is not None
    found = bert_score(*encoder, texts, references)
    columns = zip(*found.rows, strict=True)
    return {
        name: of_scores(column, estimate)
        for (name, estimate), column in zip(found.estimates().items(), columns, strict=True)
    }


def _embedding(
    texts: Sequence[str], references: References, encoder: Encoder | None
) -> dict[str, Figure]:
    assert encoder is not None
    return {"embedding_similarity": of_scores(similarity_rows(*encoder, texts, references))}


METRICS = {
    "exact": Metric("the share equal to a reference, normalised as SQuAD's", _exact),
    "f1": Metric("words in common with the nearest reference, as SQuAD's", _f1),
    "bleu": Metric("BLEU in [0, 100], as sacreBLEU's", _bleu),
    "rouge": Metric("ROUGE-1, -2 and -L, F1, as rouge-score's", _rouge),
    "distinct": Metric(
        "different words and pairs of words, as shares", _distinct, references=False
    ),
    "repetition": Metric("share of 4-grams that a text repeats", _repetition, references=False),
    "bertscore": Metric("nearness of tokens in an encoder's eyes", _bertscore, encoder=True),
    "embedding": Metric("nearness of whole texts in an encoder's eyes", _embedding, encoder=True),
}
"""the metrics by name"""
