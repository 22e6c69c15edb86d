"""PTX text as a list of instructions (PTX ISA, sections 4 and 9: syntax; 9.3: predicates).

Only what Triton prints is read: one entry, one instruction a statement, labels `$L...:`, and
inline assembly in braces of its own, whose register names do not clash with those outside.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.ptx.formats import bits_of

__all__ = ["HANDLERS", "Instruction", "Program", "instruction", "parse"]

DIRECTIVES = (".reg", ".loc", ".file", ".section", ".shared", ".pragma")
HANDLERS: dict[str, Callable[..., None]] = {}
"""what each instruction does, by the first part of its name"""


def instruction(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function as what instructions of these names do."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(frozen=True)
class Instruction:
    """One statement, `@predicate op arguments`."""

    predicate: str | None
    op: str
    parts: tuple[str, ...]
    """of op, between the dots"""
    args: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{self.predicate} " if self.predicate else ""
        return f"{guard}{self.op} {', '.join(self.args)}"

    @property
    def type(self) -> str:
        """The last part: of the operands, mostly."""
        return self.parts[-1]

    @property
    def bits(self) -> int:
        """Width of the type."""
        return bits_of(self.type)

    def unknown(self) -> NotImplementedError:
        """The error for a form that nobody has described here."""
        return NotImplementedError(f"instruction is not emulated: {self}")


@dataclass(frozen=True)
class Program:
    """An entry: names of its parameters, its instructions, and where the labels stand."""

    parameters: tuple[str, ...]
    code: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """Read the text that the compiler printed."""
    text = ptx[ptx.index(".visible .entry") :]
    head, _, body = text.partition("{")
    parameters = re.findall(r"\.param [^,)]*?(\w+_param_\d+)", head)
    body = re.sub(r"//[^\n]*", "", body).replace("{ .reg", ";.reg")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.split(r"[;\n]", body):
        rest = statement.strip()
        while label := re.match(r"(\$\w+):", rest):
            labels[label[1]] = len(code)
            rest = rest[label.end() :].strip()
        if rest and not rest.startswith((*DIRECTIVES, "}")):
            code.append(_statement(rest))
    return Program(tuple(parameters), tuple(code), labels)


def _statement(text: str) -> Instruction:
    found: Any = re.match(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
    if not found:
        raise ValueError(f"not an instruction: {text!r}")
    op = found[2]
    return Instruction(found[1], op, tuple(op.split(".")), _arguments(found[3]))


def _arguments(text: str) -> tuple[str, ...]:
    """Split at commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return tuple(stripped for part in parts if (stripped := part.strip()))
