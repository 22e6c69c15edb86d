"""What a measure against references is given: one prediction a row, and one or more references.

References stand row by row, `references[i]` belonging to `predictions[i]`, and rows may have
different numbers of them. (sacreBLEU takes the other order, all first references, then all second
ones, which has to pad rows that have fewer.)

A string is a sequence of strings too, its characters, and a score of characters looks like any
other score. So a string in place of a list is refused here, once for all measures.
"""

from collections.abc import Sequence


def check_pairs(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse what no measure against references can be taken over.

    Args:
        predictions: one text a row.
        references: one or more texts a row.

    Raises:
        TypeError: a string where a list of strings belongs, or something else that is no string.
        ValueError: no rows, other numbers of rows, or a row without references.
    """
    check_texts(predictions, "predictions")
    _check_list(references, "references", "one list a row")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and references for {len(references)} rows: each "
            "prediction needs a list of its own references"
        )
    for place, row in enumerate(references):
        check_references(row, f"references[{place}]")


def check_references(references: Sequence[str], name: str = "references") -> None:
    """Refuse references of one row that are no list of strings, or none at all.

    Args:
        references: of one row.
        name: what messages call it.

    Raises:
        TypeError: no list of strings.
        ValueError: it is empty.
    """
    check_texts(references, name, 'a row whose right answer is to say nothing has [""]')


def check_texts(
    texts: Sequence[str], name: str, advice: str = "there is nothing to measure"
) -> None:
    """Refuse what is no list of strings, or an empty one.

    Args:
        texts: the list.
        name: what messages call it.
        advice: what to do about an empty one.

    Raises:
        TypeError: no list, or an entry that is no string.
        ValueError: it is empty.
    """
    _check_list(texts, name, "a list of strings")
    if not len(texts):
        raise ValueError(f"{name} is empty: {advice}")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{place}] must be a string; got {_kind(text)}")


def _check_list(value: object, name: str, wanted: str) -> None:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be {wanted}; got {_kind(value)}")


def _kind(value: object) -> str:
    return f"the string {value[:20]!r}" if isinstance(value, str) else type(value).__name__
