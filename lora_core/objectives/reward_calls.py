"""Calling a function that may do anything, under a time limit."""

import contextlib
import inspect
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any


class TooLateError(BaseException):
    """The time is up; no Exception, so that a function's own `except Exception` lets it pass."""


def can_limit() -> bool:
    """Whether `time_limit` works here: in the main thread of a system with alarms."""
    main = threading.current_thread() is threading.main_thread()
    return main and hasattr(signal, "setitimer")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLateError inside after so many seconds; without alarms nothing happens.

    An alarm that was set outside is set again afterwards, for the time it had left.
    """
    if not can_limit():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TooLateError

    before = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def folder_kept() -> Iterator[None]:
    """The working directory is afterwards as before: a run's files may lie in a relative folder."""
    before = os.getcwd()
    try:
        yield
    finally:
        os.chdir(before)


def arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a function takes of some keywords.

    Raises:
        ValueError: it needs one that is not there.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(given)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in parameters:
        wanted = parameter.default is parameter.empty and parameter.kind is not (
            parameter.VAR_POSITIONAL
        )
        if wanted and (parameter not in named or parameter.name not in given):
            raise ValueError(f"it needs {parameter.name!r}, and the row has {sorted(given)}")
    return {p.name: given[p.name] for p in named if p.name in given}


def call_reward(
    function: Callable[..., Any], given: Mapping[str, Any], timeout: float
) -> tuple[float | None, str | None]:
    """A function's number, or why there is none.

    Args:
        function: called by keyword.
        given: the keywords; those that it takes are passed.
        timeout: seconds that a call may take.

    Returns:
        (number, None), or (None, reason).

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        keywords = arguments(function, given)
    except ValueError as error:
        return None, str(error)
    try:
        with folder_kept(), time_limit(timeout):
            value = function(**keywords)
    except TooLateError:
        return None, f"no reward after {timeout:g} seconds"
    except SystemExit as stop:
        return None, f"it called exit({stop.code!r})"
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the function's
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return read_number(value)


def read_number(value: Any) -> tuple[float | None, str | None]:
    """A reward as a float, or why it is none; bool counts as 0 and 1, a scalar tensor as itself."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        value = item()
    if not isinstance(value, Real):
        return None, f"it returned {value!r:.60}, not a number"
    number = float(value)
    return (number, None) if math.isfinite(number) else (None, f"it returned {number}")
