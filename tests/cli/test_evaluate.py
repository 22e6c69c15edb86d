"""`lora-core evaluate` on a model: figures, answers that are kept, the base, a golden set."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.adapters import LoRAConfig, PromptTuningConfig, adapted_modules, add_adapter
from lora_core.checkpoint import save_adapter, save_model
from lora_core.cli import evaluate_model
from lora_core.cli.main import main
from lora_core.evaluate import answering
from lora_core.models import CausalLM, EncoderConfig, ModelConfig, build_model

ASKED = ["what is json?", "os", "a list of numbers", "x = 1", "import torch", "the layer"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, adapters `lora` and `prompt` on it, `encoder`; data.jsonl, general.txt."""
    where = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    base = CausalLM(ModelConfig(400, 32, 48, 2, 4, max_position_embeddings=128))
    base.init_weights(0.3)
    save_model(base, where / "base", source=tokenizer_folder)
    for name, config in (
        ("lora", LoRAConfig(r=2, targets="all-linear")),
        ("prompt", PromptTuningConfig(num_virtual_tokens=3)),
    ):
        torch.manual_seed(1)
        model = CausalLM(base.config)
        model.load_state_dict(base.state_dict())
        add_adapter(model, config)
        with torch.no_grad():
            for _, host in adapted_modules(model):
                for parameter in host.adapters.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        save_adapter(model, where / name, base_model=str(where / "base"))
    encoder = build_model(EncoderConfig(400, 32, 48, 1, 4, max_position_embeddings=64))
    encoder.init_weights(0.2)
    save_model(encoder, where / "encoder", source=tokenizer_folder)
    write(where / "data.jsonl", *(chat(text, f"answer {text}") for text in ASKED))
    (where / "general.txt").write_text("The sequence of layers returns a tensor. " * 30)
    return where


def chat(asked: str, said: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": asked}]
    return {"messages": turns + ([{"role": "assistant", "content": said}] if said else [])}


def write(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def evaluate(folders: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the verb with the LoRA adapter on the CPU; gives exit code, output, errors."""

    def run(*words: object, adapter: str | None = "lora") -> tuple[int, str, str]:
        where = [] if adapter is None else ["--adapter", str(folders / adapter)]
        code = main(["evaluate", *where, "--device", "cpu", *map(str, words)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def asking(folders: Path) -> list[str]:
    """Flags that answer the six rows in batches of two, four tokens each."""
    data = str(folders / "data.jsonl")
    return [
        "--data",
        data,
        "--metrics",
        "exact,distinct",
        "--max-new-tokens",
        "4",
        "--batch-size",
        "2",
        "--json",
    ]


# --- figures ---


def test_loss_in_json_and_in_text(evaluate: Run, folders: Path) -> None:
    code, out, err = evaluate("--data", folders / "data.jsonl", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["adapter"] == str(folders / "lora")
    assert "note: data: data.jsonl: 6 records" in err
    figures = found["figures"]
    assert list(figures) == ["loss", "perplexity", "accuracy", "bits_per_byte"]
    for name in ("loss", "perplexity", "accuracy"):
        assert found[name] == figures[name]["value"]
        assert figures[name]["low"] <= found[name] <= figures[name]["high"]
        assert figures[name]["count"] == found["tokens"]
    # bytes of the answers alone: no header, no end of turn
    assert figures["bits_per_byte"]["count"] == sum(len(f"answer {text}") for text in ASKED)
    _, out, _ = evaluate("--data", folders / "data.jsonl")
    assert f"loss             {found['loss']:.4g} [" in out
    assert f"({found['tokens']} tokens)" in out


def test_the_base_beside_the_adapter(evaluate: Run, folders: Path, asking: list[str]) -> None:
    """Its figures are those of the folder without an adapter; the differences are between them."""
    metrics = ["--metrics", "exact,f1,bleu,rouge,distinct,repetition"]
    words = [*asking, *metrics, "--general", folders / "general.txt"]
    code, out, _ = evaluate(*words, "--compare-base")
    both = json.loads(out)
    assert code == 0
    alone = json.loads(evaluate(*words)[1])
    bare = json.loads(evaluate("--model", folders / "base", *words, adapter=None)[1])
    assert both["figures"] == alone["figures"]
    assert both["base"] == bare["figures"]
    assert both["figures"] != both["base"]
    assert set(both["differences"]) == set(both["figures"])
    for name, moved in both["differences"].items():
        after, before = (both[side][name]["value"] for side in ("figures", "base"))
        if None not in (after, before):
            assert moved["value"] == pytest.approx(after - before), name
    assert both["forgetting"] == alone["forgetting"]
    assert "forgetting" not in bare
    table = evaluate(*[word for word in words if word != "--json"], "--compare-base")[1]
    assert table.splitlines()[5].split() == ["adapter", "base", "difference"]
    assert any(line.startswith("distinct_1") for line in table.splitlines())
    assert "bits per byte of general text" in table


def test_forgetting_needs_no_data(evaluate: Run, folders: Path) -> None:
    code, out, _ = evaluate("--general", folders / "general.txt", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found["figures"]) == ["general_bits_per_byte"]
    after, before = (found[side]["general_bits_per_byte"]["value"] for side in ("figures", "base"))
    assert found["forgetting"]["value"] == pytest.approx(after - before)
    assert found["forgetting"]["unit"] == "bytes" or found["forgetting"]["count"] > 1


def test_choices(evaluate: Run, tmp_path: Path) -> None:
    row = {"question": "what?", "choices": ["a tensor", "x"], "answer": 0}
    file = write(tmp_path / "choices.jsonl", row, {**row, "answer": 1})
    code, out, _ = evaluate("--choices", file, "--json", "--compare-base")
    found = json.loads(out)
    assert code == 0
    # the same question twice, each answer right once
    assert found["figures"]["choice_accuracy"]["value"] == 0.5
    assert found["figures"]["choice_accuracy"]["count"] == 2
    assert found["differences"]["choice_accuracy"]["value"] == 0


def test_limit_holds_for_loss_and_answers(evaluate: Run, asking: list[str]) -> None:
    found = json.loads(evaluate(*asking, "--limit", 2)[1])["figures"]
    assert found["empty_answers"]["count"] == 2
    assert found["bits_per_byte"]["count"] == sum(len(f"answer {text}") for text in ASKED[:2])


def test_rows_without_an_answer_need_no_loss(evaluate: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "bare.jsonl", chat("what is json?"))
    words = ["--data", file, "--metrics", "distinct", "--max-new-tokens", 3]
    code, _, err = evaluate(*words)
    assert code == 1
    assert "no row is left" in err
    code, out, _ = evaluate(*words, "--no-loss", "--json")
    assert code == 0
    assert "loss" not in json.loads(out)


def test_answers_without_text_have_no_bytes(evaluate: Run, tmp_path: Path) -> None:
    """Only the end of the turn is graded: that is a loss, and no bits per byte."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]
    data = write(tmp_path / "empty.jsonl", {"messages": turns})
    code, out, _ = evaluate("--data", data, "--json")
    assert code == 0
    assert list(json.loads(out)["figures"]) == ["loss", "perplexity", "accuracy"]


def test_an_encoder_measures(evaluate: Run, folders: Path, asking: list[str]) -> None:
    words = ["--metrics", "bertscore,embedding", "--encoder", folders / "encoder", "--no-loss"]
    found = json.loads(evaluate(*asking, *words)[1])["figures"]
    for name in ("bertscore_f1", "embedding_similarity"):
        assert -1 <= found[name]["value"] <= 1


# --- answers ---


def test_answers_and_figures_are_kept(
    evaluate: Run, asking: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(*asking, "--out", tmp_path / "ev", "--compare-base")[1]
    rows = read(tmp_path / "ev" / "answers.jsonl")
    assert sorted(row["id"] for row in rows) == list("123456")
    assert {"answer", "messages", "references", "where"} <= rows[0].keys()
    assert (tmp_path / "ev" / "metrics.json").read_text() == first
    monkeypatch.setattr(answering, "generate_ids", None)  # nothing is generated again
    assert evaluate(*asking, "--out", tmp_path / "ev", "--compare-base")[1] == first


def test_ctrl_c_keeps_what_was_answered(
    evaluate: Run, asking: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(*asking)[1]
    real, calls = answering.generate_ids, []

    def second_fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(answering, "generate_ids", second_fails)
    out = tmp_path / "ev"
    code, _, err = evaluate(*asking, "--out", out)
    assert code == 130
    assert f"what was answered is kept in {out}; the same command goes on" in err
    assert len((out / "answers.jsonl").read_text().splitlines()) == 2
    assert evaluate(*asking, "--out", out)[1] == whole
    assert len(calls) == 4  # two of the three batches were left


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "3"], "questions was"),
        (["--quantize", "nf4"], 'quantize was null, is "nf4"'),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    more: list[str], message: str, evaluate: Run, asking: list[str], tmp_path: Path
) -> None:
    evaluate(*asking, "--out", tmp_path)
    before = (tmp_path / "answers.jsonl").read_bytes()
    code, _, err = evaluate(*asking, "--out", tmp_path, *more)
    assert code == 1
    assert message in err.splitlines()[-1]
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_another_adapter_is_refused(
    evaluate: Run, folders: Path, asking: list[str], tmp_path: Path
) -> None:
    evaluate(*asking, "--out", tmp_path)
    code, _, err = evaluate(*asking, "--out", tmp_path, adapter="prompt")
    assert code == 1
    assert "answers of other settings: adapter was" in err


@pytest.mark.parametrize("changed", ["--template", "tokenizer_config.json"])
def test_answers_are_bound_to_what_is_rendered(
    changed: str, evaluate: Run, folders: Path, asking: list[str], tmp_path: Path
) -> None:
    """A template file that was edited, and a tokenizer's settings that were, ask otherwise."""
    base = shutil.copytree(folders / "base", tmp_path / "base")
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    words = [*asking, "--no-loss", "--model", base, "--template", template, "--out", tmp_path / "r"]
    assert evaluate(*words, adapter=None)[0] == 0
    if changed == "--template":
        template.write_text("Q: {{ messages[0].content }}")
        name = "template"
    else:
        with (base / changed).open("a") as stream:
            stream.write("\n")
        name = "model"
    code, _, err = evaluate(*words, adapter=None)
    assert code == 1
    assert f"holds answers of other settings: {name} was" in err


def test_a_soft_prompt_answers(evaluate: Run, asking: list[str]) -> None:
    code, out, _ = evaluate(*asking, "--compare-base", adapter="prompt")
    assert code == 0
    assert json.loads(out)["figures"]["empty_answers"]["count"] == 6


def test_examples_and_a_system_text_reach_the_prompt(
    evaluate: Run, folders: Path, asking: list[str], tmp_path: Path
) -> None:
    def widths(*more: object) -> list[int]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert evaluate(*asking, "--out", out, *more)[0] == 0
        rows = read(out / "answers.jsonl")
        return [row["prompt_tokens"] for row in sorted(rows, key=lambda row: int(row["id"]))]

    bare = widths()
    shots = write(tmp_path / "shots.jsonl", chat("q", "a"), chat("more", "less"), chat("not", "me"))
    for more in (["--system", "be brief"], ["--shots", 2, "--shots-data", shots]):
        added = {wide - narrow for wide, narrow in zip(widths(*more), bare, strict=True)}
        assert len(added) == 1  # the same before each question
        assert added.pop() > 5


def test_empty_answers_are_counted_and_named(
    evaluate: Run, folders: Path, asking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that ends at once: token 2 is the end of a turn."""
    monkeypatch.setattr(answering, "generate_ids", lambda model, ids, mask, **_: [[2]] * len(ids))
    code, out, err = evaluate(*asking)
    assert code == 0
    found = json.loads(out)["figures"]
    assert found["empty_answers"]["value"] == 1
    assert found["exact_match"]["value"] == 0
    assert found["distinct_1"]["value"] is None
    data = folders / "data.jsonl"
    assert f"note: answers: 6 of 6 are empty; the first is {data}:1" in err


def test_answers_that_were_cut_are_named(evaluate: Run, folders: Path, asking: list[str]) -> None:
    err = evaluate(*asking)[2]
    assert f"6 of 6 ran into --max-new-tokens; the first is {folders / 'data.jsonl'}:1" in err


# --- what is wrong is said before the model is loaded ---


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is opened is a failure."""

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(evaluate_model, "open_model", opened)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "rows", "flags", "message"),
    [
        (
            "d.jsonl",
            [chat("a", "b"), chat("c")],
            ["--metrics", "distinct,f1", "--data"],
            "d.jsonl:2: metric f1 compares with references, and this row has none (1 of 2",
        ),
        (
            "d.jsonl",
            [{"text": "a"}],
            ["--metrics", "f1", "--data"],
            "d.jsonl:1: a row of text asks",
        ),
        ("g.jsonl", [{"prompt": "a"}], ["--golden"], "g.jsonl:1: "),
        ("g.jsonl", ["no object"], ["--golden"], "g.jsonl:1: a line must be a JSON object"),
        ("c.jsonl", [{"question": "a"}], ["--choices"], "c.jsonl:1: "),
        ("e.txt", [], ["--general"], "e.txt"),
    ],
)
def test_bad_files_are_named(
    name: str,
    rows: list[Any],
    flags: list[str],
    message: str,
    evaluate: Run,
    tmp_path: Path,
) -> None:
    code, out, err = evaluate(*flags, write(tmp_path / name, *rows))
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("lora-core evaluate: ")
    assert message in err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("flag", ["--html", "--save"])
def test_a_place_that_is_not_there(flag: str, evaluate: Run, tmp_path: Path) -> None:
    file = golden(tmp_path, {"prompt": "a", "contains": "b"})
    code, _, err = evaluate("--golden", file, flag, tmp_path / "absent" / "x")
    assert code == 1
    assert f"{flag} {tmp_path / 'absent' / 'x'}: there is no folder" in err


def test_missing_files(evaluate: Run, folders: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.jsonl"
    for words in (
        ["--data", absent],
        ["--choices", absent],
        ["--general", absent],
        ["--golden", absent],
        ["--data", folders / "data.jsonl", "--metrics", "f1", "--shots", 1, "--shots-data", absent],
        ["--answers", absent, "--metrics", "f1"],
    ):
        adapter = None if "--answers" in words else "lora"
        code, _, err = evaluate(*words, adapter=adapter)
        assert code == 1, words
        assert "absent.jsonl" in err.strip().splitlines()[-1]


def test_a_decoder_is_no_encoder(evaluate: Run, folders: Path) -> None:
    code, _, err = evaluate(
        "--data", folders / "data.jsonl", "--metrics", "bertscore", "--encoder", folders / "base"
    )
    assert code == 1
    assert (
        f"--encoder {folders / 'base'} holds a decoder (CausalLM): bertscore and embedding need"
        in err
    )


def test_a_question_without_room_is_named(evaluate: Run, folders: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "long.jsonl", chat("a", "b"), chat("layer " * 200, "b"))
    words = ["--data", file, "--metrics", "f1", "--max-length", 64, "--max-new-tokens", 4]
    code, _, err = evaluate(*words)
    assert code == 1
    assert "long.jsonl:2: a prompt of " in err
    assert "(1 of 2 rows are too long)" in err


def test_more_shots_than_rows(evaluate: Run, folders: Path) -> None:
    data = folders / "data.jsonl"
    words = ["--data", data, "--metrics", "f1", "--shots", 9, "--shots-data", data]
    code, _, err = evaluate(*words)
    assert (code, "--shots 9 asks for more than the 6 rows" in err) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate: give --data"),
        (["--metrics", "f1"], "nothing to evaluate"),
        (["--golden", "g", "--metrics", "f1"], "--metrics needs --data"),
        (["--data", "d", "--metrics", "f1,exakt"], "no metric 'exakt'"),
        (["--data", "d", "--metrics", "f1,exakt"], "did you mean exact?"),
        (["--data", "d", "--metrics", ""], "no metric ''"),
        (["--data", "d", "--metrics", "bertscore"], "give --encoder DIR"),
        (["--data", "d", "--metrics", "f1", "--encoder", "e"], "no metric of f1 needs an encoder"),
        (["--data", "d", "--encoder", "e"], "--encoder: no answer is asked for; give --metrics"),
        (["--data", "d", "--system", "s"], "--system: no answer is asked for"),
        (["--data", "d", "--metrics", "f1", "--shots", "2"], "--shots N and --shots-data FILE go"),
        (["--data", "d", "--no-loss"], "--no-loss leaves nothing to do with --data"),
        (["--data", "d", "--against", "b"], "--against needs --golden"),
        (["--data", "d", "--save", "b"], "--save needs --golden"),
        (["--model", "m", "--data", "d", "--compare-base"], "--compare-base needs --adapter"),
        (["--answers", "a"], "--answers needs --metrics"),
        (["--answers", "a", "--metrics", "f1", "--model", "m"], "before: leave out --model"),
        (["--answers", "a", "--metrics", "f1", "--general"], "before: leave out --general"),
        (["--versus", "b", "--data", "d"], "--answers, --judge missing"),
        (["--judge", "m:f", "--answers", "a"], "--versus missing"),
        (
            ["--judge", "m:f", "--answers", "a", "--versus", "b", "--metrics", "f1"],
            "two files: leave out --metrics",
        ),
        (["--blind", "a", "b"], "--blind needs --out FILE for the votes"),
        (["--blind", "a", "b", "--out", "v", "--json"], "about two files: leave out --json"),
        (["--blind", "a", "b", "--out", "v", "--model", "m"], "leave out --model"),
    ],
)
def test_flags_against_one_another(words: list[str], message: str, evaluate: Run) -> None:
    code, out, err = evaluate(*words, adapter=None)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert message in err


@pytest.mark.parametrize("flag", ["--limit", "--max-new-tokens", "--shots"])
def test_counts_below_one(flag: str, evaluate: Run, folders: Path) -> None:
    data = folders / "data.jsonl"
    words = ["--data", data, "--metrics", "f1", flag, 0]
    words += ["--shots-data", data] if flag == "--shots" else []
    code, _, err = evaluate(*words)
    assert code == 1
    assert err.strip() == f"lora-core evaluate: {flag} must be 1 or more; got 0"


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    told = capsys.readouterr().out
    for title in ("the model:", "answers, and what they are worth:", "results:", "example:"):
        assert title in told


# --- golden set ---


def golden(folder: Path, *rows: dict[str, Any]) -> str:
    return write(folder / "golden.jsonl", *rows)


def test_a_golden_set_before_and_after(evaluate: Run, folders: Path, tmp_path: Path) -> None:
    """Frozen on the base's own answers: the base passes, the adapter does not."""
    base = ["--model", folders / "base", "--max-new-tokens", 4]
    rows = [{"id": f"g{i}", "prompt": text, "expect": "?"} for i, text in enumerate(ASKED[:3])]
    file = golden(tmp_path, *rows)
    code, out, _ = evaluate(*base, "--golden", file, "--out", tmp_path / "ev", adapter=None)
    assert code == 1  # no row says "?"
    assert out.count("FAILS") == 3
    said = read(tmp_path / "ev" / "golden.jsonl")[1:]
    rows = [{**row, "expect": s["answer"]} for row, s in zip(rows, said, strict=True)]
    file, before = golden(tmp_path, *rows), tmp_path / "before.jsonl"
    code, out, _ = evaluate(*base, "--golden", file, "--save", before, adapter=None)
    assert (code, "3 of 3 rows pass" in out) == (0, True)
    words = ["--golden", file, "--max-new-tokens", 4, "--against", before]
    code, out, _ = evaluate(*base, *words, adapter=None)
    assert (code, "0 regressed" in out) == (0, True)
    code, out, _ = evaluate(*words)
    assert (code, "REGRESSION" in out) == (1, True)
    code, out, _ = evaluate(*words, "--json", "--save", tmp_path / "after.jsonl")
    found = json.loads(out)["golden"]
    assert code == 1
    assert found["rows"] == 3
    assert found["regressed"] == found["failed"]
    assert (tmp_path / "after.jsonl").is_file()


def test_a_regression_is_no_failure_that_was_there_before(
    evaluate: Run, folders: Path, tmp_path: Path
) -> None:
    file = golden(tmp_path, {"id": "a", "prompt": "os", "expect": "never"})
    words = ["--golden", file, "--max-new-tokens", 3]
    assert evaluate(*words, "--save", tmp_path / "before.jsonl")[0] == 1
    assert evaluate(*words, "--against", tmp_path / "before.jsonl")[0] == 0


def test_a_golden_row_without_room_is_named(evaluate: Run, tmp_path: Path) -> None:
    file = golden(tmp_path, {"prompt": "a", "contains": "b", "max_new_tokens": 500})
    code, _, err = evaluate("--golden", file)
    assert code == 1
    assert "golden.jsonl:1: a prompt of " in err


# --- the page ---


def test_a_page(evaluate: Run, folders: Path, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    file = write(tmp_path / "hostile.jsonl", chat(bad, bad))
    page = tmp_path / "report.html"
    words = ["--data", file, "--metrics", "distinct", "--max-new-tokens", 3]
    words += ["--general", folders / "general.txt", "--compare-base", "--html", page]
    code, _, _ = evaluate(*words)
    assert code == 0
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for part in ("distinct_1", "Forgetting", "bits per byte", "Answers", "Size of the update"):
        assert part in text
