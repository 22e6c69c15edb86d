"""The benchmark of shared prompts: it runs, and does not time what differs."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def shared_prompt(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("shared_prompt")


def test_a_small_case(shared_prompt: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    shared_prompt.main(["--smoke", "--device", "cpu"])
    line = capsys.readouterr().out.splitlines()[2].split()
    assert line[:3] == ["12", "4", "2"]
    # 11 + 2 x 5 tokens for 2 x 16
    assert float(line[3]) == pytest.approx(21 / 32, abs=0.005)


def test_what_differs_is_not_timed(
    shared_prompt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(torch.ones(2), [torch.ones(3)]), (torch.ones(2), [torch.full((3,), 1.1)])])
    monkeypatch.setattr(shared_prompt, "step", lambda model, batch: next(answers))
    with pytest.raises(RuntimeError, match="gradients differ by"):
        shared_prompt.check(None, {"shared": {}, "apart": {}})
