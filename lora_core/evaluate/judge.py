r"""Two systems' answers put before a judge: a win rate with its interval, position bias taken out.

A judge is any callable (prompt, first, second) -> "first", "second" or "tie": a person's rule, a
program, a served model, `model_judge` on a model in memory. Judges prefer a place: many models
favour whichever answer stands first. So each pair is asked twice, in both orders, and

    both orders name one system     a win for it
    both say tie                    a tie
    anything else                   inconsistent, counted as a tie (MT-bench's convention)

    win rate = (wins + ties / 2) / pairs,     for the first system; 0.5 where both are alike

The other convention drops what was not decided, wins / (wins + losses): `decided`. It says how the
clear cases fall and hides how many there were, so both are here. The share of inconsistent pairs is
a figure of the judge and not of the systems: near 1 the judge reads places and not answers.

The interval is Wilson's with ties as half successes. A score of 0, ½ or 1 varies no more than one
of 0 or 1 with the same mean, so the interval is wide enough; a bootstrap's would have no width at
all for twenty wins of twenty.

Pairs of equal answers are ties without asking. A row that the judge fails on is left out of the
rate, counted, and named (verdicts.py).

Ref:
    Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv:2306.05685,
    section 3.4 (both orders, two minds count as a tie).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_core.evaluate.estimate import Estimate, mean, proportion
from lora_core.evaluate.questions import Question
from lora_core.evaluate.sides import Asked, as_questions, check_names, check_texts, key_of
from lora_core.evaluate.verdicts import Verdicts, bound_to, check_some

Judge = Callable[..., Any]
Progress = Callable[[Sequence[int]], Iterable[int]]
_VERDICTS = {
    "first": "first", "1": "first", "second": "second", "2": "second", "tie": "tie", "0": "tie",
    "draw": "tie", "equal": "tie",
}  # fmt: skip


@dataclass(frozen=True)
class JudgedPair:
    """One pair of answers before the judge."""

    where: str
    """file:line of the question, or its place in the list"""
    winner: str
    """"a", "b" or "tie"; "" where the judge failed"""
    consistent: bool = True
    """whether both orders gave one verdict"""
    said: tuple[str, ...] = ()
    """the verdict with a first, and the one with b first; none for equal answers"""
    error: str | None = None
    """why there is no verdict"""


@dataclass(frozen=True)
class WinRate:
    """How often a judge prefers one system's answers to another's."""

    names: tuple[str, str]
    """the systems, a and b"""
    pairs: tuple[JudgedPair, ...]
    """in the questions' order, failed ones included"""

    def _count(self, winner: str) -> int:
        return sum(pair.winner == winner for pair in self.pairs)

    @property
    def wins(self) -> int:
        """Pairs that a won in both orders."""
        return self._count("a")

    @property
    def losses(self) -> int:
        """Pairs that b won in both orders."""
        return self._count("b")

    @property
    def ties(self) -> int:
        """Pairs without a winner: ties, inconsistent ones, equal answers."""
        return self._count("tie")

    @property
    def errors(self) -> tuple[str, ...]:
        """One line a pair that has no verdict."""
        return tuple(pair.error for pair in self.pairs if pair.error is not None)

    @property
    def rate(self) -> Estimate:
        """(wins + ties / 2) / pairs with a verdict, for a."""
        count = self.wins + self.losses + self.ties
        return proportion(self.wins + self.ties / 2, count, unit="pairs")

    @property
    def decided(self) -> Estimate | None:
        """wins / (wins + losses); None where nothing was decided."""
        count = self.wins + self.losses
        return proportion(self.wins, count, unit="decided pairs") if count else None

    @property
    def inconsistent(self) -> Estimate | None:
        """Share of pairs whose verdict changed with the order: position bias. None: none asked."""
        asked = [pair for pair in self.pairs if pair.said and pair.error is None]
        turned = sum(not pair.consistent for pair in asked)
        return proportion(turned, len(asked), unit="pairs") if asked else None

    @property
    def first_preferred(self) -> Estimate | None:
        """Share of "first" among verdicts that name a place: 0.5 shows no bias. None: none did."""
        judged = [pair.said for pair in self.pairs if pair.error is None]
        places = [said for both in judged for said in both if said != "tie"]
        return proportion(places.count("first"), len(places), unit="verdicts") if places else None

    def __str__(self) -> str:
        a, b = self.names
        counts = f"{self.wins} won, {self.losses} lost, {self.ties} tied"
        lines = [f"{a} against {b}: win rate {self.rate}; {counts}"]
        if self.decided is not None:
            lines.append(f"of the decided ones: {self.decided}")
        if self.inconsistent is not None:
            lines.append(f"verdict changed with the order: {self.inconsistent}")
        if self.errors:
            lines.append(f"no verdict on {len(self.errors)} pairs; the first: {self.errors[0]}")
        return "\n".join(lines)


def pairwise(
    judge: Judge,
    questions: Sequence[Asked],
    a: Sequence[str],
    b: Sequence[str],
    *,
    references: Sequence[str] | None = None,
    out: str | Path | None = None,
    names: tuple[str, str] = ("a", "b"),
    attempts: int = 1,
    bound: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> WinRate:
    """Let a judge compare two systems' answers, each pair in both orders.

    Args:
        judge: (prompt, first, second) -> "first", "second" or "tie", in any case; or 1, 2, 0.
            "a" and "b" are no verdicts: it is not told which system stands where.
        questions: prompts (text or turns), or `Question`s.
        a: one system's answers, one a question.
        b: the other's.
        references: good answers, one a question; the judge then gets `reference=`.
        out: JSON Lines file that gets each pair as it is judged; what it holds is not asked again.
        names: of the systems, for people.
        attempts: how often the judge is asked before a pair counts as failed.
        bound: what the judge is, JSON values by name: verdicts of another are not reused. A judge's
            own `settings` are added.
        progress: wraps the pairs (a `tqdm`, for one).

    Returns:
        The win rate of `a`, with every pair.

    Raises:
        FileNotFoundError: no folder for `out`.
        TypeError: an answer that is no text.
        ValueError: lists of other lengths, names that are one, `out` of another kind; or the judge
            failed on every pair.
    """
    check_names(names)
    asked = as_questions(questions)
    for texts, name in ((a, names[0]), (b, names[1])):
        check_texts(texts, name, asked)
    if references is not None:
        check_texts(references, "references", asked)
    verdicts: Verdicts[str] = Verdicts(_verdict, attempts, out)
    settings = bound_to(judge, bound)
    pairs: list[JudgedPair] = []
    for i in progress(range(len(asked))) if progress is not None else range(len(asked)):
        more = {} if references is None else {"reference": references[i]}
        pairs.append(_pair(judge, verdicts, asked[i], a[i], b[i], more, settings))
    result = WinRate(names, tuple(pairs))
    check_some(len(pairs), result.errors)
    return result


def _pair(
    judge: Judge,
    verdicts: Verdicts[str],
    question: Question,
    a: str,
    b: str,
    more: dict[str, str],
    settings: dict[str, Any],
) -> JudgedPair:
    if a == b:
        return JudgedPair(question.where, "tie")
    prompt = question.messages
    said, error = verdicts.ask(
        key_of("pair", prompt, a, b, more, settings),
        [partial(judge, prompt, a, b, **more), partial(judge, prompt, b, a, **more)],
        {"id": question.id, "where": question.where, "prompt": prompt, "a": a, "b": b},
    )
    if error is not None:
        return JudgedPair(question.where, "", said=tuple(said), error=error)
    forward = {"first": "a", "second": "b", "tie": "tie"}[said[0]]
    backward = {"first": "b", "second": "a", "tie": "tie"}[said[1]]
    agreed = forward == backward
    return JudgedPair(question.where, forward if agreed else "tie", agreed, tuple(said))


def _verdict(value: Any) -> str:
    """What a judge returned as "first", "second" or "tie".

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, str | int):
        known = _VERDICTS.get(str(value).strip().casefold())
        if known is not None:
            return known
    raise ValueError("a verdict is 'first', 'second' or 'tie' (or 1, 2, 0)")


@dataclass(frozen=True)
class JudgeScores:
    """A judge's marks for one system's answers."""

    scores: tuple[float | None, ...]
    """one an answer, on the judge's scale; None where it failed"""
    scale: tuple[float, float]
    """the least and the best mark"""
    errors: tuple[str, ...]
    """one line an answer without a mark"""

    @property
    def mean(self) -> Estimate:
        """The mean mark, with its interval over answers."""
        return mean([score for score in self.scores if score is not None], unit="answers")

    def __str__(self) -> str:
        text = f"mean mark {self.mean} on a scale from {self.scale[0]:g} to {self.scale[1]:g}"
        if self.errors:
            text += f"\nno mark for {len(self.errors)} answers; the first: {self.errors[0]}"
        return text


def score_judge(
    judge: Judge,
    questions: Sequence[Asked],
    answers: Sequence[str],
    *,
    scale: tuple[float, float] = (0.0, 1.0),
    references: Sequence[str] | None = None,
    out: str | Path | None = None,
    attempts: int = 1,
    bound: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> JudgeScores:
    """Let a judge mark answers one by one; what goes for `pairwise` goes here.

    Args:
        judge: (prompt, answer) -> a number on the scale.
        questions: prompts, or `Question`s.
        answers: one a question.
        scale: least and best mark, (1, 10) for one.
        references: good answers, one a question; the judge then gets `reference=`.
        out: JSON Lines file of the marks.
        attempts: how often the judge is asked before an answer counts as failed.
        bound: what the judge is.
        progress: wraps the answers.

    Returns:
        The marks and their mean.

    Raises:
        FileNotFoundError: no folder for `out`.
        TypeError: an answer that is no text.
        ValueError: lists of other lengths, a scale without width, or the judge failed on every
            answer.
    """
    low, high = scale
    if not low < high:
        raise ValueError(f"a scale goes from its least to its best mark; got {scale}")
    asked = as_questions(questions)
    check_texts(answers, "answers", asked)
    if references is not None:
        check_texts(references, "references", asked)
    verdicts: Verdicts[float] = Verdicts(partial(_mark, low, high), attempts, out)
    settings = {**bound_to(judge, bound), "scale": list(scale)}
    scores: list[float | None] = []
    errors: list[str] = []
    for i in progress(range(len(asked))) if progress is not None else range(len(asked)):
        more = {} if references is None else {"reference": references[i]}
        prompt, answer = asked[i].messages, answers[i]
        said, error = verdicts.ask(
            key_of("score", prompt, answer, more, settings),
            [partial(judge, prompt, answer, **more)],
            {"id": asked[i].id, "where": asked[i].where, "prompt": prompt, "answer": answer},
        )
        scores.append(said[0] if error is None else None)
        errors += [error] if error is not None else []
    check_some(len(scores), tuple(errors))
    return JudgeScores(tuple(scores), (low, high), tuple(errors))


def _mark(low: float, high: float, value: Any) -> float:
    """What a judge returned as a number on its scale."""
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not low <= value <= high:  # NaN is not between them either
        raise ValueError(f"a mark is a number from {low:g} to {high:g}")
    return float(value)
