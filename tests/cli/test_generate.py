"""`lora-core generate`: flags, streaming, and the chat: history, switching, interruption, reuse."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core import base_model_path, generate, load_model, load_tokenizer, save_adapter
from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.cli.chat import Chat, named, open_choices
from lora_core.cli.main import main
from lora_core.runs.opening import open_model

BASE = str(base_model_path())
WORDS = ["generate", "--model", BASE, "--max-new-tokens", "12"]
SAMPLED = {"temperature": 1.0, "top_k": 50, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 4}
CONTROL = "lora-core generate: "


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, shake: Callable[..., Any]) -> list[Path]:
    """Two adapters of the base, the second with a template of its own."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("first", "second")]
    for index, folder in enumerate(folders):
        model = load_model(BASE, dtype=torch.float32)
        add_adapter(model, LoRAConfig(r=2 + index))
        shake(model, 0.02 * (index + 1))
        save_adapter(model, folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    (folders[1] / "chat_template.jinja").write_text(template)
    return folders


def chat(
    adapters: list[Path],
    text: str,
    wrap: Callable[[io.StringIO], Any] = lambda out: out,
    **more: Any,
) -> tuple[Chat, list[str]]:
    """A chat that was given these lines, and what it wrote."""
    pairs = [named(str(folder)) for folder in adapters]
    opened = open_model(BASE, pairs[0][1] if pairs else None, device="cpu")
    talk = Chat(opened, open_choices(opened, pairs), {"max_new_tokens": 12, **more})
    out = io.StringIO()
    assert talk.run(io.StringIO(text), wrap(out)) == 0
    return talk, out.getvalue().splitlines()


def expected(messages: list[dict[str, str]], adapter: Path | None = None, **more: Any) -> str:
    """The answer of a model that was opened for it alone."""
    opened = open_model(BASE, adapter, device="cpu")
    return generate(opened.model, opened.tok, messages, max_new_tokens=12, **more)


def test_flags_reach_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        w for key, value in SAMPLED.items() for w in (f"--{key.replace('_', '-')}", str(value))
    ]
    assert main([*WORDS, "--text", "def __init__(self", *flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    opened = open_model(BASE, device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 12, **SAMPLED}
    assert answer == generate(opened.model, opened.tok, "def __init__(self", **options)
    assert len(answer) > 8
    stops = ["--stop", answer[4:6], "--stop", answer[7:9]]
    assert main([*WORDS, "--text", "def __init__(self", *flags, *stops]) == 0
    assert capsys.readouterr().out == answer[:4] + "\n"


def test_streamed_output_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for how in ("--stream", "--no-stream"):
        assert main([*WORDS, "--prompt", "What is os?", how]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0]) > 5


def test_wrong_flags_are_one_line(capsys: pytest.CaptureFixture[str], adapters: list[Path]) -> None:
    two = ["--adapter", str(adapters[0]), "--adapter", str(adapters[1])]
    cases = [
        (["--chat", "--json"], 2, "--chat is for people: leave --json out"),
        (["--text", "x", "--system", "y"], 2, "--system goes with --prompt or --chat"),
        (["--messages", "[]", "--system", "y"], 2, "--system goes with --prompt or --chat"),
        (["--prompt", "x", *two], 2, "one --adapter answers a prompt, got 2; --chat takes several"),
        (["--prompt", "x", "--top-k", "0"], 1, "top_k must be at least 1, or None for all; got 0"),
        (["--prompt", "x", "--stop", ""], 1, "a stop string is empty"),
        (["--prompt", "x", "--max-new-tokens", "0"], 1, "--max-new-tokens must be at least 1"),
        (["--chat", "--adapter", "none=x"], 1, "'none' is the base's name in a chat"),
        (["--chat", "--adapter", "=x"], 1, "--adapter takes [NAME=]DIR; got '=x'"),
        (["--chat", *two[:2], *two[:2]], 1, "two adapters are called 'first': give one as NAME="),
    ]
    for words, code, message in cases:
        assert main([*WORDS, *words]) == code
        error = capsys.readouterr().err
        assert error.startswith(CONTROL + message), error
        assert error.count("\n") == 1
    assert main([*WORDS, "--prompt", "x", "--chat"]) == 2  # argparse's own
    assert "not allowed with" in capsys.readouterr().err


def test_a_chat_keeps_its_history_and_its_keys() -> None:
    talk, lines = chat([], "What is os?\nAnd json?\n", **SAMPLED)
    first = expected([{"role": "user", "content": "What is os?"}], **SAMPLED)
    turns = [
        {"role": "user", "content": "What is os?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And json?"},
    ]
    # the second turn draws from the next seed, and runs on what the first has left
    second = expected(turns, **{**SAMPLED, "seed": SAMPLED["seed"] + 1})
    assert "\n".join(lines) == f"{first}\n{second}"
    assert talk.messages == [*turns, {"role": "assistant", "content": second}]
    asked = len(load_tokenizer(BASE).encode_prompt(turns[:1]))
    assert talk.session.reused >= asked


def test_adapters_are_switched_with_their_templates(adapters: list[Path]) -> None:
    text = "Hi\n/adapter\n/adapter second\n/reset\nHi\n/reset\n/adapter none\nHi\n"
    talk, lines = chat(adapters, text + "/reset\n/adapter first\nHi\n")
    hi = [{"role": "user", "content": "Hi"}]
    answers = [expected(hi, where) for where in (adapters[0], adapters[1], None)]
    assert len(set(answers)) == 3
    wanted = [answers[0], "(adapters: none, [first], second)", "(adapter second)", "(forgotten)"]
    wanted += [answers[1], "(forgotten)", "(adapter none)", answers[2], "(forgotten)"]
    assert "\n".join(lines) == "\n".join([*wanted, "(adapter first)", answers[0]])
    assert talk.name == "first"


def test_switching_keeps_the_history_and_computes_it_anew(adapters: list[Path]) -> None:
    switched, _ = chat(adapters, "Hi\n/adapter second\n")
    assert not switched.session.ids  # keys under another adapter are others
    _, lines = chat(adapters, "Hi\n/adapter second\nAnd?\n")
    first = expected([{"role": "user", "content": "Hi"}], adapters[0])
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And?"},
    ]
    second = expected(turns, adapters[1])
    assert "\n".join(lines) == "\n".join([first, "(adapter second)", second])


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    talk, lines = chat([], "/system Be brief.\n\n/help\n/nonsense\n/adapter frist\n/quit\nHi\n")
    assert talk.system == "Be brief."
    assert lines[0] == "(system turn set)"
    assert len(lines) == 1 + 5
    assert talk.messages == []  # nothing after /quit
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(CONTROL + "no command '/nonsense'; one of /adapter, /system,")
    assert errors[1] == CONTROL + "no adapter 'frist'; names here: 'none'"
    talk, lines = chat([], "/system Be brief.\nHi\n/system\n/reset\nHi\n")
    system = {"role": "system", "content": "Be brief."}
    hi = {"role": "user", "content": "Hi"}
    answers = [expected([system, hi]), expected([hi])]
    assert answers[0] != answers[1]
    said = ["(system turn set)", answers[0], "(no system turn)", "(forgotten)", answers[1]]
    assert "\n".join(lines) == "\n".join(said)


def test_a_turn_that_fails_is_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_model(BASE, device="cpu")
    opened.tok.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ messages[-1].content }}"
    )
    talk = Chat(opened, open_choices(opened, []), {"max_new_tokens": 3}, system="x")
    out = io.StringIO()
    assert talk.run(io.StringIO("Hi\n/system\nHi\n"), out) == 0
    assert "no system turns" in capsys.readouterr().err
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


class Interrupting:
    """An output that is sent Ctrl-C's signal while an answer is written to it."""

    def __init__(self, out: io.StringIO, after: int) -> None:
        self.out, self.after, self.writes = out, after, 0

    def write(self, text: str) -> None:
        self.out.write(text)
        self.writes += 1
        if self.writes == self.after:
            signal.raise_signal(signal.SIGINT)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


@pytest.fixture
def heard() -> Iterator[None]:
    """Python's own answer to Ctrl-C: the workers of a parallel test run ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_ends_the_answer_and_not_the_chat() -> None:
    talk, lines = chat([], "What is os?\nGo on\n", wrap=lambda out: Interrupting(out, 3))
    whole = expected([{"role": "user", "content": "What is os?"}])
    said = talk.messages[1]["content"]
    assert 0 < len(said) < len(whole)
    assert whole.startswith(said)
    # the next turn goes on from what was said, and from keys that were whole
    again = expected(talk.messages[:3])
    assert talk.messages[3]["content"] == again
    assert "\n".join(lines) == f"{said}\n{again}"
    assert talk.session.reused > 5


def test_the_chat_as_a_program(adapters: list[Path]) -> None:
    words = [*WORDS, "--chat", "--adapter", f"mine={adapters[0]}"]
    done = subprocess.run(
        [sys.executable, "-m", "lora_core", *words],
        input="Hi\n/adapter\n",
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    answer = expected([{"role": "user", "content": "Hi"}], adapters[0])
    assert done.stdout == f"{answer}\n(adapters: none, [mine])\n"
    assert done.stderr == ""


def test_a_conversation_longer_than_the_model_says_so_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk, _ = chat([], "a b c d " * 60 + "\nMore\n", stop=["\n"])
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("note: the conversation has") for line in errors] == [True]
    assert "made for 256: /reset begins anew" in errors[0]
    assert talk.told_length


def test_an_adapter_with_tokens_of_its_own_chats_alone(
    adapters: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "grown"
    folder.mkdir()
    for file in adapters[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tok = load_tokenizer(BASE)
    tok.add_tokens(["<new>"])
    tok.save(folder)
    pairs = [named(str(adapters[1])), named(str(folder))]
    opened = open_model(BASE, pairs[0][1], device="cpu")
    with pytest.raises(
        ValueError, match=r"of its own, of 4097 tokens, not 4096: chat with it alone"
    ):
        open_choices(opened, pairs)
