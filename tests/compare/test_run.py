"""A comparison from beginning to end, in process: figures, resumption, failures, interruption."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.checkpoint import load_adapter, load_model
from lora_core.compare import METHODS, CompareConfig, Compared, compare, leave
from lora_core.compare.run import _how_it_ended, in_a_process
from lora_core.compare.task import prepare
from lora_core.compare.worker import main as work
from lora_core.compare.worker import reason_of
from lora_core.data import load_tokenizer

Make = Callable[..., CompareConfig]


def test_every_method_has_its_figures(every: Compared, tiny_model: Path) -> None:
    assert [record["name"] for record in every.records] == list(METHODS)
    assert every.failed == []
    records = {record["name"]: record for record in every.records}
    out = Path(every.config.out)
    for name, record in records.items():
        trains = METHODS[name].trains
        assert (record["trainable"] > 0) is trains
        assert record["memory"] <= record["memory_whole"]
        assert set(record["quality"]) >= {"exact_match", "f1", "rougeL"}
        assert record["loss"]["value"] > 0
        assert record["quality"]["f1"]["count"] == 3
        answers = (out / record["folder"] / "answers.jsonl").read_text().splitlines()
        assert len(answers) == 3
        assert ("forgetting" in record) is trains
        if trains:
            assert [point["step"] for point in record["history"]] == [1, 2]
            assert record["train_seconds"] > 0
    # what is trained, by the formulas of docs/adapters.md: hidden 32, two layers
    assert records["full"]["trainable"] == records["full"]["parameters"]
    assert records["prompt"]["trainable"] == 3 * 32
    assert records["bottleneck-pfeiffer"]["trainable"] == 2 * (2 * 32 * 4 + 32 + 4)
    assert records["bottleneck-houlsby"]["trainable"] == 4 * (2 * 32 * 4 + 32 + 4)
    widths = [32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 64, 32 + 64, 64 + 32]
    assert records["lora"]["trainable"] == 2 * 2 * sum(widths)
    # what folds into weights and what does not
    assert {n: r["mergeable"] for n, r in records.items()} == {
        **dict.fromkeys(["zero-shot", "few-shot", "system-prompt", "full"]),
        **dict.fromkeys(["lora", "qlora", "dora"], True),
        **dict.fromkeys(["bottleneck-houlsby", "bottleneck-pfeiffer"], False),
        **dict.fromkeys(["bottleneck-parallel", "prefix", "prompt", "ptuning"], False),
    }
    assert set(records["lora"]["latency"]) == {"base", "unmerged", "merged"}
    assert set(records["full"]["latency"]) == {"base"}
    assert "virtual tokens" in records["prompt"]["unmergeable"]
    size = (out / records["lora"]["folder"] / "adapter" / "adapter_model.safetensors").stat()
    assert records["lora"]["bytes"] == size.st_size
    assert records["full"]["bytes"] == (tiny_model / "model.safetensors").stat().st_size


def test_what_is_shown_costs_tokens(every: Compared, tiny_model: Path) -> None:
    records = {record["name"]: record for record in every.records}
    tokens = {name: record["prompt_tokens"]["value"] for name, record in records.items()}
    tok = load_tokenizer(tiny_model)
    question = {"role": "user", "content": "What is 12 + 12?"}
    system = {"role": "system", "content": "Add."}
    assert tokens["zero-shot"] == tokens["lora"] == len(tok.encode_prompt([question]))
    assert tokens["system-prompt"] == len(tok.encode_prompt([system, question]))
    assert every.shots is not None
    assert tokens["few-shot"] > (every.shots + 1) * tokens["zero-shot"]
    losses = {records[name]["loss"]["value"] for name in ("zero-shot", "few-shot", "system-prompt")}
    assert len(losses) == 3


def test_the_loss_is_over_every_question(tiny_model: Path) -> None:
    """Also over one that spells a control token, which training data would lose."""
    from lora_core.compare.measures import held_out_loss
    from lora_core.evaluate.questions import Question

    tok = load_tokenizer(tiny_model)
    model = load_model(tiny_model)

    def graded(*texts: str) -> int:
        asked = [
            Question(text, ({"role": "user", "content": text},), ("It is.",), "here")
            for text in texts
        ]
        found = held_out_loss(model, tok, asked, system=None, shots=())
        return int(found["loss"]["count"])  # tokens

    assert graded("Say <|im_end|>", "one", "two") == graded("three", "one", "two")


def test_what_was_saved_is_what_was_measured(every: Compared, tiny_model: Path) -> None:
    """The adapter in the folder gives the loss and the forgetting that are in the record."""
    from lora_core.compare.measures import general, held_out_loss
    from lora_core.compare.task import asked_questions

    record = next(r for r in every.records if r["name"] == "dora")
    model = load_model(tiny_model)
    questions = asked_questions(every.task)
    tok = load_tokenizer(tiny_model)
    before = held_out_loss(model, tok, questions, system=None, shots=())
    bits = general(model, tok, every.task).bits_per_byte
    load_adapter(model, Path(every.config.out) / record["folder"] / "adapter")
    worse = general(model.eval(), tok, every.task).bits_per_byte - bits
    assert worse == pytest.approx(record["forgetting"]["value"], abs=1e-6)
    assert abs(worse) > 1e-5
    after = held_out_loss(model.eval(), tok, questions, system=None, shots=())
    assert after["loss"]["value"] == pytest.approx(record["loss"]["value"], rel=1e-5)
    zero = next(r for r in every.records if r["name"] == "zero-shot")
    assert before["loss"] == zero["loss"]
    assert before["loss"]["value"] != after["loss"]["value"]


def test_a_second_call_runs_what_is_missing(make_config: Make, in_process: Any) -> None:
    config = make_config(methods=("zero-shot", "lora"))
    first = compare(config, worker=in_process)
    assert in_process.ran == ["base", "zero-shot", "lora"]
    again = compare(config, worker=in_process)
    assert again.records == first.records
    assert in_process.ran == ["base", "zero-shot", "lora"]
    in_process.ran.clear()
    more = replace(config, seeds=(0, 1), methods=("zero-shot", "lora", "prompt"))
    found = compare(more, worker=in_process)
    assert in_process.ran == ["lora", "prompt", "prompt"]
    assert [(r["name"], r["seed"]) for r in found.records] == [
        ("zero-shot", 0),
        ("lora", 0),
        ("lora", 1),
        ("prompt", 0),
        ("prompt", 1),
    ]
    in_process.ran.clear()
    compare(replace(config, rates={"lora": 0.5}), worker=in_process)
    assert in_process.ran == ["lora"]


def test_a_second_call_names_its_rows(make_config: Make, in_process: Any) -> None:
    """What an earlier call set is a point of this one's sweep, and the other way round."""
    plain = make_config(methods=("lora",))
    compare(plain, worker=in_process)
    swept = compare(replace(plain, sweep={"r": (2, 4)}), worker=in_process)
    assert in_process.ran == ["base", "lora", "lora"]  # r=2 was there
    rows = [("lora r=2", {"r": 2}), ("lora r=4", {"r": 4})]
    assert [(r["name"], r["swept"]) for r in swept.records] == rows
    (alone,) = compare(plain, worker=in_process).records
    assert (alone["name"], alone["swept"]) == ("lora", {})


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_another_tokenizer_or_template_is_another_task(
    name: str, make_config: Make, tmp_path: Path
) -> None:
    source, copy = Path(make_config().model or ""), tmp_path / "copy"
    shutil.copytree(source, copy)
    config = make_config(model=str(copy))
    before = prepare(config, tmp_path).identity()
    assert before == prepare(config, tmp_path).identity()
    with (copy / name).open("a") as stream:
        stream.write(" ")
    assert prepare(config, tmp_path).identity() != before


def test_data_that_is_not_the_tasks_is_not_replaced(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    own = tmp_path / "data" / "train.jsonl"
    own.write_text("mine\n")
    with pytest.raises(ValueError, match=r"data is there without held-out\.jsonl: choose another"):
        prepare(make_config(data=None, eval_data=None), tmp_path)
    assert [file.name for file in own.parent.iterdir()] == ["train.jsonl"]
    assert own.read_text() == "mine\n"


def test_a_seed_changes_what_is_trained(make_config: Make, in_process: Any) -> None:
    found = compare(make_config(methods=("lora",), seeds=(0, 1)), worker=in_process)
    first, second = (record["loss"]["value"] for record in found.records)
    assert first != second


def test_one_failure_is_recorded_and_the_rest_goes_on(
    make_config: Make, in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_core.compare import report, worker

    monkeypatch.setattr(report, "no_matplotlib", lambda: "drawing takes a second")

    def broken(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    config = make_config(methods=("lora", "zero-shot"))
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_train", broken)
        found = compare(config, worker=in_process)
    assert [record["status"] for record in found.records] == ["failed", "done"]
    assert found.records[0]["failed"].startswith("out of memory: DefaultCPUAllocator")
    leave(found)
    text = (Path(config.out) / "compare.md").read_text()
    assert "| lora | failed |" in text
    assert "lora (seed 0) failed: out of memory" in text
    in_process.ran.clear()
    again = compare(config, worker=in_process)
    assert in_process.ran == ["lora"]  # what failed is tried again
    assert again.failed == []


def test_an_interruption_keeps_what_is_done(make_config: Make, in_process: Any) -> None:
    config = make_config(methods=("zero-shot", "lora", "prompt"))
    in_process.fails["lora"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare(config, worker=in_process)
    in_process.fails.clear()
    in_process.ran.clear()
    compare(config, worker=in_process)
    assert in_process.ran == ["lora", "prompt"]


def test_a_worker_that_was_interrupted_interrupts_the_comparison(make_config: Make) -> None:
    def interrupted(spec: Path, result: Path, log: Path) -> int:
        return 130

    with pytest.raises(KeyboardInterrupt):
        compare(make_config(methods=("zero-shot",)), worker=interrupted)


def test_a_worker_that_dies_is_a_failure(make_config: Make, in_process: Any) -> None:
    def dies(spec: Path, result: Path, log: Path) -> int:
        if json.loads(spec.read_text())["variant"] is None:
            return int(in_process(spec, result, log))
        log.write_text("one\nlast words\n\n")
        return -9

    found = compare(make_config(methods=("zero-shot",)), worker=dies)
    assert found.records[0]["failed"] == "the process was ended by SIGKILL: memory may have run out"


def test_how_a_process_ended(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert _how_it_ended(1, log) == "the process ended with code 1: it printed nothing"
    log.write_text("one\nlast words\n\n")
    assert _how_it_ended(3, log) == "the process ended with code 3: last words"
    assert _how_it_ended(-15, log) == "the process was ended by SIGTERM"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(""), "ValueError: "),
        (MemoryError(), "out of memory: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of memory: CUDA out of"),
    ],
)
def test_a_reason_is_one_line(error: Exception, line: str) -> None:
    assert reason_of(error).startswith(line)
    assert "\n" not in reason_of(error)


def test_the_base_must_be_measurable(make_config: Make, in_process: Any, tmp_path: Path) -> None:
    config = make_config(methods=("zero-shot",), model=str(tmp_path / "torn"))
    source = Path(make_config().model or "")
    (tmp_path / "torn").mkdir()
    for file in source.iterdir():
        (tmp_path / "torn" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"the base cannot be measured: .*model\.safetensors"):
        compare(config, worker=in_process)


def test_a_real_process_does_the_same(
    make_config: Make, in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One variant in a process of its own; a file of the working folder is no module to it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = make_config(methods=("lora",))
    here = compare(config, worker=in_process).records[0]
    folder = tmp_path / "real"
    folder.mkdir()
    spec = Path(config.out) / here["folder"] / "spec.json"
    asked = json.loads(spec.read_text()) | {"folder": str(folder)}
    (folder / "spec.json").write_text(json.dumps(asked))
    code = in_a_process(folder / "spec.json", folder / "result.json", folder / "log.txt")
    assert code == 0, (folder / "log.txt").read_text()
    found = json.loads((folder / "result.json").read_text())
    for name in ("loss", "quality", "forgetting", "history", "bytes"):
        assert found[name] == here[name]
    # this process has its tests and plots in memory already; a fresh one has only the variant
    assert 0 < found["memory"] < found["memory_whole"]


def test_the_worker_leaves_its_reason_and_the_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_text('{"task": {}}')
    assert work([str(tmp_path / "spec.json"), str(tmp_path / "result.json")]) == 1
    said = json.loads((tmp_path / "result.json").read_text())
    assert "required" in said["failed"]
    assert "Traceback" in capsys.readouterr().err
