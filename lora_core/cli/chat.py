"""`lora-core generate --chat`: a conversation on the terminal, under one adapter or another.

Each turn renders the whole conversation with the model's own template and generates from there; the
`Session` keeps the keys and values of what is the same as before, so that a turn costs its own
tokens. Another adapter computes other keys and values: switching clears the session, and the next
turn runs the conversation once under the new adapter, with the template it was trained in.

Ctrl-C ends the answer and keeps what came; Ctrl-D and /quit end the chat. What fails within a turn
(a template that has no place for a system turn) is one line, and the turn is taken back.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from lora_core.adapters import set_adapters
from lora_core.checkpoint import load_adapter
from lora_core.data import load_template, load_tokenizer
from lora_core.models import Session, generate
from lora_core.runs.opening import TEMPLATE_FILE, Opened
from lora_core.targets import nearest

BASE = "none"
COMMANDS = {
    "/adapter": "/adapter NAME: answer under this adapter; none: the base; alone: which there are",
    "/system": "/system TEXT: another system turn; alone: none",
    "/reset": "/reset: forget the conversation, the system turn excepted",
    "/help": "/help: this",
    "/quit": "/quit: end (Ctrl-D too); Ctrl-C ends an answer",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the model can answer under."""

    adapters: tuple[str, ...]
    """names inside the model; none for the base"""
    template: str | None
    """the chat template that goes with them"""


def named(text: str) -> tuple[str, Path]:
    """Read `[NAME=]DIR`; without a name it is the folder's own.

    Raises:
        ValueError: the name is empty, or that of the base.
    """
    name, sign, folder = text.partition("=")
    # a folder's name may hold the sign itself
    if not sign or os.path.isdir(text):
        name, folder = Path(text).resolve().name, text
    if not name or not folder:
        raise ValueError(f"--adapter takes [NAME=]DIR; got {text!r}")
    if name == BASE:
        raise ValueError(f"{BASE!r} is the base's name in a chat: give --adapter NAME={folder}")
    return name, Path(folder)


def open_choices(opened: Opened, adapters: Sequence[tuple[str, Path]]) -> dict[str, Choice]:
    """Load the further adapters of a chat; the first is in the model, and is active afterwards.

    Args:
        opened: the model with the first adapter.
        adapters: name and folder of each.

    Returns:
        By name, the base among them.

    Raises:
        ValueError: two of a name, or an adapter with tokens of its own beside others.
    """
    plain = load_tokenizer(opened.source).chat_template
    choices = {BASE: Choice((), opened.tok.chat_template if not adapters else plain)}
    for index, (name, folder) in enumerate(adapters):
        if name in choices:
            raise ValueError(f"two adapters are called {name!r}: give one as NAME={folder}")
        inside = f"chat{index}" if index else "default"
        if index:
            _refuse_other_tokens(opened, folder)
            load_adapter(opened.model, folder, inside)
        file = folder / TEMPLATE_FILE
        choices[name] = Choice((inside,), load_template(file) if file.is_file() else plain)
    if len(adapters) > 1:
        set_adapters(opened.model, "default")
    opened.model.eval()
    return choices


def _refuse_other_tokens(opened: Opened, folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        return
    size = load_tokenizer(folder).vocab_size
    if size != opened.tok.vocab_size:
        raise ValueError(
            f"{folder} has a tokenizer of its own, of {size} tokens, not {opened.tok.vocab_size}: "
            "chat with it alone"
        )


class Chat:
    """A conversation, and what it is answered with.

    Args:
        opened: model and tokenizer.
        choices: what can be switched between, as of `open_choices`.
        options: further arguments of `generate`.
        system: the system turn; None: none.

    Attributes:
        messages: the turns so far, without the system turn.
        session: keys and values of the turns so far.
    """

    def __init__(
        self,
        opened: Opened,
        choices: dict[str, Choice],
        options: dict[str, Any],
        system: str | None = None,
    ) -> None:
        self.model, self.tok, self.choices = opened.model, opened.tok, choices
        self.options, self.system = options, system
        self.messages: list[dict[str, str]] = []
        self.session = Session()
        names = list(choices)
        self.name = names[1] if len(names) > 1 else BASE
        self.turns = 0
        self.told_length = False

    def run(self, lines: TextIO, out: TextIO) -> int:
        """Take turns until the input ends.

        Args:
            lines: what the user writes, a turn or a command a line.
            out: where answers go.

        Returns:
            The exit code, 0.
        """
        asks = lines.isatty() and out.isatty()
        if asks:
            self._tell(out, "\n".join(COMMANDS.values()))
        while True:
            try:
                line = _line(lines, asks)
            except KeyboardInterrupt:
                self._tell(out, "\n/quit or Ctrl-D ends the chat")
                continue
            if line is None:
                return 0
            if line.strip() == "/quit":
                return 0
            if line.strip():
                self._take(line.strip(), out)

    def answer(self, text: str, on_text: Callable[[str], object]) -> str:
        """Answer a user's turn.

        Args:
            text: the turn.
            on_text: called with each piece of the answer.

        Returns:
            The answer; as far as it came, if it was interrupted.

        Raises:
            ValueError: the conversation cannot be rendered; the turn is taken back.
        """
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        self.messages.append({"role": "user", "content": text})
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        options = dict(self.options)
        if options.get("seed") is not None:
            options["seed"] += self.turns  # or every turn would draw the same numbers
        try:
            generate(
                self.model,
                self.tok,
                [*system, *self.messages],
                on_text=keep,
                session=self.session,
                **options,
            )
        except KeyboardInterrupt:
            pass
        except BaseException:
            self.messages.pop()
            raise
        self.turns += 1
        said = "".join(pieces)
        if said:
            self.messages.append({"role": "assistant", "content": said})
        else:  # interrupted before a word, or nothing to say: no turn to go on from
            self.messages.pop()
        return said

    def switch(self, name: str) -> None:
        """Answer under another adapter from here on.

        Raises:
            ValueError: no such adapter.
        """
        if name not in self.choices:
            raise ValueError(f"no adapter {name!r}; {nearest(name, list(self.choices))}")
        choice = self.choices[name]
        set_adapters(self.model, choice.adapters)
        self.tok.chat_template = choice.template
        self.session.clear()
        self.name = name

    def _take(self, line: str, out: TextIO) -> None:
        """One line of the user's: a command, or a turn."""

        def write(piece: str) -> None:
            out.write(piece)
            out.flush()

        try:
            if line.startswith("/"):
                self._command(line, out)
                return
            self.answer(line, write)
            write("\n")
            self._warn_of_length()
        except (ValueError, TypeError) as error:
            print(f"lora-core generate: {' '.join(str(error).split())}", file=sys.stderr)

    def _command(self, line: str, out: TextIO) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word not in COMMANDS:
            raise ValueError(f"no command {word!r}; one of {', '.join(COMMANDS)}")
        if word == "/help":
            self._tell(out, "\n".join(COMMANDS.values()))
        elif word == "/reset":
            self.messages.clear()
            self.session.clear()
            self._tell(out, "(forgotten)")
        elif word == "/system":
            self.system = rest or None
            self._tell(out, "(system turn set)" if rest else "(no system turn)")
        elif rest:
            self.switch(rest)
            self._tell(out, f"(adapter {rest})")
        else:
            names = (f"[{name}]" if name == self.name else name for name in self.choices)
            self._tell(out, f"(adapters: {', '.join(names)})")

    def _tell(self, out: TextIO, text: str) -> None:
        print(text, file=out, flush=True)

    def _warn_of_length(self) -> None:
        """Say once that the conversation is longer than what the model was made for."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        held = len(self.session.ids)
        if limit is not None and held > limit and not self.told_length:
            self.told_length = True
            print(
                f"note: the conversation has {held} tokens, the model was made for {limit}: "
                "/reset begins anew",
                file=sys.stderr,
            )


def _line(lines: TextIO, asks: bool) -> str | None:
    """The next line; None at the end of the input."""
    if asks and lines is sys.stdin:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() edits lines once it is there
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    return lines.readline() or None
