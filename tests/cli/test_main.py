"""The dispatcher: verbs, exit codes, one line for a user's mistake."""

import dataclasses
import subprocess
import sys
import types
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, Literal

import pytest

from lora_core.cli import flags, main


def verb(run: Callable[[Namespace], int]) -> types.ModuleType:
    module = types.ModuleType("verb")
    module.HELP, module.EXAMPLE = "does it", "lora-core info"  # type: ignore[attr-defined]
    module.add_arguments = lambda parser: parser.add_argument("--n", type=int)  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    return module


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def run(args: Namespace) -> int:
        raise error

    return run


def code(monkeypatch: pytest.MonkeyPatch, run: Callable[[Namespace], int], *words: str) -> int:
    monkeypatch.setattr(main, "load_verb", lambda name: verb(run))
    return main.main(["info", *words])


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(monkeypatch, lambda args: 0) == 0
    assert code(monkeypatch, lambda args: 0, "--n", "x") == 2
    assert code(monkeypatch, lambda args: 0, "--help") == 0
    assert code(monkeypatch, raising(KeyboardInterrupt())) == 130
    assert main.main([]) == 2
    assert main.main(["--help"]) == 0
    assert main.main(["nonsense"]) == 2
    assert "no verb 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError, ImportError])
def test_a_users_mistake_is_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(monkeypatch, raising(kind("r must be positive,\n got 0"))) == 1
    assert capsys.readouterr().err == "lora-core info: r must be positive, got 0\n"


def test_a_fault_of_the_library_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError):
        code(monkeypatch, raising(AttributeError("x")))


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CORE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="r must"):
        code(monkeypatch, raising(ValueError("r must")))


@pytest.mark.parametrize("name", main.VERBS)
def test_every_verb_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"lora-core {name}" in out.split("example:")[1]


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_core", "--help"], capture_output=True, text=True, check=True
    )
    assert "finetune" in done.stdout


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a test."""

    steps: int | None = None
    """Optimizer steps; None means all."""
    rate: float = 0.1
    """Step size, in
    units."""
    shape: Literal["flat", "round"] = "flat"
    """The shape."""
    fast: bool = False
    """Whether to hurry."""
    hook: Callable[[], None] | None = None
    """No flag can hold this."""


def parse(*words: str) -> dict[str, Any]:
    parser = ArgumentParser()
    flags.add_dataclass_flags(parser, Settings, rename={"rate": "lr"})
    return flags.given(parser.parse_args(words), Settings)


def test_flags_follow_the_dataclass() -> None:
    assert parse() == {}
    assert parse("--steps", "3", "--lr", "1e-3", "--shape", "round", "--fast") == {
        "steps": 3,
        "rate": 1e-3,
        "shape": "round",
        "fast": True,
    }
    assert parse("--fast", "false") == {"fast": False}
    assert flags.field_help(Settings)["rate"] == "Step size, in units."


@pytest.mark.parametrize(
    "words", [["--steps", "x"], ["--shape", "oval"], ["--fast", "perhaps"], ["--hook", "f"]]
)
def test_flags_refuse_what_the_type_refuses(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2
