"""The path a user takes: a transformers folder and JSONL in; adapter, merged model, PEFT out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.checkpoint import load_model
from lora_core.cli.main import main
from lora_core.data import load_tokenizer
from lora_core.quant import NF4Linear
from lora_core.runs.opening import open_model

METHODS = ["lora", "qlora", "full", "bottleneck", "prompt", "prefix"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four conversations, some of several turns."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for i in range(24):
        turns = [
            {"role": "user", "content": f"What is {i} + {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}."},
        ]
        if i % 3 == 0:
            turns += [
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes" + "!" * (i % 5)},
            ]
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows) + "\n")
    return path


def finetune(model: Path, data: Path, out: Path, *more: str) -> int:
    words = ["finetune", "--model", str(model), "--data", str(data), "--out", str(out)]
    quick = ["--steps", "4", "--batch-size", "2", "--accumulate", "2", "--progress", "false"]
    return main([*words, *quick, "--device", "cpu", *more])


@pytest.fixture(scope="module")
def trained(
    llama_folder: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One short run of each method."""
    outs = {}
    for method in METHODS:
        outs[method] = tmp_path_factory.mktemp("runs") / method
        rate = ["--lr", "1e-2"] if method != "full" else ["--lr", "1e-3"]
        assert finetune(llama_folder, chats, outs[method], "--method", method, *rate) == 0
    return outs


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_files(method: str, trained: dict[str, Path]) -> None:
    out = trained[method]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert "eval_loss" in records[-1]
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    run = json.loads((out / "run.json").read_text())
    assert run["finetune"]["method"] == method
    assert run["versions"]["torch"]
    assert len(run["sha256"]["data"]) == 1
    names = {file.name for file in out.iterdir()}
    if method == "full":
        assert {"config.json", "tokenizer.json"} <= names
    else:
        assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= names


@pytest.mark.parametrize("method", METHODS)
def test_generate_and_evaluate_work_on_the_result(
    method: str,
    trained: dict[str, Path],
    chats: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ["--model" if method == "full" else "--adapter", str(trained[method])]
    prompt = ["--prompt", "What is 2 + 2?", "--max-new-tokens", "5", "--json"]
    assert main(["generate", *where, *prompt]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["answer"], str)
    assert main(["evaluate", *where, "--data", str(chats), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] > 100
    assert found["perplexity"] > 1


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_transformers_loads_the_merged_folder_with_equal_logits(
    method: str,
    trained: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    oracle: Callable[[str], Any],
) -> None:
    merged = tmp_path / "merged"
    words = ["merge", "--adapter", str(trained[method]), "--out", str(merged), "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["merged_onto"] == {"lora": "dense", "qlora": "nf4"}[method]
    theirs = oracle("transformers").AutoModelForCausalLM.from_pretrained(merged).eval()
    ours = load_model(merged)
    ids = torch.randint(3, 400, (2, 40))
    with torch.no_grad():
        got, want = ours(ids).logits, theirs(ids).logits
        exact = theirs.double()(ids).logits
    error, baseline = ((t.double() - exact).abs().max() for t in (got, want))
    floor = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 2 * baseline + floor
    # the unmerged model's logits, to the rounding of a float32 merge through three layers
    assert facts["largest_logit_difference"] <= 1e-5 * facts["largest_logit"]
    tokenizer = oracle("transformers").AutoTokenizer.from_pretrained(merged)
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == load_tokenizer(merged).render(chat, add_generation_prompt=True)


@pytest.mark.oracle
def test_peft_loads_the_qlora_adapter_on_dequantized_weights(
    trained: dict[str, Path],
    llama_folder: Path,
    oracle: Callable[[str], Any],
) -> None:
    """Equal outputs to float32 rounding: both are compared with the same model in float64."""
    from lora_core.checkpoint import load_adapter

    ours = load_model(llama_folder, quantize="nf4")
    theirs = oracle("transformers").AutoModelForCausalLM.from_pretrained(llama_folder)
    layers = dict(theirs.named_modules())
    quantized = {n: m for n, m in ours.named_modules() if isinstance(m, NF4Linear)}
    assert len(quantized) == 21
    with torch.no_grad():
        for name, module in quantized.items():
            layers[name].weight.copy_(module.dense_weight())
    load_adapter(ours, trained["qlora"])
    theirs = oracle("peft").PeftModel.from_pretrained(theirs, str(trained["qlora"])).eval()
    ids = torch.randint(3, 400, (2, 40))
    with torch.no_grad():
        got, want = ours.eval()(ids).logits, theirs(ids).logits
        exact = theirs.double()(ids).logits
    error, baseline = ((t.double() - exact).abs().max() for t in (got, want))
    floor = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 2 * baseline + floor
    # and the adapter does something
    plain = load_model(llama_folder, quantize="nf4")
    with torch.no_grad():
        assert (plain(ids).logits - got).abs().max() > 100 * error


def test_merge_onto_the_originals_says_what_it_costs(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "--adapter", str(trained["qlora"]), "--out", str(tmp_path / "m"), "--json"]
    assert main([*words, "--onto-original"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["merged_onto"] == "16-bit originals"
    assert facts["largest_logit_difference"] > 1e-3 * facts["largest_logit"]
    assert any("trained on a nf4 base" in note for note in facts["notes"])
    assert main(words) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("bottleneck", "non-linear"),
        ("prompt", "virtual tokens are inputs"),
        ("prefix", "no weight gives the same"),
    ],
)
def test_merging_what_no_weight_can_hold_is_refused_with_the_reason(
    method: str,
    reason: str,
    trained: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "m"
    assert main(["merge", "--adapter", str(trained[method]), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_soft_prompts_take_their_flags(
    llama_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--prompt-init", "text", "--prompt-text", "Add, then answer.", "--method", "prompt"]
    length = ["--num-virtual-tokens", "7"]
    assert finetune(llama_folder, chats, tmp_path / "text", *text, *length, "--lr", "1e-9") == 0
    tok = load_tokenizer(llama_folder)
    ids = (tok.encode("Add, then answer.") * 7)[:7]
    held = open_model(None, tmp_path / "text", device="cpu").model
    (prompt,) = [p for name, p in held.named_parameters() if name.endswith(".prompt")]
    base = load_model(llama_folder)
    assert torch.allclose(prompt, base.model.embed_tokens.weight[ids], atol=1e-7, rtol=0)
    recorded = json.loads((tmp_path / "text" / "run.json").read_text())["adapter"]
    assert (recorded["text"], recorded["token_ids"]) == ("Add, then answer.", None)

    network = ["--method", "prefix", "--prefix-hidden", "5"]
    assert finetune(llama_folder, chats, tmp_path / "prefix", *network, *length) == 0
    written = json.loads((tmp_path / "prefix" / "adapter_config.json").read_text())
    assert (written["num_virtual_tokens"], written["encoder_hidden_size"]) == (7, 5)
    assert (tmp_path / "prefix" / "reparametrization.safetensors").is_file()

    alone = ["--method", "prompt", "--prompt-text", "Hello"]
    assert finetune(llama_folder, chats, tmp_path / "no", *alone) == 1
    assert 'text belongs to init="text"' in capsys.readouterr().err


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.glob("adapter_*")}


def test_resume_continues_starts_afresh_and_leaves_a_finished_run_alone(
    llama_folder: Path, chats: Path, tmp_path: Path
) -> None:
    more = ["--method", "lora", "--dropout", "0.1", "--seed", "3"]
    more += ["--save-every", "1", "--keep", "9"]
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    assert finetune(llama_folder, chats, straight, *more, "--resume") == 0  # nothing there: afresh
    assert finetune(llama_folder, chats, halted, *more) == 0
    # forget the end of the run, as a crash after step 2 would have
    for folder in (halted / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 2:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    (halted / "adapter_config.json").unlink()
    kept = sorted((halted / "checkpoints").glob("step-*"))
    if not kept:
        pytest.fail("no checkpoint at or before step 2 was kept")
    assert finetune(llama_folder, chats, halted, *more, "--resume") == 0
    assert (
        weights(halted)["adapter_model.safetensors"]
        == weights(straight)["adapter_model.safetensors"]
    )
    before = {f: f.stat().st_mtime_ns for f in halted.rglob("*") if f.is_file()}
    assert finetune(llama_folder, chats, halted, *more, "--resume") == 0
    changed = [
        f.name for f, when in before.items() if f.name != ".lock" and f.stat().st_mtime_ns != when
    ]
    assert changed == []


def test_a_run_begun_anew_is_saved_over_the_old_one(
    llama_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """The same numbers of steps do not make it the run whose adapter lies there."""
    out, rate = tmp_path / "out", ["--method", "lora", "--lr", "1e-2"]
    assert finetune(llama_folder, chats, out, *rate) == 0
    first = weights(out)
    shutil.rmtree(out / "checkpoints")
    assert finetune(llama_folder, chats, out, *rate, "--seed", "5", "--resume") == 0
    again = weights(out)
    assert again["adapter_model.safetensors"] != first["adapter_model.safetensors"]
    moved = out.rename(tmp_path / "moved")
    words = ["--config", str(moved / "run.json"), "--out", str(moved)]
    assert main(["finetune", *words, "--resume"]) == 0
    assert weights(moved) == again
    moved.rename(out)
    assert main(["finetune", *words[:1], str(out / "run.json"), "--resume"]) == 0  # into its own
    assert weights(out) == again


def test_config_repeats_a_run(trained: dict[str, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    words = ["--config", str(trained["qlora"] / "run.json"), "--out", str(again)]
    assert main(["finetune", *words]) == 0
    assert (
        weights(again)["adapter_model.safetensors"]
        == weights(trained["qlora"])["adapter_model.safetensors"]
    )


def test_added_tokens_are_trained_saved_and_merged(
    llama_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, merged = tmp_path / "run", tmp_path / "merged"
    more = ["--add-tokens", "<tool>,</tool>", "--method", "qlora"]
    assert finetune(llama_folder, chats, out, *more) == 0
    assert load_tokenizer(out).is_token("<tool>")
    assert open_model(None, out).tok.eos_ids == load_tokenizer(llama_folder).eos_ids
    capsys.readouterr()
    assert main(["merge", "--adapter", str(out), "--out", str(merged), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["largest_logit_difference"] <= 1e-5 * facts["largest_logit"]
    model = load_model(merged)
    assert model.config.vocab_size == 402
    assert load_tokenizer(merged).vocab_size == 402


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--r", "0"], "r must be"),
        (["--targets", "q_porj"], "q_porj"),
        (["--lr", "0"], "lr must be above 0"),
        (["--eval-fraction", "1.5"], "eval_fraction must be in"),
        (["--columns", "prompt"], "is not NAME=COLUMN"),
        (["--template", "nonsense"], "template 'nonsense'"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--device", "gpu7"], "--device gpu7 cannot be used"),
        (["--device", "meta"], "--device meta cannot be used: it has shapes, no numbers"),
        (["--add-tokens", "<a>", "--method", "bottleneck"], "--add-tokens"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    llama_folder: Path,
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert finetune(llama_folder, chats, tmp_path / "out", *words) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lora-core finetune: ")
    assert message in last
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_bad_json_names_file_and_line(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert finetune(llama_folder, data, tmp_path / "out") == 1
    assert "bad.jsonl:2" in capsys.readouterr().err


def test_a_run_is_not_overwritten(
    trained: dict[str, Path],
    llama_folder: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = weights(trained["lora"])
    assert finetune(llama_folder, chats, trained["lora"]) == 1
    assert "--resume continues it" in capsys.readouterr().err
    assert weights(trained["lora"]) == before


def test_two_sources_are_mixed_and_reported(
    llama_folder: Path, chats: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": f"Say {i}.", "completion": f" {i}"} for i in range(8)]
    other.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    words = ["--data", f"{chats}:2", f"{other}:1", "--template", "chatml"]
    assert finetune(llama_folder, chats, out, *words) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    named = {key for record in records for key in record if key.startswith("loss/")}
    assert len(named) == 2


def test_quantize_writes_a_folder_that_loads_and_trains(
    llama_folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nf4"
    assert main(["quantize", "--model", str(llama_folder), "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers"] == 21
    # 4 bits a code, 8 a scale of 64, and by layer 32 bits of offset and of each nested scale
    assert 4.125 < facts["bits_per_weight"] < 4.25
    assert facts["bytes_after"] < facts["bytes_before"]
    assert facts["logit_rms_error"] < facts["logit_rms"]
    assert finetune(out, chats, tmp_path / "run") == 0
    assert main(["quantize", "--model", str(llama_folder), "--out", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_plain_text_and_a_full_fine_tune_go_through_the_same_loop(
    llama_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"The number {i} follows."}) for i in range(12)))
    out = tmp_path / "out"
    assert finetune(llama_folder, data, out, "--method", "full", "--lr", "1e-3") == 0
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert load_model(out).config == load_model(llama_folder).config


def test_an_adapter_on_the_quantized_folder_of_its_base(
    trained: dict[str, Path], tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder holds the codes that the adapter was trained on: nothing is quantized again."""
    nf4, adapter = tmp_path / "nf4", str(trained["qlora"])
    assert main(["quantize", "--model", str(llama_folder), "--out", str(nf4)]) == 0
    prompt = ["--prompt", "hi", "--max-new-tokens", "4", "--json"]
    answers = []
    for base in (llama_folder, nf4):
        capsys.readouterr()
        assert main(["generate", "--adapter", adapter, "--model", str(base), *prompt]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    words = ["merge", "--adapter", adapter, "--model", str(nf4), "--out", str(tmp_path / "m")]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["trained_on"], facts["merged_onto"]) == ("nf4", "nf4")
    words[-1] = str(tmp_path / "other")
    assert main([*words, "--onto-original"]) == 1
    assert "--onto-original: the adapter's base is in 4 bits itself" in capsys.readouterr().err
