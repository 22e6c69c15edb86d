"""How well a batch's logits do, as sums and counts that add up over batches.

    sequence    accuracy: one label right, or all of several; f1 of several labels (micro)
    numbers     squared_error
    token       accuracy over words; f1 over entities where tags are BIO
    span        exact: beginning and end right

A figure is a sum over a count, so that those of all batches give the figure of the whole data: F1
too, as 2·hits / (predicted + true). An entity counts where its type and both its ends are right.

Ref: Tjong Kim Sang & De Meulder 2003, "Introduction to the CoNLL-2003 shared task", section 2.4.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.data.task_encoding import IGNORED
from lora_core.models.task_heads import HeadShape

Figure = tuple[float, float]


def figure_names(shape: HeadShape) -> tuple[str, ...]:
    """The figures of a head; the first says how good it is."""
    if shape.kind == "span":
        return ("exact",)
    if shape.problem == "regression":
        return ("squared_error",)
    several = shape.problem == "multi_label_classification"
    return ("accuracy", "f1") if several or is_bio(shape) else ("accuracy",)


def is_bio(shape: HeadShape) -> bool:
    """Whether a head's labels mark entities: O, B-… and I-…, and nothing else."""
    begun = any(label.startswith("B-") for label in shape.labels)
    known = all(label == "O" or label[:2] in ("B-", "I-") for label in shape.labels)
    return shape.kind == "token" and known and begun


@torch.no_grad()
def figures_of(shape: HeadShape, logits: Tensor, batch: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a batch.

    Args:
        shape: of the head.
        logits: as `MultiHead.forward` gives them.
        batch: with labels.

    Returns:
        Name -> (sum, count).
    """
    if shape.kind == "span":
        starts, ends = best_spans(logits)
        right = (starts == batch["start_positions"]) & (ends == batch["end_positions"])
        return {"exact": (float(right.sum()), len(right))}
    labels = batch["labels"]
    if shape.problem == "regression":
        difference = logits.squeeze(-1) - labels
        return {"squared_error": (float((difference**2).sum()), len(labels))}
    if shape.problem == "multi_label_classification":
        said, true = logits > 0, labels > 0.5
        hits = 2 * float((said & true).sum())
        both = (said == true).all(dim=-1)
        return {
            "accuracy": (float(both.sum()), len(labels)),
            "f1": (hits, float(said.sum() + true.sum())),
        }
    said, kept = logits.argmax(dim=-1), labels != IGNORED
    found = {"accuracy": (float((said == labels)[kept].sum()), float(kept.sum()))}
    if is_bio(shape):
        counts = [
            entity_counts(_named(shape, s[keep]), _named(shape, t[keep]))
            for s, t, keep in zip(said, labels, kept, strict=True)
        ]
        found["f1"] = (float(sum(c[0] for c in counts)), float(sum(c[1] for c in counts)))
    return found


def _named(shape: HeadShape, numbers: Tensor) -> list[str]:
    return [shape.labels[i] for i in numbers.tolist()]


def entity_counts(said: Sequence[str], true: Sequence[str]) -> tuple[int, int]:
    """(2 · entities that are right, entities said + true) of one sentence."""
    predicted, right = entities(said), entities(true)
    return 2 * len(predicted & right), len(predicted) + len(right)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, end) of each entity; an I- that continues nothing begins one, as conlleval."""
    found, begun = set(), None
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        if begun is not None and not (mark == "I" and kind == begun[0]):
            found.add((begun[0], begun[1], i))
            begun = None
        if mark in ("B", "I") and begun is None:
            begun = (kind, i)
    return found


def best_spans(logits: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The likeliest span of each row: start ≤ end, the greatest sum of logits.

    Args:
        logits: (B, T, 2), lowest where padded.
        inside: (B, T) bool, where both ends may stand; None: anywhere.

    Returns:
        Starts and ends (B,).
    """
    begin, end = (part.double() for part in logits.unbind(-1))  # (B, T) each; sums stay finite
    if inside is not None:
        begin, end = (part.masked_fill(~inside, -1e300) for part in (begin, end))
    # the best start up to each end, so that no (T, T) table is needed
    best, where = begin.cummax(dim=1)
    ends = (best + end).argmax(dim=1)  # (B,)
    return where.gather(1, ends[:, None])[:, 0], ends
