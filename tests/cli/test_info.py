"""`lora-core info` says what is there and why something is not."""

import json

import pytest

from lora_core.cli.main import main


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
