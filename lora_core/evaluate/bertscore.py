r"""BERTScore: how well each token of a candidate finds its like in a reference, and back.

    precision = Σ_c w_c max_r cos(c, r) / Σ_c w_c,   recall = Σ_r w_r max_c cos(c, r) / Σ_r w_r
    F1 = 2 P R / (P + R)

over contextual embeddings of one middle layer; w is 1, or how rare a token is in the references
(idf). The special tokens around a text can be a token's best match but have no weight, wherever
their ids stand. The scores of one encoder, layer and idf compare with each other and with nothing
else, so the result names all three.

Scores equal the bert-score package's 0.3.13 to rounding, with these differences:

* The best match of a token is taken over the other text's tokens. The package takes it over the
  batch's padded width, where padding counts 0: a token that is like nothing (all cosines below 0)
  scores 0 or below 0 there, depending on the other rows of its batch.
* A byte-level RoBERTa tokenizer cuts a text's first word as it cuts the others (`prefix_space`), as
  the package asks for and transformers 4 did; transformers 5 drops the request in silence, and
  gives other scores than those published. `prefix_space=False` gives these.
* A row whose candidate or reference is empty scores 0, as there, and is named. The package as of
  transformers 5 fails on it.
* Where all of a text's tokens have weight 0 (each stands in every reference) there is nothing to
  average: its side, and so F1, is 0 and the row is named; NaN and 0 there.

Of several references, precision, recall and F1 are each the best by itself, as there: an F1 need
not be the mean of the other two.

Ref: Zhang et al. 2020, arXiv:1904.09675, section 3.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.data import Tokenizer
from lora_core.evaluate.encoding import TextEncoder, by_length, shown
from lora_core.evaluate.estimate import Estimate, mean
from lora_core.evaluate.pairs import check_pairs

# family, layers -> the layer that follows human judgement best (the package's table, WMT16)
_TUNED = {
    ("bert", 12): 9,
    ("bert", 24): 18,
    ("roberta", 6): 5,
    ("roberta", 12): 10,
    ("roberta", 24): 17,
    ("xlm-roberta", 12): 9,
    ("xlm-roberta", 24): 17,
}
Baseline = float | tuple[float, float, float]


@dataclass(frozen=True)
class BertScore:
    """Scores of a set of texts, and what they were made with."""

    precision: Estimate
    """mean over rows: what of the candidates is in the references"""
    recall: Estimate
    """what of the references is in the candidates"""
    f1: Estimate
    """mean of the rows' F1"""
    rows: tuple[tuple[float, float, float], ...]
    """each row's precision, recall and F1"""
    layer: int
    """whose embeddings were compared; 0: the embeddings themselves"""
    idf: bool
    """whether rare tokens count more"""
    empty: tuple[int, ...]
    """rows whose candidate or one of whose references is empty: that pair scored 0"""
    weightless: tuple[int, ...]
    """rows with a text all of whose tokens have weight 0: its side, and so F1, is 0"""
    truncated: int
    """texts longer than the encoder's positions, which were cut"""

    def estimates(self) -> dict[str, Estimate]:
        """The three figures by name."""
        return {
            "bertscore_precision": self.precision,
            "bertscore_recall": self.recall,
            "bertscore_f1": self.f1,
        }


def bert_score(
    encoder: nn.Module,
    tok: Tokenizer,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    layer: int | None = None,
    idf: bool = False,
    batch_size: int = 32,
    baseline: Baseline | None = None,
    prefix_space: bool | None = None,
) -> BertScore:
    """Score texts against references by an encoder's embeddings.

    Args:
        encoder: from `load_model`: BERT, RoBERTa, XLM-R or CamemBERT, with any head or none.
        tok: its tokenizer.
        predictions: a candidate a row.
        references: one or more a row; the best counts.
        layer: whose output is compared; None: `default_layer`.
        idf: weigh tokens by -log of the share of references that hold them (plus-one smoothed).
        batch_size: texts at a time.
        baseline: b: scores become (x - b) / (1 - b), which spreads them out; one number, or one
            each for precision, recall and F1.
        prefix_space: a space before each text; None: for RoBERTa alone (see above).

    Returns:
        Means over rows with intervals, and the rows' scores.

    Raises:
        ValueError: no rows, a row without references, no encoder, an option out of range, a NaN.
        TypeError: references that are no lists of texts.
    """
    check_pairs(predictions, references)
    texts = TextEncoder(encoder, tok)
    texts.prefix_space = _family(texts) == "roberta" if prefix_space is None else prefix_space
    chosen = default_layer(_family(texts), texts.layers) if layer is None else layer
    texts.check(chosen, batch_size)
    below = _baseline(baseline)
    distinct = dict.fromkeys([*predictions, *(text for known in references for text in known)])
    ids = {text: texts.content(text) for text in distinct}
    documents = [ids[text] for known in references for text in known]
    weights = _Weights(texts.special_ids, _rarity(documents) if idf else None, len(documents))
    scorer = _Scorer(texts, weights, chosen, batch_size)
    pairs = [(p, r) for p, known in zip(predictions, references, strict=True) for r in known]
    scores = iter(scorer.pairs([(ids[p], ids[r]) for p, r in pairs]))
    rows = []
    for known in references:
        best = [max(column) for column in zip(*(next(scores) for _ in known), strict=True)]
        rows.append(tuple((x - b) / (1 - b) for x, b in zip(best, below, strict=True)))
    numbers = [row for row, known in enumerate(references) for _ in known]
    empty = _named(numbers, scorer.empty, "an empty candidate or reference")
    weightless = _named(numbers, scorer.weightless, "a text whose tokens all have weight 0")
    p, r, f = (mean(column) for column in zip(*rows, strict=True))
    return BertScore(p, r, f, tuple(rows), chosen, idf, empty, weightless, texts.truncated)


def default_layer(family: str, layers: int) -> int:
    """The layer to compare, of an encoder with so many.

    Args:
        family: "bert", "roberta" …
        layers: how many there are.

    Returns:
        The package's choice for the models of its table; else three quarters of the way up.
    """
    return _TUNED.get((family, layers), math.ceil(0.75 * layers))


def _family(texts: TextEncoder) -> str:
    return texts.trunk.config.model_type


def _baseline(given: Baseline | None) -> tuple[float, float, float]:
    below = (0.0, 0.0, 0.0) if given is None else given
    below = below if isinstance(below, tuple) else (below, below, below)
    if len(below) != 3 or not all(b < 1 for b in below):
        raise ValueError(f"baseline must be a number below 1, or three (P, R, F1); got {given}")
    return below


def _rarity(documents: Sequence[Sequence[int]]) -> dict[int, float]:
    """id -> log((N + 1) / (documents that hold it + 1))."""
    held: Counter[int] = Counter()
    for ids in documents:
        held.update(set(ids))
    return {token: math.log((len(documents) + 1) / (n + 1)) for token, n in held.items()}


def _named(numbers: Sequence[int], pairs: Iterable[int], what: str) -> tuple[int, ...]:
    """The rows that hold these pairs, said in a warning where there are any."""
    rows = tuple(dict.fromkeys(numbers[pair] for pair in pairs))
    if rows:
        warnings.warn(f"{len(rows)} rows have {what}, which scores 0: {shown(rows)}", stacklevel=3)
    return rows


@dataclass
class _Weights:
    """How much each token counts."""

    special: set[int]
    rarity: Mapping[int, float] | None
    documents: int

    def of(self, ids: Sequence[int]) -> list[float]:
        unseen = 1.0 if self.rarity is None else math.log(self.documents + 1)
        rarity = self.rarity or {}
        return [0.0 if i in self.special else rarity.get(i, unseen) for i in ids]


class _Scorer:
    """Precision, recall and F1 of pairs of texts, each a list of ids."""

    def __init__(self, texts: TextEncoder, weights: _Weights, layer: int, batch_size: int) -> None:
        self.texts, self.weights = texts, weights
        self.layer, self.batch_size = layer, batch_size
        self.empty: list[int] = []
        self.weightless: list[int] = []

    def pairs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, ...]]:
        """(P, R, F1) of each pair; texts are embedded some pairs at a time."""
        found: list[tuple[float, ...]] = []
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            embedded = self._embedded([ids for pair in part for ids in pair if all(pair)])
            for number, (candidate, reference) in enumerate(part, start):
                if not (candidate and reference):
                    self.empty.append(number)
                    found.append((0.0, 0.0, 0.0))
                    continue
                found.append(self._match(embedded, candidate, reference, number))
        return found

    def _embedded(self, contents: Sequence[list[int]]) -> dict[tuple[int, ...], Tensor]:
        """Directions of each text's tokens, (T, C), the special ones included."""
        distinct = [list(ids) for ids in dict.fromkeys(map(tuple, contents))]
        found = {}
        for rows in by_length(distinct, self.batch_size):
            states, mask = self.texts.states([distinct[row] for row in rows], self.layer)
            for row, state, real in zip(rows, states, mask, strict=True):
                x = state[real]
                found[tuple(distinct[row])] = x / x.norm(dim=-1, keepdim=True)
        return found

    def _match(
        self,
        embedded: Mapping[tuple[int, ...], Tensor],
        candidate: list[int],
        reference: list[int],
        number: int,
    ) -> tuple[float, ...]:
        x, y = embedded[tuple(candidate)], embedded[tuple(reference)]
        cosines = x @ y.T  # (candidate's tokens, reference's tokens)
        shares = []
        for ids, best in ((candidate, cosines.amax(1)), (reference, cosines.amax(0))):
            weights = self.weights.of(self.texts.around(ids))
            if not any(weights):
                self.weightless.append(number)
                shares.append(0.0)
                continue
            w = best.new_tensor(weights)
            shares.append(float(torch.dot(w, best) / w.sum()))
        p, r = shares
        return p, r, 2 * p * r / (p + r) if p + r else 0.0
