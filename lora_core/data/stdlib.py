"""Text and a small chat data set from what every Python installation carries: its standard library.

Two things are made here. `read_corpus` gives the text the shipped base model is pretrained on: the
source files (their documentation strings and comments in them), the language reference inside
`pydoc_data`, and the documentation strings once more as ChatML conversations, so that the turn
marks are no strangers to the model. `function_conversations` gives the quickstart's data: what
`help()` prints about a function, to be answered by a JSON object; `write_function_task` splits them
and writes both parts, as a user's own data would lie there.

Files are read and parsed, never imported: importing `antigravity` opens a browser and `this`
prints a poem. Left out are test suites, tables that a program wrote (codec maps, build variables)
and everything installed by the user. Which modules are held out depends on a hash of the module's
name alone, so it is the same for every Python version. The text itself differs between versions;
`Corpus.sha256` tells corpora apart.
"""

import ast
import json
import random
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from lora_core.data.corpus import TURN_END, TURN_START, Corpus, is_held_out

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
)
# written by programs: codec tables, the build's variables, the parser's and the entities' tables
_GENERATED = re.compile(
    r"_sysconfigdata\w*|encodings\.(?!aliases|idna|punycode|utf_8)\w+|.*\.entities"
)
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held-out.jsonl"
_INSTRUCTION = "Give the module, the name and the summary of this function as JSON."


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class FunctionRow(TypedDict):
    """One question about a function, its answer, and the truth that the answer is judged by."""

    messages: list[Message]
    module: str
    name: str


@dataclass(frozen=True)
class Module:
    """One module of the library: its dotted name and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Function:
    """A documented function or method: where it is, how it is called and what it says."""

    module: str
    name: str
    signature: str
    doc: str

    @property
    def last_name(self) -> str:
        """The name without its class."""
        return self.name.rpartition(".")[2]

    @property
    def is_public(self) -> bool:
        """Whether the name is meant for others."""
        return not self.last_name.startswith("_")

    @property
    def paragraph(self) -> str:
        """The first paragraph of the documentation string, on one line."""
        return " ".join(self.doc.split("\n\n")[0].split())

    @property
    def summary(self) -> str:
        """The first sentence of the documentation string, on one line."""
        return re.split(r"(?<=[a-z0-9)`'\"][.!?])\s", self.paragraph, maxsplit=1)[0]


def library_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_modules(
    root: str | Path | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> list[Module]:
    """Read the library's modules, sorted by name.

    Args:
        root: folder of the library; None takes the running interpreter's.
        wanted: whether to read the module of a name; the others' files are not opened.

    Returns:
        The modules that are text by people, with `\\n` line ends.

    Raises:
        FileNotFoundError: the folder holds no Python file, or none that is wanted.
    """
    folder = library_root() if root is None else Path(root)
    modules = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if _SKIPPED_FOLDERS & set(parts) or any(part.startswith("config-") for part in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        if not _GENERATED.fullmatch(name) and wanted(name):
            text = _read(path)
            if text.strip():
                modules.append(Module(name, text))
    if not modules:
        raise FileNotFoundError(f"{folder} holds no Python file; give the folder of a library")
    return sorted(modules, key=lambda module: module.name)


def _read(path: Path) -> str:
    """A source file's text, "" where it cannot be decoded; of pydoc's topics the prose itself."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
    if path.parts[-2:] != ("pydoc_data", "topics.py"):
        return text
    tables = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    topics = [item for table in tables for item in ast.literal_eval(table).values()]
    return "\n\n".join(topics)


def read_corpus(root: str | Path | None = None, percent: float = 5.0) -> Corpus:
    """Read the text to pretrain on, and the modules held out.

    Args:
        root: folder of the library; None takes the running interpreter's.
        percent: share of the modules to hold out, by a hash of the name.

    Returns:
        One document per module; public functions of the training modules follow as ChatML
        conversations, one document each. Held-out modules give plain text only.
    """
    modules = read_modules(root)
    kept = [module for module in modules if not is_held_out(module.name, percent)]
    held_out = [module for module in modules if is_held_out(module.name, percent)]
    texts = [module.text for module in kept]
    texts += [_conversation(f) for m in kept for f in functions(m) if f.is_public]
    return Corpus(texts, [m.text for m in held_out], [m.name for m in held_out])


def _conversation(function: Function) -> str:
    """A pretraining document: a call, answered by its signature and first paragraph. No JSON."""
    call = f"{function.last_name}{function.signature}"
    question = f"What does `{call}` do in the module `{function.module}`?"
    answer = f"{call}\n\n{function.doc.split(chr(10) * 2)[0]}"
    return _turn("user", question) + _turn("assistant", answer)


def _turn(role: str, content: str) -> str:
    """One turn as the built-in ChatML template writes it."""
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"


def functions(module: Module) -> Iterator[Function]:
    """Yield the documented functions of a module and the documented methods of its classes."""
    try:
        tree = ast.parse(module.text)
    except SyntaxError:  # pydoc's topics are prose
        return
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for item in inner:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(item)
                if doc:
                    signature = f"({ast.unparse(item.args)})"
                    yield Function(module.name, prefix + item.name, signature, doc)


def function_conversations(
    seed: int = 0,
    root: str | Path | None = None,
    max_summary: int = 60,
) -> list[FunctionRow]:
    """Make the quickstart's data: `help()` of a function in, a JSON object about it out.

    Args:
        seed: order of the rows.
        root: folder of the library; None takes the running interpreter's.
        max_summary: longest first sentence to keep, in characters.

    Returns:
        Shuffled rows with `messages` (user, assistant), `module` and `name`; one row a function,
        and functions that share name and first sentence (ntpath's and posixpath's) only once, so
        that any split by rows is a split by functions.
    """
    rows, seen = [], set()
    for module in read_modules(root):
        for function in functions(module):
            key = (function.name, function.summary)
            if key in seen or not _is_plain(function, max_summary):
                continue
            seen.add(key)
            rows.append(_row(function))
    random.Random(seed).shuffle(rows)
    return rows


def _is_plain(function: Function, max_summary: int) -> bool:
    """Whether a function makes a short and fair question: public, with one plain sentence.

    A sentence ends in a full stop, and nothing in it has to be escaped in JSON.
    """
    return (
        function.is_public
        and re.fullmatch(r"[A-Za-z][ -!#-[\]-~]*\.", function.summary) is not None
        and 12 <= len(function.summary) <= max_summary
        and len(function.signature) <= 80
        and len(function.paragraph) <= 3 * max_summary
    )


def help_text(function: Function) -> str:
    """Much what `help()` prints: header, signature, first paragraph of the documentation.

    The names stand in backquotes and the paragraph is one line, so that a byte-level tokenizer cuts
    them as it cuts them in the answer: the task is then to find and copy, not to respell.
    """
    kind = "method" if "." in function.name else "function"
    head = f"Help on {kind} `{function.name}` in module `{function.module}`:"
    return f"{head}\n\n{function.last_name}{function.signature}\n\n{function.paragraph}"


def _row(function: Function) -> FunctionRow:
    answer = {"module": function.module, "name": function.name, "summary": function.summary}
    question = f"{_INSTRUCTION}\n\n{help_text(function)}"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": json.dumps(answer)},
        ],
        "module": function.module,
        "name": function.name,
    }


def write_rows(path: Path, rows: Sequence[FunctionRow]) -> None:
    """Write rows as JSONL, as a user's own data would be."""
    lines = [json.dumps({"messages": row["messages"]}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_function_task(
    folder: Path, held_out: int, seed: int = 0
) -> tuple[list[FunctionRow], list[FunctionRow]]:
    """Make the quickstart's data, split it by function and write both parts.

    Args:
        folder: gets `TRAIN_FILE` and `HELD_OUT_FILE`; it is made.
        held_out: how many functions to hold out.
        seed: order of the rows, and so the split.

    Returns:
        (rows to train on, rows held out).

    Raises:
        ValueError: fewer than twice as many functions as are to be held out.
    """
    rows = function_conversations(seed)
    if len(rows) <= 2 * held_out:
        raise ValueError(f"{len(rows)} functions are too few to hold out {held_out} of them")
    kept, held = rows[held_out:], rows[:held_out]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / TRAIN_FILE, kept)
    write_rows(folder / HELD_OUT_FILE, held)
    return kept, held
