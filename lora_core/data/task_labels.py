"""The labels of a task: which there are, in which order, and which number one has."""

from collections.abc import Iterable, Sequence

from lora_core.data.task_records import Example, TextExample, WordsExample
from lora_core.targets import nearest

_SINGLE = "single_label_classification"


def problem_of(examples: Sequence[Example]) -> str:
    """What is to be said of texts, as transformers names it.

    Args:
        examples: of one file, with labels.

    Returns:
        "regression" where a label is a number with a point, "multi_label_classification" where it
        is a list, else "single_label_classification" (also for tags and spans).

    Raises:
        ValueError: one row has a list, another has not; or names among numbers.
    """
    texts = [example for example in examples if isinstance(example, TextExample)]
    if any(isinstance(example.label, tuple) for example in texts):
        for example in texts:
            if not isinstance(example.label, tuple):
                raise ValueError(
                    f"{example.where}: label must be a list, as in other rows of this file; got "
                    f"{example.label!r}"
                )
        return "multi_label_classification"
    return "regression" if any(isinstance(e.label, float) for e in texts) else _SINGLE


def labels_of(examples: Iterable[Example], problem: str) -> list[str]:
    """The names that occur, sorted; integers by value where all are.

    Raises:
        ValueError: fewer than two, so that there is nothing to tell apart.
    """
    found: dict[str, str] = {}
    for example in examples:
        for label in names_of(example, problem):
            found.setdefault(label, example.where)
    if len(found) == 1 and problem == _SINGLE:
        label, where = next(iter(found.items()))
        raise ValueError(f"{where}: {label!r} is the only label: there is nothing to tell apart")
    try:
        return sorted(found, key=int)
    except ValueError:
        return sorted(found)


def names_of(example: Example, problem: str) -> tuple[str, ...]:
    """The labels of one example by name."""
    if isinstance(example, WordsExample):
        return example.tags or ()
    if not isinstance(example, TextExample) or problem == "regression":
        return ()
    if isinstance(example.label, tuple):
        return example.label
    return () if example.label is None else (str(example.label),)


def number_of(label: str, labels: Sequence[str], where: str) -> int:
    """A label's number.

    Raises:
        ValueError: training has not seen it; the message has file:line and the nearest names.
    """
    try:
        return labels.index(label)
    except ValueError:
        raise ValueError(
            f"{where}: label {label!r} is not among the {len(labels)} of the training data; "
            f"{nearest(label, list(labels))}"
        ) from None


def value_of(example: TextExample) -> float:
    """The number that a text is to be given.

    Raises:
        ValueError: it is none.
    """
    label = example.label
    try:
        if isinstance(label, tuple) or label is None:
            raise ValueError
        return float(label)
    except ValueError:
        raise ValueError(
            f"{example.where}: label must be a number, as in other rows of this file; got {label!r}"
        ) from None
