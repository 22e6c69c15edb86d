"""The standard library as text: what is read, what is held out, and the quickstart's questions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_core.data import builtin_template
from lora_core.data.chat import render_chat
from lora_core.data.corpus import is_held_out
from lora_core.data.stdlib import (
    Function,
    Module,
    function_conversations,
    functions,
    help_text,
    read_corpus,
    read_modules,
)

SOURCE = '''"""About shapes."""


def area(width, height=1):
    """Return the area.  It is a product
    of two numbers.

    Further words.
    """
    return width * height


def _hidden():
    """Say nothing to anyone at all."""


def undocumented():
    pass


class Square:
    """A square."""

    def __init__(self, side):
        """Remember the side of it."""

    async def paint(self, *, colour="red"):
        """Paint it in a colour of one's own choice."""

    def mix(self, other):
        """Mix it with an "other" of its kind."""

    def size(self):
        """side * side"""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small library: enough modules that some are held out, and files that are no text."""
    for name in [f"part{i}" for i in range(60)]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(SOURCE.replace("Return the", f"Return {name}'s"))
    for name in ("test/test_area.py", "site-packages/other.py", "_sysconfigdata_x.py", "bad.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"# coding: utf-8\n\xff\n")
    (tmp_path / "pydoc_data").mkdir()
    topics = "# made\ntopics = {'if': 'The if statement\\n is used', 'for': 'It loops'}\n"
    (tmp_path / "pydoc_data" / "topics.py").write_text(topics)
    return tmp_path


def test_modules_are_named_as_they_are_imported_and_only_text_is_read(library: Path) -> None:
    modules = {module.name: module.text for module in read_modules(library)}
    assert set(modules) == {f"part{i}" for i in range(60)} | {"pydoc_data.topics"}
    assert modules["pydoc_data.topics"] == "The if statement\n is used\n\nIt loops"
    assert modules["part0"] == SOURCE.replace("Return the", "Return part0's")


def test_a_folder_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no Python file"):
        read_modules(tmp_path)


def test_what_is_held_out_is_in_no_training_text(library: Path) -> None:
    corpus = read_corpus(library, percent=20)
    held = set(corpus.held_out_names)
    assert held == {f"part{i}" for i in range(60) if is_held_out(f"part{i}", 20)}
    for name in held:
        assert not any(f"Return {name}'s" in text for text in corpus.train)
        assert any(f"Return {name}'s" in text for text in corpus.held_out)


def test_conversations_of_the_corpus_are_what_the_template_renders(library: Path) -> None:
    corpus = read_corpus(library, percent=20)
    chats = [text for text in corpus.train if text.startswith("<|im_start|>")]
    assert len(chats) == 4 * (60 - len(corpus.held_out_names))  # the public ones
    name = next(f"part{i}" for i in range(60) if not is_held_out(f"part{i}", 20))
    messages = [
        {
            "role": "user",
            "content": f"What does `area(width, height=1)` do in the module `{name}`?",
        },
        {
            "role": "assistant",
            "content": f"area(width, height=1)\n\nReturn {name}'s area.  It is a product\n"
            "of two numbers.",
        },
    ]
    assert render_chat(builtin_template("chatml"), messages) in chats
    assert not any("{" in text for text in chats)


def test_functions_and_methods_with_documentation_are_found() -> None:
    found = {f.name: f for f in functions(Module("shapes", SOURCE))}
    assert list(found) == [
        "area",
        "_hidden",
        *(f"Square.{name}" for name in ("__init__", "paint", "mix", "size")),
    ]
    assert found["area"].signature == "(width, height=1)"
    assert found["area"].summary == "Return the area."
    assert found["Square.paint"].signature == "(self, *, colour='red')"
    assert found["Square.paint"].summary == "Paint it in a colour of one's own choice."
    assert list(functions(Module("prose", "no code at all"))) == []


def test_rows_ask_what_help_prints_and_are_answered_by_json(library: Path) -> None:
    rows = function_conversations(seed=3, root=library)
    assert (
        len(rows) == 61
    )  # area of each module; paint, the same everywhere, once; mix and size are not plain
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        told = json.loads(answer["content"])
        assert list(told) == ["module", "name", "summary"]
        assert (told["module"], told["name"]) == (row["module"], row["name"])
        for copied in (row["module"], row["name"], told["summary"]):
            assert copied in question["content"]
    assert rows == function_conversations(seed=3, root=library)
    assert rows != function_conversations(seed=4, root=library)
    key = [(row["module"], row["name"]) for row in rows]
    assert sorted(key) == sorted(
        (row["module"], row["name"]) for row in function_conversations(4, library)
    )


def test_help_text_is_header_signature_and_first_paragraph_on_one_line() -> None:
    doc = "Do it\n  at once.  Or later.\n\nFurther words."
    head = "Help on method `C.f` in module `m.n`:"
    assert help_text(Function("m.n", "C.f", "(self, x=1)", doc)) == (
        f"{head}\n\nf(self, x=1)\n\nDo it at once. Or later."
    )
    assert help_text(Function("m", "f", "()", doc)).startswith("Help on function `f` in module `m`")


def test_the_running_library_gives_enough_functions(record_property: Callable) -> None:
    rows = function_conversations()
    record_property("functions", len(rows))
    assert len(rows) > 1000
    longest = max(len(row["messages"][0]["content"]) for row in rows)
    assert longest < 900
    assert len({(row["module"], row["name"]) for row in rows}) > 0.95 * len(rows)
