"""What trained heads say of rows: labels, tags, answers; and how often that is right.

Rows lead back to what they were made of. The windows of a long context are compared by the margin
of their best span over "no answer", and the best window speaks, as in BERT's SQuAD 2.0; tags come
back by word, over all the rows of a sentence.

Ref: Devlin et al. 2019, arXiv:1810.04805, section 4.3 (the margin over the null span).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.data.task_encoding import TaskRow
from lora_core.data.task_records import QuestionExample, TextExample, WordsExample
from lora_core.data.task_rows import TaskData
from lora_core.evaluate.estimate import Estimate, mean, proportion, ratio
from lora_core.evaluate.head_figures import best_spans, entity_counts, is_bio
from lora_core.evaluate.squad import exact, f1
from lora_core.models.multi_head import MultiHead
from lora_core.models.task_heads import HeadShape

Prediction = dict[str, Any]


@torch.no_grad()
def predict(model: MultiHead, task: TaskData, batch_size: int = 16) -> list[Prediction]:
    """What a task's head says of each example.

    Args:
        model: left in the mode it was in; predictions are made in evaluation mode.
        task: rows, with or without labels; its name is the head's.
        batch_size: rows in a batch.

    Returns:
        By example: {"label", "score"} (a probability), {"label": [names], "scores": {name:
        probability}} of several, {"label": number}; {"tags": by word}, None for a word without a
        token; {"answer" ("" for none), "start" (character, None for none), "margin"}.
    """
    shape, modes = model.head(task.name).shape, model.training
    model.eval()
    try:
        found: list[Prediction] = [{} for _ in task.examples]
        for row, logits in _scored(model, task, batch_size):
            _SAY[shape.kind](shape, task, row, logits, found[row["example"]])
    finally:
        model.train(modes)
    for prediction, example in zip(found, task.examples, strict=True):
        if isinstance(example, WordsExample):
            by_word = prediction.pop("by_word", {})
            prediction["tags"] = [by_word.get(i) for i in range(len(example.words))]
    return found


def _scored(model: MultiHead, task: TaskData, batch_size: int) -> Iterator[tuple[TaskRow, Tensor]]:
    """Each row and its logits on the CPU; rows of about one length share a batch."""
    order = sorted(range(len(task.rows)), key=lambda i: len(task.rows[i]["input_ids"]))
    for first in range(0, len(order), batch_size):
        rows = [task.rows[i] for i in order[first : first + batch_size]]
        batch = task.collate(rows)
        inputs = {
            name: batch[name].to(model.device)
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in batch
        }
        logits = model(task.name, **inputs).logits.float().cpu()
        yield from zip(rows, logits, strict=True)


def _say_label(
    shape: HeadShape, task: TaskData, row: TaskRow, logits: Tensor, said: Prediction
) -> None:
    if shape.problem == "regression":
        said["label"] = logits.item()
        return
    if shape.problem == "multi_label_classification":
        scores = torch.sigmoid(logits).tolist()
        said["label"] = [n for n, score in zip(shape.labels, scores, strict=True) if score > 0.5]
        said["scores"] = dict(zip(shape.labels, scores, strict=True))
        return
    best = int(logits.argmax())
    said |= {"label": shape.labels[best], "score": float(logits.softmax(-1)[best])}


def _say_tags(
    shape: HeadShape, task: TaskData, row: TaskRow, logits: Tensor, said: Prediction
) -> None:
    best = logits.argmax(dim=-1).tolist()
    by_word = said.setdefault("by_word", {})
    by_word |= {w: shape.labels[best[t]] for t, w in enumerate(row["words"]) if w >= 0}


def _say_span(
    shape: HeadShape, task: TaskData, row: TaskRow, logits: Tensor, said: Prediction
) -> None:
    size, offsets = len(row["input_ids"]), row["offsets"]
    logits = logits[:size]
    inside = torch.tensor([[place[0] >= 0 for place in offsets]])
    start, end = (int(place) for place in best_spans(logits[None], inside))
    nowhere = row["nowhere"]
    margin = float(logits[start, 0] + logits[end, 1] - logits[nowhere].sum())
    if margin <= said.get("margin", float("-inf")):
        return
    example = task.examples[row["example"]]
    assert isinstance(example, QuestionExample)
    begin, stop = offsets[start][0], offsets[end][1]
    text = example.context[begin:stop]
    begin += len(text) - len(text.lstrip())
    said |= {"answer": text.strip(), "start": begin, "margin": margin}
    if margin <= 0:
        said |= {"answer": "", "start": None}


_SAY = {"sequence": _say_label, "token": _say_tags, "span": _say_span}


def measure(model: MultiHead, task: TaskData, batch_size: int = 16) -> dict[str, Estimate]:
    """How good a task's head is on labelled examples.

    Args:
        model: with the head.
        task: with labels.
        batch_size: rows in a batch.

    Returns:
        Of a sequence "accuracy", or "squared_error" of numbers; of tokens "accuracy" over words
        (sentences are resampled) and, for BIO tags, "f1" over entities; of spans "exact_match" and
        "f1" as SQuAD counts them, in [0, 1].

    Raises:
        ValueError: no examples.
    """
    said, shape = predict(model, task, batch_size), model.head(task.name).shape
    if shape.kind == "sequence":
        return _measure_texts(shape, said, task.examples)
    if shape.kind == "token":
        return _measure_tags(shape, said, task.examples)
    answers = [prediction["answer"] for prediction in said]
    references = [
        [text for text, _ in example.answers or ()] or [""]
        for example in task.examples
        if isinstance(example, QuestionExample)
    ]
    hits = list(map(exact, answers, references))
    return {
        "exact_match": proportion(sum(hits), len(hits), unit="questions"),
        "f1": mean(list(map(f1, answers, references)), unit="questions"),
    }


def _measure_texts(
    shape: HeadShape, said: Sequence[Prediction], examples: Iterable[Any]
) -> dict[str, Estimate]:
    texts = [example for example in examples if isinstance(example, TextExample)]
    pairs = list(zip(said, texts, strict=True))
    if shape.problem == "regression":
        errors = [(one["label"] - float(text.label)) ** 2 for one, text in pairs]  # type: ignore[arg-type]
        return {"squared_error": mean(errors, unit="texts")}
    hits = [_labels(one["label"]) == _labels(text.label) for one, text in pairs]
    return {"accuracy": proportion(sum(hits), len(hits), unit="texts")}


def _labels(value: Any) -> set[str]:
    return set(value) if isinstance(value, list | tuple) else {str(value)}


def _measure_tags(
    shape: HeadShape, said: Sequence[Prediction], examples: Iterable[Any]
) -> dict[str, Estimate]:
    tagged = [
        (one["tags"], example.tags)
        for one, example in zip(said, examples, strict=True)
        if isinstance(example, WordsExample) and example.tags is not None
    ]
    hits = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in tagged]
    sizes = [len(true) for _, true in tagged]
    found = {"accuracy": ratio(hits, sizes, unit="words")}
    if is_bio(shape):
        counts = [entity_counts([tag or "O" for tag in a], b) for a, b in tagged]
        if any(both for _, both in counts):
            found["f1"] = ratio([c[0] for c in counts], [c[1] for c in counts])
    return found
