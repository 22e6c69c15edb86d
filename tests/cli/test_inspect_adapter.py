"""`lora-core inspect --adapter`: the table, JSON and the picture, with and without the base."""

import builtins
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core import LoRAConfig, add_adapter, base_model_path, load_model, save_adapter
from lora_core.adapters import adapted_modules, adapter_spectrum
from lora_core.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the small base model, which names its base."""
    model = load_model(base_model_path())
    add_adapter(model, LoRAConfig(r=3, targets=["q_proj", "up_proj"]))
    torch.manual_seed(0)
    for _, host in adapted_modules(model):
        nn.init.normal_(host.adapters["default"].B, std=0.01)
    where = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(model, where, base_model=str(base_model_path()))
    report = adapter_spectrum(model)
    (where / "wanted.json").write_text(json.dumps(report.as_dict()))
    return where


def copy_of(folder: Path, target: Path, **config: object) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    told = json.loads((target / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(told))
    return target


def test_json_has_what_the_model_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", "--adapter", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    got, wanted = json.loads(out), json.loads((folder / "wanted.json").read_text())
    assert [layer["name"] for layer in got["layers"]]
    by_name = {layer["name"]: layer for layer in wanted["layers"]}
    for layer in got["layers"]:
        other = by_name.pop(layer["name"])
        for key in ("norm", "base_norm", "ratio", "effective_rank", "stable_rank"):
            assert math.isclose(layer[key], other[key], rel_tol=1e-9), (layer["name"], key)
        assert layer["rank"] == other["rank"] == 3
    assert by_name == {}


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", "--adapter", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("update of 'adapter' in ")
    assert lines[1].split() == ["layer", "N", "×", "K", *lines[1].split()[4:]]
    first = lines[2].split()
    assert first[0] == "model.layers.0.mlp.up_proj"
    assert first[5].endswith("%")
    assert len(lines) == 2 + len(json.loads((folder / "wanted.json").read_text())["layers"])


def test_without_a_base(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for named, told in (
        (None, "the adapter names no base: give --model"),
        ("hub/model", "the base 'hub/model' is no model folder here: give --model"),
    ):
        other = copy_of(folder, tmp_path / str(named is None), base_model_name_or_path=named)
        assert main.main(["inspect", "--adapter", str(other)]) == 0
        out, err = capsys.readouterr()
        assert told in err
        assert out.splitlines()[2].split()[5] == "-"
        words = ["inspect", "--adapter", str(other), "--model", str(base_model_path())]
        assert main.main(words) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert out.splitlines()[2].split()[5].endswith("%")


def test_the_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        words = ["inspect", "--adapter", str(folder), "--plot", str(tmp_path / name)]
        assert main.main(words) == 0
        assert f"wrote {tmp_path / name}" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes().startswith(start)
    svg = (tmp_path / "b.svg").read_text()
    assert svg.count("<path") > 40
    bare = copy_of(folder, tmp_path / "bare", base_model_name_or_path=None)
    assert main.main(["inspect", "--adapter", str(bare), "--plot", str(tmp_path / "c.png")]) == 0
    assert main.main(["inspect", "--adapter", str(folder), "--plot", str(tmp_path / "d.xyz")]) == 1
    assert "d.xyz names no format; known: " in capsys.readouterr().err
    assert not (tmp_path / "d.xyz").exists()


def test_without_matplotlib(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    words = ["inspect", "--adapter", str(folder), "--plot", str(tmp_path / "a.png")]
    assert main.main(words) == 1
    out, err = capsys.readouterr()
    assert "update of" in out  # the table comes all the same
    assert "no a.png: matplotlib is not installed (pip install 'lora-core[plots]')" in err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "one of the arguments --data --adapter is required"),
        (["--adapter", "a", "--data", "b"], 2, "not allowed with argument --adapter"),
        (["--data", "b"], 2, "--data needs --model"),
        (["--data", "b", "--model", "m", "--plot", "p.png"], 2, "--plot needs --adapter"),
        (["--adapter", "nowhere"], 1, "nowhere is not a folder"),
    ],
)
def test_usage(words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", *words]) == code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["inspect", "generate", "merge"])
@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("adapter_config.json", "[1]", "adapter_config.json must hold a JSON object; got list"),
        ("adapter_config.json", "{", "adapter_config.json is not valid JSON"),
        ("adapter_config.json", '{"base_model_name_or_path": 5}', "adapter_config.json"),
        ("run.json", '{"base": null}', "run.json: base must be a JSON object; got None"),
    ],
)
def test_files_that_are_not_what_they_should_be(
    verb: str,
    file: str,
    content: str,
    told: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if verb == "inspect" and file == "run.json":
        return  # it does not read that one
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    (wrong / file).write_text(content)
    words = {"generate": ["--prompt", "x"], "merge": ["--out", str(tmp_path / "m")], "inspect": []}
    base = [] if file == "adapter_config.json" else ["--model", str(tmp_path)]
    assert main.main([verb, "--adapter", str(wrong), *base, *words[verb]]) == 1
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_not_the_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["inspect", "--adapter", str(folder), "--model", str(tmp_path)]) == 1
    assert "has no model.safetensors" in capsys.readouterr().err
