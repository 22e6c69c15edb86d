"""The examples run as they stand, print what they promise, and stay short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FLOAT = r"(\d+\.\d+(?:e[+-]\d+)?)"


@pytest.fixture
def run(tmp_path):
    def call(name: str) -> str:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return call


def number(pattern: str, text: str) -> float:
    found = re.search(pattern.replace("NUMBER", FLOAT), text)
    assert found, f"no {pattern!r} in\n{text}"
    return float(found[1])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_an_example_has_under_60_lines(path):
    assert len(path.read_text().splitlines()) < 60


def test_mlp(run):
    out = run("mlp.py")
    before = number("second task, before: loss NUMBER", out)
    assert number("second task, adapted: loss NUMBER", out) < before / 100
    assert number("second task, disabled: loss NUMBER", out) == before
    assert "reloaded, same outputs: True" in out
    assert number("merged, largest difference: NUMBER", out) < 1e-5


def test_own_codebook(run):
    out = run("own_codebook.py")
    nf4, fitted = (number(f"{name}: relative error NUMBER", out) for name in ("nf4", "fitted"))
    assert fitted < nf4
    assert "check_quantizer passed" in out


@pytest.mark.oracle
def test_transformers_model(run, oracle):
    oracle("transformers"), oracle("peft")
    out = run("transformers_model.py")
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\d+\.\d+)", out)]
    assert len(losses) == 4
    assert losses[1] < losses[0]
    assert losses[3] < losses[2]
    assert number("PEFT's logits differ from ours by at most NUMBER", out) < 1e-5
