"""Asking a judge, whatever it may do: raise, return nonsense, or be stopped half-way.

A judge is a callable that this library did not write: a model, a served API, a program. What goes
wrong with one row is written down with that row, the run goes on, and the result says how many rows
have no verdict. Verdicts are appended to a file as they come and are looked up there by what was
asked (question, answers, reference, and what the judge is bound to), so a second call asks only
what is missing; a row that failed is asked again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_core.evaluate.row_log import RowLog
from lora_core.evaluate.shown import cut

Value = TypeVar("Value")


class Verdicts(Generic[Value]):
    """The verdicts of a run, asked for once each.

    Args:
        read: what a judge returned -> a verdict; raises ValueError on anything else.
        attempts: how often a judge is asked before a row counts as failed.
        out: JSON Lines file; None: none.

    Raises:
        FileNotFoundError: no folder for `out`.
        ValueError: `out` holds something else, or `attempts` is below 1.
    """

    def __init__(self, read: Callable[[Any], Value], attempts: int, out: str | Path | None) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be 1 or more; got {attempts}")
        self.read, self.attempts, self.log = read, attempts, RowLog(out)
        self.kept: dict[str, tuple[str, list[Any]]] = {}  # key -> file:line, what was said
        for where, row in self.log.kept:
            if not isinstance(row.get("key"), str) or not isinstance(row.get("said"), list):
                raise ValueError(f"{where}: {out} is no file of verdicts: write to another file")
            if row.get("error") is None:
                self.kept[row["key"]] = where, row["said"]

    def ask(
        self, key: str, calls: list[Callable[[], Any]], facts: Mapping[str, Any]
    ) -> tuple[list[Value], str | None]:
        """Verdicts of some calls on one row.

        Args:
            key: names what is asked.
            calls: each asks the judge once.
            facts: what the file says of the row beside its verdicts; "where" names it in errors.

        Returns:
            One verdict a call and None; or those before the call that failed, and why it did.
        """
        if key in self.kept:
            return self._kept(*self.kept[key]), None
        said: list[Value] = []
        error = None
        for call in calls:
            value, error = self._once(call)
            if error is not None or value is None:
                error = f"{facts['where']}: {error}"
                break
            said.append(value)
        self.log.append({"key": key, **facts, "said": said, "error": error})
        return said, error

    def _kept(self, where: str, said: list[Any]) -> list[Value]:
        try:
            return [self.read(value) for value in said]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: not a verdict as it was written: {error}") from None

    def _once(self, call: Callable[[], Any]) -> tuple[Value | None, str | None]:
        """A verdict, or why there is none after all attempts."""
        error = None
        for _ in range(self.attempts):
            try:
                returned = call()
            except (Exception, SystemExit) as fault:  # noqa: BLE001  # a judge may raise anything
                error = f"the judge raised {type(fault).__name__}: {cut(str(fault), 200)}"
                continue
            try:
                return self.read(returned), None
            except ValueError as fault:
                error = f"the judge returned {cut(repr(returned), 80)}: {fault}"
        return None, error


def check_some(count: int, errors: tuple[str, ...]) -> None:
    """Refuse a run in which no row has a verdict.

    Raises:
        ValueError: so it is; with the first error.
    """
    if errors and len(errors) == count:
        raise ValueError(f"the judge failed on all {count} rows; the first: {errors[0]}")


def bound_to(judge: object, bound: Mapping[str, Any] | None) -> dict[str, Any]:
    """What verdicts are bound to: the judge's own `settings`, if it has any, and the caller's."""
    return {**getattr(judge, "settings", {}), **(bound or {})}
