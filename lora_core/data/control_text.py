"""Text that would be encoded as a control token.

A literal `<|im_end|>` in a message becomes the real end of turn when the rendered conversation is
tokenised: content could then forge turns. One pattern of all control tokens finds such text in
every string of a message, however deep; what to do about it is the caller's choice.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_core.data.tokenizer import Tokenizer


class ControlTextError(ValueError):
    """A message's content holds the text of a control token, which would become that token."""


def control_pattern(tok: Tokenizer, markers: Iterable[str] = ()) -> re.Pattern[str]:
    """A pattern that finds the text of any control token or further marker."""
    return any_of({*tok.control_tokens.values(), *markers})


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of these texts, longest first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def check_control_text(text: str, pattern: re.Pattern[str], key: str) -> None:
    """Refuse text that would be encoded as a control token.

    Raises:
        ControlTextError: names the key and the token.
    """
    found = pattern.search(text)
    if found is not None:
        raise ControlTextError(f"{key} holds the control token {found.group()!r} as text")


def strings_of(message: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every string in a message with the path of keys that leads to it."""
    found = []
    for key, value in message.items():
        if isinstance(value, str):
            found.append((f"{prefix}{key}", value))
        elif isinstance(value, Mapping):
            found += strings_of(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found += strings_of(dict(enumerate(value)), f"{prefix}{key}.")
    return found
