"""`lora-core compare`: one command to the tables, and every bad input in one line."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_core.checkpoint import save_model
from lora_core.cli.main import main
from lora_core.compare import report, run
from lora_core.compare.worker import main as work
from lora_core.models import CausalLM, ModelConfig

QUICK = ["--steps", "2", "--batch-size", "2", "--r", "2", "--max-new-tokens", "4"]
QUICK += ["--device", "cpu"]
QUICK += ["--latency-runs", "1", "--latency-tokens", "2", "--general-bytes", "600"]


def turns(question: str, answer: str | None) -> str:
    said = [{"role": "user", "content": question}]
    said += [] if answer is None else [{"role": "assistant", "content": answer}]
    return json.dumps({"messages": said}) + "\n"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> list[str]:
    """Flags that name a random model of two layers and a task of some rows."""
    model = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    made = CausalLM(
        ModelConfig(
            vocab_size=400,
            num_attention_heads=4,
            max_position_embeddings=200,
            eos_token_id=2,
            **sizes,
        )
    )
    made.init_weights(0.1, torch.Generator().manual_seed(1))
    save_model(made, model)
    for file in tokenizer_folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    data = tmp_path_factory.mktemp("data")
    for name, rows in (("train", range(8)), ("held", range(8, 11))):
        text = "".join(turns(f"What is {n}?", f"It is {n}.") for n in rows)
        (data / f"{name}.jsonl").write_text(text)
    (data / "general.txt").write_text(str(json.__doc__))
    flags = {"model": model, "data": data / "train.jsonl", "eval-data": data / "held.jsonl"}
    flags["general-text"] = data / "general.txt"
    return [word for name, path in flags.items() for word in (f"--{name}", str(path))]


@pytest.fixture(autouse=True)
def without_processes_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants run in this process and nothing is drawn: each takes a second, many times over."""
    monkeypatch.setattr(run, "in_a_process", lambda spec, result, log: work([spec, result]))
    monkeypatch.setattr(report, "no_matplotlib", lambda: "matplotlib is not here")


def compare(words: list[str], out: Path, *more: str) -> int:
    return main(["compare", "--out", str(out), *words, *QUICK, *more])


def test_tables_on_the_terminal_and_a_second_call(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare(words, out, "--methods", "zero-shot,prompt", "--metrics", "exact,rouge") == 0
    said = capsys.readouterr()
    headings = [line for line in said.out.splitlines() if line.startswith("variant")]
    assert headings[0].split()[:3] == ["variant", "exact_match", "rougeL"]
    assert "mergeable" in headings[1]
    assert str(out / "report.html") in said.out
    assert "2/2" in said.err  # the bar counts variants
    assert "no pictures: matplotlib is not here" in said.err
    again = compare(
        words, out, "--methods", "zero-shot,prompt", "--metrics", "exact,rouge", "--json"
    )
    assert again == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert [variant["name"] for variant in facts["variants"]] == ["zero-shot", "prompt"]
    assert facts == json.loads((out / "compare.json").read_text())
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


def test_a_failed_variant_is_exit_code_1_and_the_others_are_there(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["--methods", "lora,zero-shot", "--sweep", "targets=attention,nowhere"]
    assert compare(words, tmp_path / "out", *methods) == 1
    said = capsys.readouterr()
    wrong = "lora targets=nowhere (seed 0) failed: targets: 'nowhere' matches no"
    assert wrong in said.out
    assert wrong in said.err
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["done", "failed", "done"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "lara"], "no method 'lara'; nearest names: "),
        (["--metrics", "exakt"], "no metric 'exakt' (there are exact, "),
        (["--metrics", "bertscore"], "bertscore needs an encoder's folder"),
        (["--seeds", "0,x"], "--seeds takes whole numbers, such as 0,1,2; got '0,x'"),
        (["--sweep", "width=4"], "no method has a field 'width' to sweep over; fields: lr"),
        (["--sweep", "r=4", "--sweep", "r=8"], "--sweep names r twice"),
        (["--sweep", "r=4", "--methods", "prompt"], "none of prompt has a field 'r' to sweep over"),
        (["--alpha", "0"], "alpha must be a number above 0; got 0"),
        (["--lr", "lora"], "--lr takes METHOD=RATE"),
        (["--lr", "lora=1e-3", "--methods", "full"], "lora is not among the methods compared"),
        (["--lr", "lora=1e-3", "--sweep", "lr=1e-3,2e-3"], "--sweep lr=… both set the rate"),
        (["--shots", "9"], "--shots 9 do not fit: the model has 200 positions"),
        (["--columns", "a"], "columns entry 'a' is not NAME=COLUMN"),
    ],
)
def test_flags_that_make_no_comparison(
    flags: list[str],
    said: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compare(words, tmp_path / "out", *flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("lora-core compare: ")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("flag", "content", "said"),
    [
        ("--data", None, "no data file"),
        ("--data", "", "is empty: no record in it"),
        ("--data", '{"text": "a"}\n', "a row of text asks nothing"),
        ("--data", "{\n", ".jsonl:1: not JSON"),
        ("--eval-data", None, "no data file"),
        ("--eval-data", "", "is empty: no record in it"),
        ("--eval-data", turns("a", "b"), "holds one row: a comparison needs 2 or more"),
        ("--eval-data", turns("a", "b") + turns("c", None), ".jsonl:2: no reference answer"),
        ("--general-text", None, "no text file"),
        ("--general-text", " \n", "holds no text to measure on"),
        ("--model", None, "holds no model: config.json is missing"),
    ],
)
def test_files_that_make_no_comparison(
    flag: str,
    content: str | None,
    said: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "bad.jsonl"
    if flag == "--general-text":
        file = tmp_path / "bad.txt"
    if content is not None:
        file.write_text(content)
    changed = list(words)
    changed[changed.index(flag) + 1] = str(file)
    assert compare(changed, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_folder_of_another_comparison(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare(words, out, "--methods", "zero-shot") == 0
    capsys.readouterr()
    assert compare(words, out, "--methods", "zero-shot", "--max-new-tokens", "5") == 1
    err = capsys.readouterr().err
    assert "holds another comparison: max_new_tokens was 4, is 5; choose another --out" in err
    assert compare(words, out, "--methods", "zero-shot") == 0


def test_ctrl_c_ends_the_variant_and_keeps_what_is_done(
    words: list[str], tmp_path: Path, full_run: bool
) -> None:
    """A real process, interrupted while a variant of many steps trains in a process of its own."""
    if not full_run:
        pytest.skip("two processes: with LORA_TEST_FULL=1; the quick suite interrupts in process")
    out = tmp_path / "out"
    assert compare(words, out, "--methods", "zero-shot") == 0
    flags = ["--methods", "zero-shot,lora", "--sweep", "steps=100000"]
    command = [sys.executable, "-m", "lora_core", "compare", "--out", str(out), *words, *QUICK]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as process:
        logs = out / "runs"
        wait_for(lambda: any("training" in log.read_text() for log in logs.glob("lora*/log.txt")))
        assert len(processes_on(out)) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read().rstrip().endswith("lora-core compare: interrupted")
    assert processes_on(out) == []
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["zero-shot"]
    assert compare(words, out, "--methods", "zero-shot") == 0  # nobody holds the folder


def processes_on(folder: Path) -> list[str]:
    """Command lines of processes that name a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if str(folder) in line else []
    return found


def wait_for(there: Callable[[], bool]) -> None:
    for _ in range(600):
        if there():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")
