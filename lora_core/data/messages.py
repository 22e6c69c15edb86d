"""Messages of a conversation, checked one by one; every error says where and which key.

What all formats of conversations come to: a list of {"role", "content"}, with `train` where a
message says whether it is graded. OpenAI's content parts are joined, its `weight` is read as
`train`, ShareGPT's {"from", "value"} is renamed, and a role that nobody knows is refused with the
nearest one that is known: a misspelt "asistant" would otherwise never be graded.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    **{role: role for role in ROLES},
}


def checked_messages(messages: list[Any], place: str) -> list[dict[str, Any]]:
    """A conversation's messages with `role`, `content` and, where said, `train`.

    Args:
        messages: as the file has them, ShareGPT's turns renamed.
        place: what error messages call the list, "data.jsonl:3: messages".

    Raises:
        ValueError: an empty list, or a message that is not one.
    """
    if not messages:
        raise ValueError(f"{place} is an empty list; a conversation needs a message")
    return [checked_message(message, f"{place}[{i}]") for i, message in enumerate(messages)]


def checked_tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """A row's `tools`, a list of JSON schemas; None where there is none."""
    tools = row.get("tools")
    if isinstance(tools, str):  # Arrow-made files store nested data as JSON text
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError(f"{where}: tools is a string that is not JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: tools must be a list; got {type(tools).__name__}")
    return tools or None


def from_sharegpt(turn: Any, place: str) -> Any:
    """{"from", "value"} as {"role", "content"}; what has a role already is left as it is."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = turn["from"]
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise ValueError(f"{place}.from: {_unknown_role(role, _SHAREGPT_ROLES)}")
    rest = {key: turn[key] for key in turn if key not in ("from", "value")}
    return {"role": _SHAREGPT_ROLES[role], "content": turn.get("value"), **rest}


def with_system(row: Mapping[str, Any], messages: list[Any]) -> list[Any]:
    """The messages after a row's `system` text, which some files keep beside the turns."""
    system = row.get("system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def alpaca_user(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The user's message of a row with `instruction` and, optionally, `input`."""
    instruction = typed(row, "instruction", str, where)
    given = "" if row.get("input") is None else typed(row, "input", str, where)
    return {
        "role": "user",
        "content": f"{instruction}\n\n{given}" if given else instruction,
        # kept apart for the alpaca template
        "instruction": instruction,
        "input": given,
    }


def ungraded(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages that are context: what an assistant said in them is not graded."""
    return [
        {**message, "train": False} if message["role"] == "assistant" else dict(message)
        for message in messages
    ]


def checked_message(message: Any, place: str) -> dict[str, Any]:
    """One message with a known role, text for content, and `train` where it was said.

    Raises:
        ValueError: it is not one; the place is named.
    """
    if not isinstance(message, dict):
        raise ValueError(f"{place} must be an object; got {type(message).__name__}")
    if "role" not in message:
        raise ValueError(f"{place} has no 'role'; its keys are {sorted(message)}")
    if message["role"] not in ROLES:
        raise ValueError(f"{place}.role: {_unknown_role(message['role'], ROLES)}")
    checked = dict(message)
    checked["content"] = _content(message, place)
    train = checked.pop("train", None)
    weight = checked.pop("weight", None)  # OpenAI's name for the same switch
    if train is None and weight is not None:
        if weight not in (0, 1):
            raise ValueError(f"{place}.weight must be 0 or 1; got {weight!r}")
        train = bool(weight)
    if train is not None:
        if not isinstance(train, bool):
            raise ValueError(f"{place}.train must be true or false; got {train!r}")
        if train and checked["role"] != "assistant":
            raise ValueError(
                f"{place}.train is true for role {checked['role']!r}; only assistant messages are "
                "graded (train_on='all' grades the whole text)"
            )
        checked["train"] = train
    return checked


def typed(row: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """A row's value, once it is seen to be a string (`str`) or a list (`list`)."""
    value = row[key]
    if not isinstance(value, kind):
        wanted = "a string" if kind is str else "a list"
        raise ValueError(f"{where}: {key} must be {wanted}; got {type(value).__name__}")
    return value


def _content(message: Mapping[str, Any], place: str) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):  # OpenAI's content parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
        raise ValueError(
            f"{place}.content has a part that is not text; only text can be trained on"
        )
    if not isinstance(content, str):
        kind = "missing" if "content" not in message else f"a {type(content).__name__}"
        raise ValueError(f"{place}.content must be a string; it is {kind}")
    return content


def _unknown_role(role: object, known: Mapping[str, str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(role), list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown role {role!r} (known: {', '.join(known)}){hint}"
