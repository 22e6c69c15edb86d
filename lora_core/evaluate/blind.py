r"""Two systems compared by a person at the terminal who does not know which is which.

Whoever has trained a model wants it to win. So the answers stand under 1 and 2, which of them is
whose is drawn for each question by the seed, and no name is shown before the tally. A vote is one
key and Enter; it is on disk before the next question is shown, so that q, Ctrl-C, a closed
terminal or a killed process lose nothing, and the next call goes on where this one ended.

The file of the votes is preference data, `chosen/rejected` rows as DPO takes them:

    {"id", "prompt": "…", "chosen": "…", "rejected": "…", "chosen_from": "tuned", …}
    {"id", "chosen": [turns … answer], "rejected": [turns … answer], "chosen_from": …}
    {"id", "tie": true, "asked": …, "answers": {"tuned": "…", "base": "…"}}

A tie prefers nothing, so its row has neither `chosen` nor `rejected`, nor any key of another
training format; `preference_rows` gives the pairs alone. A question that is skipped is asked again
next time. Equal answers cannot be told apart: they are not asked, and counted.

The tally is the share of decided votes with Wilson's interval, and the sign test: how probable it
is that a fair coin falls as one-sidedly as these votes (two-sided, ties left out).

Ref:
    Dixon and Mood 1946, "The statistical sign test", Journal of the American Statistical
    Association 41.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

from lora_core.data.lines import read_rows
from lora_core.evaluate.estimate import Estimate, proportion
from lora_core.evaluate.questions import Prompt, Question
from lora_core.evaluate.row_log import Row, RowLog
from lora_core.evaluate.shown import harmless, say
from lora_core.evaluate.sides import Asked, as_questions, check_names, check_texts, spoken

KEYS = {
    "1": "1", "2": "2", "t": "tie", "tie": "tie", "s": "skip", "skip": "skip",
    "q": "quit", "quit": "quit",
}  # fmt: skip
"""what may be typed -> what it means"""
_ASK = "better: 1, 2, t(ie), s(kip) or q(uit)? "
_RULE = 72


def sign_test(wins: int, losses: int) -> float:
    r"""Two-sided p value of the sign test.

    min(1, 2 · Σ_{k ≤ min(wins, losses)} C(n, k) / 2ⁿ), n = wins + losses; in whole numbers, exact
    for any n.

    Args:
        wins: decided votes for one side.
        losses: for the other.

    Returns:
        The probability of votes at least as one-sided if both were alike; 1 without votes.

    Raises:
        ValueError: a count below 0.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"votes are counted from 0; got {wins} and {losses}")
    n = wins + losses
    term = tail = 1
    for k in range(min(wins, losses)):
        term = term * (n - k) // (k + 1)  # C(n, k + 1)
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


@dataclass(frozen=True)
class BlindResult:
    """The tally of a blind comparison."""

    names: tuple[str, str]
    """the systems, a and b"""
    wins: int
    """votes for a"""
    losses: int
    """votes for b"""
    ties: int
    """votes for neither"""
    identical: int
    """questions with equal answers: never asked"""
    left: int
    """questions without a vote: skipped, or not come to"""

    @property
    def share(self) -> Estimate | None:
        """wins / (wins + losses), with Wilson's interval; None before the first decided vote."""
        count = self.wins + self.losses
        return proportion(self.wins, count, unit="votes") if count else None

    @property
    def p_value(self) -> float:
        """Of the sign test: how easily chance alone gives such votes."""
        return sign_test(self.wins, self.losses)

    def __str__(self) -> str:
        a, b = self.names
        counts = f"{a} {self.wins} : {self.losses} {b}, {self.ties} ties"
        rest = f"{self.identical} with equal answers, {self.left} without a vote"
        if self.share is None:
            return f"{counts}; {rest}; nothing is decided yet"
        return (
            f"{counts}; {rest}\n{a} preferred in {self.share} of the decided ones; "
            f"sign test p = {self.p_value:.3g}"
        )


class BlindTest:
    """Questions, two answers to each, and the votes so far.

    Args:
        questions: prompts (text or turns), or `Question`s; their ids name the votes.
        a: one system's answers, one a question.
        b: the other's.
        seed: of the draw that says which answer stands first.
        out: file of the votes; one that is there is continued.
        names: of the systems. They reach the file and the tally only.

    Raises:
        FileNotFoundError: no folder for `out`.
        TypeError: an answer that is no text.
        ValueError: lists of other lengths, names that are one, or votes in `out` on other answers.
    """

    def __init__(
        self,
        questions: Sequence[Asked],
        a: Sequence[str],
        b: Sequence[str],
        seed: int,
        out: str | Path,
        *,
        names: tuple[str, str] = ("a", "b"),
    ) -> None:
        check_names(names)
        self.questions = as_questions(questions)
        for texts, name in ((a, names[0]), (b, names[1])):
            check_texts(texts, name, self.questions)
        self.answers = list(zip(a, b, strict=True))
        self.seed, self.names, self.log = seed, names, RowLog(out)
        self.votes: dict[str, str] = {}  # question id -> the name voted for, or ""
        places = {question.id: i for i, question in enumerate(self.questions)}
        for where, row in self.log.kept:
            place = places.get(str(row.get("id")))
            winner = None if place is None else self._voted(row, place)
            if winner is None:
                raise ValueError(
                    f"{where}: a vote on another question, or on other answers or names than "
                    "these: write to another file"
                )
            self.votes[str(row["id"])] = winner

    def run(self, keys: TextIO | None = None, screen: TextIO | None = None) -> BlindResult:
        """Show what has no vote yet, and take votes until all are in, or q, or the input ends.

        Args:
            keys: read line by line; None: standard input.
            screen: written to; None: standard output.

        Returns:
            The tally, earlier sittings included.

        Raises:
            KeyboardInterrupt: Ctrl-C; every vote before it is in the file.
        """
        keys, screen = keys or sys.stdin, screen or sys.stdout
        open_ones = [i for i in range(len(self.questions)) if self._is_open(i)]
        for number, i in enumerate(open_ones, start=1):
            first, second = self._sides(i)
            say(screen, self._page(i, f"{number} of {len(open_ones)}", first, second))
            key = _key(keys, screen)
            if key == "quit":
                break
            if key != "skip":
                self._vote(i, {"1": first, "2": second}.get(key))
        result = self.result()
        say(screen, f"\n{harmless(str(result))}\nvotes are in {harmless(str(self.log.path))}")
        return result

    def result(self) -> BlindResult:
        """The tally so far."""
        voted = list(self.votes.values())
        wins, losses = (voted.count(name) for name in self.names)
        identical = sum(a == b for a, b in self.answers)
        left = sum(self._is_open(i) for i in range(len(self.questions)))
        return BlindResult(self.names, wins, losses, voted.count(""), identical, left)

    def _is_open(self, i: int) -> bool:
        return self.questions[i].id not in self.votes and self.answers[i][0] != self.answers[i][1]

    def _sides(self, i: int) -> tuple[int, int]:
        """Which system stands first, 0 or 1, and which second; the same whenever it is asked."""
        drawn = hashlib.sha256(f"{self.seed}:{self.questions[i].id}".encode()).digest()[0]
        return (0, 1) if drawn < 128 else (1, 0)

    def _page(self, i: int, number: str, first: int, second: int) -> str:
        def titled(title: str, text: str) -> str:
            return f"{f'── {title} ':─<{_RULE}}\n{harmless(text) or '(nothing)'}"

        return "\n".join(
            [
                titled(f"question {number}", spoken(self.questions[i].messages)),
                titled("1", self.answers[i][first]),
                titled("2", self.answers[i][second]),
                "─" * _RULE,
            ]
        )

    def _vote(self, i: int, winner: int | None) -> None:
        """Write a vote: for system 0 or 1, or for neither."""
        self.log.append(self._row(i, winner))
        self.votes[self.questions[i].id] = "" if winner is None else self.names[winner]

    def _row(self, i: int, winner: int | None) -> Row:
        question = self.questions[i]
        if winner is None:
            answers = dict(zip(self.names, self.answers[i], strict=True))
            asked = question.messages
            return {"id": question.id, "tie": True, "asked": asked, "answers": answers}
        chosen, rejected = self.answers[i][winner], self.answers[i][1 - winner]
        return {
            "id": question.id,
            **_preference(question, chosen, rejected),
            "chosen_from": self.names[winner],
            "rejected_from": self.names[1 - winner],
        }

    def _voted(self, row: Row, i: int) -> str | None:
        """The name that a row of the file votes for, "" for a tie; None: it is no vote on this."""
        for winner in (None, 0, 1):
            if row == _as_read(self._row(i, winner)):
                return "" if winner is None else self.names[winner]
        return None


def _preference(question: Question, chosen: str, rejected: str) -> Row:
    """A vote in the contract's `chosen/rejected` form: with the prompt, or as message lists."""
    prompt: Prompt = question.messages
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    said = [
        [*map(dict, prompt), {"role": "assistant", "content": text}] for text in (chosen, rejected)
    ]
    return {"chosen": said[0], "rejected": said[1]}


def _as_read(row: Row) -> Any:
    """A row as it comes back from its file: turns in lists."""
    import json

    return json.loads(json.dumps(row))


def _key(keys: TextIO, screen: TextIO) -> str:
    """The next answer that means something; "quit" where the input ends."""
    while True:
        screen.write(_ASK)
        screen.flush()
        try:
            line = keys.readline()
        except KeyboardInterrupt:
            say(screen, "\nstopped: every vote so far is in the file")
            raise
        except UnicodeDecodeError:
            line = "?\n"
        if not line:
            return "quit"
        if known := KEYS.get(line.strip().casefold()):
            return known
        say(screen, f"{harmless(line.strip())!r:.40} is none of 1, 2, t, s, q")


def preference_rows(path: str | Path) -> list[Row]:
    """The pairs of a file of votes, ties left out.

    Args:
        path: what a `BlindTest` wrote.

    Returns:
        Its `chosen/rejected` rows, in their order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: file:line of a row that is neither a pair nor a tie.
    """
    found = []
    for where, row in read_rows(path):
        if {"chosen", "rejected"} <= row.keys():
            found.append(row)
        elif row.get("tie") is not True:
            raise ValueError(f"{where}: neither a pair nor a tie; keys are {sorted(row)}")
    return found
