r"""What a golden row asks of an answer: one function a check, made when the file is read.

    expect     the text itself (or one of a list), but for white space at both ends
    contains   a substring, or all of a list           excludes   a substring, or none of a list
    pattern    a regular expression, found anywhere (`^…$` binds it; a list: all)
    score      {"metric", "reference", "floor"}: a text metric that may not fall below its floor
    schema     a JSON schema: the answer is JSON, all of it, and validates
    refusal    true, false, or a list: a refusal by these openings or the known ones (refusals.py)

Everything about a check that can be wrong is found when the file is read, with its file:line: a
golden set that fails in the middle of a run would cost the run. Each check says why it failed in a
line that shows the place, since "failed" alone sends the reader to the answers.

Scores lie in [0, 1] whatever the metric's own scale; BLEU's 0 … 100 is divided by 100. A floor of 0
never fails: the score is then only watched.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_core.evaluate.golden_schema import schema_test
from lora_core.evaluate.refusals import refuses
from lora_core.evaluate.shown import difference, quoted

Test = Callable[[str], "tuple[str | None, float | None]"]
"""an answer -> why it fails (None: it passes), and its score where there is one"""


@dataclass(frozen=True)
class Finding:
    """What one check found in one answer."""

    check: str
    """its name: expect, contains, score:rouge_l …"""
    passed: bool
    """whether the answer meets it"""
    why: str
    """what is wrong; "" where it passed"""
    score: float | None = None
    """of a `score` check, in [0, 1]"""
    floor: float | None = None
    """the least score that passes"""


@dataclass(frozen=True)
class Check:
    """One thing that is asked of an answer."""

    name: str
    """what results call it"""
    test: Test
    """the question itself"""
    floor: float | None = None
    """of a `score` check"""

    def __call__(self, answer: str) -> Finding:
        """Put the check to an answer."""
        why, score = self.test(answer)
        return Finding(self.name, why is None, why or "", score, self.floor)


def parse_checks(row: Mapping[str, Any], where: str, phrases: Sequence[str] = ()) -> list[Check]:
    """The checks of a golden row.

    Args:
        row: the JSON object.
        where: its file:line, which error messages start with.
        phrases: openings that count as a refusal beside the known ones.

    Returns:
        One or more.

    Raises:
        ValueError: no check, or one that can not be what its author meant.
        ImportError: a schema, and the `jsonschema` package is missing.
    """
    found: list[Check] = []
    for key in CHECKS:
        if key in row:
            if key == "score":
                found += _scores(row[key], where)
            elif key == "refusal":
                found.append(_refusal(row[key], where, phrases))
            else:
                found.append(Check(key, _MAKERS[key](row[key], f"{where}: {key}")))
    if not found:
        raise ValueError(f"{where}: nothing is checked; give one of {', '.join(CHECKS)}")
    return found


def expects_nothing(row: Mapping[str, Any]) -> bool:
    """Whether the empty answer is one that a row accepts by name."""
    accepted = row.get("expect")
    listed = [accepted] if isinstance(accepted, str) else accepted or []
    return any(not text.strip() for text in listed)


# --- one maker a check: value of the row -> test ---


def _expect(value: Any, where: str) -> Test:
    accepted = [text.strip() for text in texts(value, where, empty=True)]

    def test(answer: str) -> tuple[str | None, None]:
        said = answer.strip()
        if said in accepted:
            return None, None
        if len(accepted) > 1:
            return f"is none of the {len(accepted)} accepted texts", None
        return difference(accepted[0], said), None

    return test


def _contains(value: Any, where: str) -> Test:
    needed = texts(value, where)

    def test(answer: str) -> tuple[str | None, None]:
        missing = [quoted(text) for text in needed if text not in answer]
        return (f"lacks {', '.join(missing)}" if missing else None), None

    return test


def _excludes(value: Any, where: str) -> Test:
    banned = texts(value, where)

    def test(answer: str) -> tuple[str | None, None]:
        there = [quoted(text) for text in banned if text in answer]
        return (f"has {', '.join(there)}" if there else None), None

    return test


def _pattern(value: Any, where: str) -> Test:
    patterns = [_compiled(text, where) for text in texts(value, where)]

    def test(answer: str) -> tuple[str | None, None]:
        missing = [quoted(p.pattern) for p in patterns if p.search(answer) is None]
        return (f"no match of {', '.join(missing)}" if missing else None), None

    return test


def _compiled(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where} {text!r} is no regular expression: {error}") from None


def _schema(value: Any, where: str) -> Test:
    wrong = schema_test(value, where)
    return lambda answer: (wrong(answer), None)


_MAKERS: dict[str, Callable[[Any, str], Test]] = {
    "expect": _expect,
    "contains": _contains,
    "excludes": _excludes,
    "pattern": _pattern,
    "schema": _schema,
}
CHECKS = ("expect", "contains", "excludes", "pattern", "score", "schema", "refusal")
"""the keys of a row that check something"""


def _refusal(value: Any, where: str, phrases: Sequence[str]) -> Check:
    if isinstance(value, bool):
        wanted, own = value, tuple(phrases)
    elif isinstance(value, list):
        wanted, own = True, (*phrases, *texts(value, f"{where}: refusal"))
    else:
        raise ValueError(
            f"{where}: refusal must be true, false or a list of openings; got {value!r:.80}"
        )

    def test(answer: str) -> tuple[str | None, None]:
        if refuses(answer, own) == wanted:
            return None, None
        told = "opens like no known refusal" if wanted else "refuses"
        return f"{told}: {quoted(answer)}", None

    return Check("refusal", test)


# --- scores ---

Score = Callable[[str, Sequence[str]], float]


def _rouge(kind: str) -> Score:
    def score(answer: str, references: Sequence[str]) -> float:
        from lora_core.evaluate.rouge import rouge_row

        return rouge_row(answer, references, (kind,))[kind].f1

    return score


def _f1(answer: str, references: Sequence[str]) -> float:
    from lora_core.evaluate.squad import f1

    return f1(answer, references)


def _exact(answer: str, references: Sequence[str]) -> float:
    from lora_core.evaluate.squad import exact

    return float(exact(answer, references))


def _bleu(answer: str, references: Sequence[str]) -> float:
    from lora_core.evaluate.bleu import sentence_bleu

    return sentence_bleu(answer, references) / 100


METRICS: dict[str, Score] = {
    "exact": _exact,
    "f1": _f1,
    "bleu": _bleu,
    "rouge_1": _rouge("rouge1"),
    "rouge_2": _rouge("rouge2"),
    "rouge_l": _rouge("rougeL"),
}
"""what a floor can be set on: name -> score in [0, 1] of an answer and its references"""
_SPELLINGS = {name.replace("_", ""): name for name in METRICS}


def _scores(value: Any, where: str) -> list[Check]:
    """The `score` check of a row, or several."""
    several = value if isinstance(value, list) else [value]
    checks = [_score(one, f"{where}: score") for one in several]
    names = [check.name for check in checks]
    if not checks or len({*names}) < len(names):
        raise ValueError(f"{where}: score needs each metric once; got {names}")
    return checks


def _score(value: Any, where: str) -> Check:
    if not isinstance(value, Mapping) or {*value} != {"metric", "reference", "floor"}:
        got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"{where} must have metric, reference and floor; got {got}")
    name = _SPELLINGS.get(str(value["metric"]).lower().replace("_", ""))
    if name is None:
        known = ", ".join(METRICS)
        raise ValueError(f"{where}.metric {value['metric']!r} is not known; one of {known}")
    floor = value["floor"]
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
        raise ValueError(f"{where}.floor must be a number from 0 to 1; got {floor!r}")
    references = texts(value["reference"], f"{where}.reference")
    measure = METRICS[name]

    def test(answer: str) -> tuple[str | None, float]:
        score = measure(answer, references)
        return (f"{score:.4g} is below {floor:.4g}" if score < floor else None), score

    return Check(f"score:{name}", test, float(floor))


# --- shared ---


def texts(value: Any, where: str, *, empty: bool = False) -> list[str]:
    """A string, or a list of them, as a list.

    Raises:
        ValueError: it is neither, holds nothing, or holds "" where that says nothing.
    """
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        shown = json.dumps(value, ensure_ascii=False, default=repr)
        raise ValueError(f"{where} must be a string or a list of strings; got {shown:.80}")
    if not items or (not empty and "" in items):
        raise ValueError(f"{where} must not be empty: every answer would pass it")
    return items
