"""`lora-core info` says what is there and why something is not."""

import json

import pytest

from lora_core.cli.main import main
from lora_kernels.cpu import library


def test_info_names_versions_backends_and_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["backends"]["reference"].startswith("available")
    assert facts["backends"]["triton"].startswith("not available: ")
    assert main(["info"]) == 0
    assert "triton" in capsys.readouterr().out


def test_an_unknown_backend_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "fast")
    assert main(["info"]) == 1
    assert "LORA_KERNELS is 'fast'" in capsys.readouterr().err


def test_the_c_operators_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for why, line in ((None, "available: C for avx2, by gcc"), ("rust", "not available: rust")):
        monkeypatch.setattr(library, "why_not", lambda why=why: why)
        monkeypatch.setattr(library, "describe", lambda: "C for avx2, by gcc")
        assert main(["info", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["backends"]["native"] == line
        assert main(["info"]) == 0
        assert f"  native       {line}\n" in capsys.readouterr().out


def test_an_unknown_instruction_set_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_KERNELS_ISA", "sse9")
    assert main(["info"]) == 1
    assert "LORA_KERNELS_ISA is 'sse9'; set it to one that this CPU has" in capsys.readouterr().err
