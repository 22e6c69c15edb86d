r"""One vector a text, and how alike texts are by the cosine of their vectors.

A text's vector is the mean of its tokens' last hidden states, the special ones included, as models
of sentence-transformers pool by default (Reimers & Gurevych 2019, section 3), or the first token's
state ("cls"). How the encoder was trained decides which: a plain masked-token model was trained for
neither, its cosines are all near 1, and only their order says something.

Against BERTScore: one product a pair, blind to which words met; it forgives another order, and
another length.

Ref: Reimers & Gurevych 2019, arXiv:1908.10084.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.data import Tokenizer
from lora_core.evaluate.encoding import TextEncoder, by_length, shown
from lora_core.evaluate.estimate import Estimate, mean
from lora_core.evaluate.pairs import check_pairs, check_texts

POOLINGS = ("mean", "cls")


def embed(
    encoder: nn.Module,
    tok: Tokenizer,
    texts: Sequence[str],
    pooling: str = "mean",
    *,
    normalize: bool = False,
    layer: int | None = None,
    batch_size: int = 32,
) -> Tensor:
    """A vector for each text.

    Args:
        encoder: from `load_model`, with any head or none.
        tok: its tokenizer.
        texts: at least one; white space at the ends is taken off.
        pooling: "mean" over a text's tokens, the special ones included, or "cls": the first token.
        normalize: make each vector's length 1.
        layer: whose output is pooled; None: the last layer's.
        batch_size: texts at a time.

    Returns:
        (texts, C) in float32 or wider, on the encoder's device, without a gradient.

    Raises:
        ValueError: no texts, no encoder, an option out of range, or a NaN.
        TypeError: no list of texts.

    Warns:
        UserWarning: texts longer than the encoder's positions, which are cut.
    """
    check_texts(texts, "texts")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
    reader = TextEncoder(encoder, tok)
    chosen = reader.layers if layer is None else layer
    reader.check(chosen, batch_size)
    contents = [reader.content(text) for text in texts]
    if reader.truncated:
        warnings.warn(
            f"{reader.truncated} of {len(texts)} texts are longer than {reader.room} tokens: cut",
            stacklevel=2,
        )
    found: dict[int, Tensor] = {}
    for rows in by_length(contents, batch_size):
        states, mask = reader.states([contents[row] for row in rows], chosen)
        found.update(zip(rows, _pooled(states, mask, pooling), strict=True))
    vectors = torch.stack([found[row] for row in range(len(texts))])  # (texts, C)
    return nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(B, C) from hidden states (B, T, C) and a mask (B, T)."""
    if pooling == "cls":
        return states[:, 0]
    kept = states.masked_fill(~mask[..., None], 0)
    return kept.sum(1) / mask.sum(1, keepdim=True)


def similarity_rows(
    encoder: nn.Module,
    tok: Tokenizer,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    pooling: str = "mean",
    batch_size: int = 32,
) -> list[float]:
    """Each row's cosine with its reference, the best of several.

    Args:
        encoder: from `load_model`.
        tok: its tokenizer.
        predictions: a text a row.
        references: one or more a row.
        pooling: as in `embed`.
        batch_size: texts at a time.

    Returns:
        Numbers in [-1, 1]; an empty text is like none: 0.

    Raises:
        ValueError: no rows, a row without references, or what `embed` refuses.
        TypeError: references that are no lists of texts.

    Warns:
        UserWarning: rows with an empty text, by number; texts that are cut.
    """
    check_pairs(predictions, references)
    texts = [*predictions, *(text for known in references for text in known)]
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    options: dict[str, Any] = {"normalize": True, "batch_size": batch_size}
    vectors = embed(encoder, tok, distinct, pooling, **options) if distinct else ()
    by_text = dict(zip(distinct, vectors, strict=True))
    empty, scores = [], []
    for row, (prediction, known) in enumerate(zip(predictions, references, strict=True)):
        x, others = by_text.get(prediction), [by_text.get(text) for text in known]
        if x is None or any(y is None for y in others):
            empty.append(row)
        scores.append(
            max(0.0 if x is None or y is None else float(torch.dot(x, y)) for y in others)
        )
    if empty:
        warnings.warn(
            f"{len(empty)} rows have an empty text, which is like nothing (0): {shown(empty)}",
            stacklevel=2,
        )
    return scores


def embedding_similarity(
    encoder: nn.Module,
    tok: Tokenizer,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    pooling: str = "mean",
    batch_size: int = 32,
) -> Estimate:
    """The mean of `similarity_rows`; arguments and errors are theirs.

    Args:
        encoder: from `load_model`.
        tok: its tokenizer.
        predictions: a text a row.
        references: one or more a row; the best counts.
        pooling: as in `embed`.
        batch_size: texts at a time.

    Returns:
        The mean cosine over rows.
    """
    return mean(
        similarity_rows(
            encoder, tok, predictions, references, pooling=pooling, batch_size=batch_size
        )
    )
