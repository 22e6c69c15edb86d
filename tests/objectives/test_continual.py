"""Continual pretraining: windows, replay, a rate for the vocabulary, and forgetting measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.checkpoint import load_adapter, load_model
from lora_core.cli.main import main
from lora_core.data import load_tokenizer
from lora_core.evaluate import forgetting, general_loss, general_text
from lora_core.objectives import DataSettings, Setup
from lora_core.objectives.continual import (
    FORGETTING_FILE,
    Continual,
    ContinualOptions,
    vocabulary_parameters,
)
from lora_core.train import TrainConfig

DOCUMENTS = [
    f"The module number {i} returns {i * i} if it is called, else it raises." for i in range(12)
]
GENERAL = [
    f"A string of {i} letters is joined, split and stripped by its methods." for i in range(9)
]


def write(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to learn, text to replay, and text to measure on."""
    folder = tmp_path_factory.mktemp("cpt")
    write(folder / "text.jsonl", DOCUMENTS)
    write(folder / "replay.jsonl", GENERAL)
    (folder / "general.txt").write_text("Lists are ordered. Sets are not.\n" * 12)
    return folder


@pytest.fixture
def setup(llama_folder: Path, files: Path, tmp_path: Path) -> Callable[..., Setup]:
    """A run's setup on the small model; keywords go to the data's or to the training's settings."""

    def make(method: str = "lora", **options: Any) -> Setup:
        of_data = {
            k: options.pop(k)
            for k in ("data", "columns", "eval_fraction", "max_length")
            if k in options
        }
        settings: dict[str, Any] = {"model": str(llama_folder), "max_length": 16}
        settings["data"] = (str(files / "text.jsonl"),)
        return Setup(
            settings=DataSettings(**settings | of_data),
            training=TrainConfig(**{"lr": 1e-3, **options}),
            method=method,
            tok=load_tokenizer(llama_folder),
            device=torch.device("cpu"),
            out=tmp_path,
            say=lambda line: None,
            show=False,
        )

    return make


def made(files: Path, **options: Any) -> Continual:
    usual = {"general_text": str(files / "general.txt"), "general_bytes": 400}
    return Continual(ContinualOptions(**{**usual, **options}))


def run(model: Path, files: Path, out: Path, *more: str) -> int:
    words = ["finetune", "--objective", "cpt", "--model", str(model), "--out", str(out)]
    words += ["--data", str(files / "text.jsonl"), "--max-length", "16", "--progress", "false"]
    words += ["--general-text", str(files / "general.txt"), "--general-bytes", "400"]
    quick = ["--steps", "3", "--batch-size", "4", "--accumulate", "1", "--warmup", "0"]
    return main([*words, *quick, *more])


def test_documents_end_with_the_end_token_and_are_laid_end_to_end(
    setup: Callable[..., Setup], files: Path
) -> None:
    run, objective = setup(eval_fraction=0.0), made(files)
    objective.read(run)
    stream = [t for row in objective.rows for t in row["input_ids"]]
    truth = [t for text in DOCUMENTS for t in [*run.tok.encode(text), run.tok.eos_id]]
    assert all(len(row["input_ids"]) == 16 for row in objective.rows)
    assert all(row["labels"] == row["input_ids"] for row in objective.rows)
    assert stream == truth[: len(stream)]
    assert 0 <= len(truth) - len(stream) < 16


def test_documents_are_held_out_whole(setup: Callable[..., Setup], files: Path) -> None:
    run, objective = setup(eval_fraction=0.25), made(files)
    objective.read(run)
    shown, held_out = (
        run.tok.decode([t for row in rows for t in row["input_ids"]])
        for rows in (objective.rows, objective.held_out)
    )
    numbers = [f"number {i} returns" for i in range(12)]
    assert sum(n in shown and n in held_out for n in numbers) == 0
    assert sum(n in held_out for n in numbers) == 3


def test_packed_documents_stay_apart(setup: Callable[..., Setup], files: Path) -> None:
    run, objective = setup(eval_fraction=0.0, packing=64), made(files)
    objective.read(run)
    assert len(objective.rows) > len(DOCUMENTS)  # those longer than a row are cut
    assert max(objective.rows.lengths) <= 16
    assert sum(row["input_ids"][-1] == run.tok.eos_id for row in objective.rows) == len(DOCUMENTS)


@pytest.mark.parametrize("packing", [None, 64])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_tokens_is_replayed(
    setup: Callable[..., Setup], files: Path, packing: int | None, share: float
) -> None:
    lines: list[str] = []
    rows = []
    for seed in (0, 0, 1):
        run = setup(eval_fraction=0.0, packing=packing, seed=seed)
        run.say = lines.append
        objective = made(files, replay=str(files / "replay.jsonl"), replay_share=share)
        objective.read(run)
        rows.append(list(objective.rows))
    tokens = dict.fromkeys(("text", "replay"), 0)
    for row in rows[0]:
        tokens[row["source"]] += len(row["input_ids"])
    assert abs(tokens["replay"] - share / (1 - share) * tokens["text"]) <= 8
    assert rows[0] == rows[1] != rows[2]
    said = next(line for line in lines if line.startswith("replay: ") and "an epoch" in line)
    assert f"{tokens['replay'] / sum(tokens.values()):.1%} of the tokens" in said


def groups(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, float]:
    return {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("adapter", "names"),
    [
        (None, ["model.embed_tokens", "lm_head"]),
        (
            LoRAConfig(r=2, modules_to_save=["embed_tokens", "lm_head"]),
            ["model.embed_tokens", "lm_head"],
        ),
        (LoRAConfig(r=2, modules_to_save=["lm_head"]), ["lm_head"]),
        (LoRAConfig(r=2, targets=["q_proj", "embed_tokens"]), ["model.embed_tokens"]),
        (LoRAConfig(r=2, trainable_token_indices=[5, 6]), ["model.embed_tokens"]),
    ],
)
@pytest.mark.parametrize("lora_plus", [1.0, 16.0])
def test_embedding_and_head_have_a_rate_of_their_own(
    setup: Callable[..., Setup],
    files: Path,
    adapter: LoRAConfig | None,
    names: list[str],
    lora_plus: float,
) -> None:
    if adapter is None and lora_plus != 1:
        return  # there is no B
    run = setup("full" if adapter is None else "lora", lora_plus=lora_plus)
    objective = made(files, embedding_lr=2e-5)
    objective.read(run)
    model: Any = load_model(run.settings.model, dtype=torch.float32)
    if adapter is not None:
        add_adapter(model, adapter)
    work = objective.prepare(run, model)
    assert work.optimizer is not None
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    rates = groups(work.optimizer(named))
    inside = {p for name in names for p in model.get_submodule(name).parameters()}
    assert vocabulary_parameters(model) == {p for p in inside if p.requires_grad}
    assert len(rates) == len(named)
    for name, p in named:
        factor = lora_plus if name.endswith(".B") else 1.0
        assert rates[p] == pytest.approx((2e-5 if p in inside else 1e-3) * factor), name


def test_without_a_rate_the_loop_makes_its_own_optimizer(
    setup: Callable[..., Setup], files: Path
) -> None:
    run, objective = setup("full"), made(files)
    objective.read(run)
    assert objective.prepare(run, load_model(run.settings.model)).optimizer is None


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
def test_forgetting_is_measured_against_the_base(
    llama_folder: Path,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    out = tmp_path / "out"
    words = ["--method", method, "--lr", "3e-2", "--replay", str(files / "replay.jsonl")]
    assert run(llama_folder, files, out, *words) == 0
    text = general_text(files / "general.txt", limit_bytes=400)
    tok = load_tokenizer(llama_folder)
    base: Any = load_model(llama_folder, dtype=torch.float32)
    before = general_loss(base, tok, text)
    if method == "full":
        after = general_loss(load_model(out, dtype=torch.float32), tok, text)
    else:
        load_adapter(base, out)
        after = general_loss(base, tok, text)
    told = json.loads((out / FORGETTING_FILE).read_text())
    lost = forgetting(before, after)
    assert abs(lost.value) > 1e-3  # the rate is large enough for a difference
    for key, estimate in (
        ("before", before.estimates()["bits_per_byte"]),
        ("after", after.estimates()["bits_per_byte"]),
        ("forgetting", lost),
    ):
        assert told[key]["value"] == pytest.approx(estimate.value, rel=1e-5)
        assert told[key]["low"] == pytest.approx(estimate.low, rel=1e-4)
    assert told["sha256"] == text.sha256
    assert f"forgetting: {lost.value:.3g}"[:15] in capsys.readouterr().err
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/replay" in record and "loss/text" in record for record in records)
    kept = (out / FORGETTING_FILE).read_text()
    assert run(llama_folder, files, out, *words, "--resume") == 0
    assert (out / FORGETTING_FILE).read_text() == kept


def test_a_step_moves_the_embedding_by_its_rate(
    llama_folder: Path, files: Path, tmp_path: Path
) -> None:
    words = ["--method", "full", "--lr", "1e-3", "--embedding-lr", "1e-5", "--schedule", "constant"]
    assert run(llama_folder, files, tmp_path / "out", *words, "--steps", "1") == 0
    before, after = (
        dict(load_model(d, dtype=torch.float32).named_parameters())
        for d in (llama_folder, tmp_path / "out")
    )
    for name, p in before.items():
        # Adam's first step is the rate, up to eps over the gradient
        rate = 1e-5 if "embed_tokens" in name or "lm_head" in name else 1e-3
        assert (after[name] - p).abs().max().item() == pytest.approx(rate, rel=0.02), name


def test_an_untied_copy_of_the_embedding_is_found(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_core.checkpoint import base_model_path

    words = ["--modules-to-save", "embed_tokens", "--untie", "--embedding-lr", "1e-5"]
    assert run(base_model_path(), files, tmp_path / "out", *words, "--steps", "1") == 0
    assert "learning rate of embedding and head: 1e-05" in capsys.readouterr().err


def test_what_is_refused(
    setup: Callable[..., Setup], files: Path, tmp_path: Path, llama_folder: Path
) -> None:
    for share in (0.0, 1.0):
        with pytest.raises(
            ValueError, match=f"replay_share must be above 0 and below 1; got {share}"
        ):
            ContinualOptions(replay_share=share)
    with pytest.raises(ValueError, match="general_bytes must be 1 or more; got 0"):
        ContinualOptions(general_bytes=0)
    with pytest.raises(ValueError, match="embedding_lr must be a number above 0; got 0"):
        ContinualOptions(embedding_lr=0.0)
    with pytest.raises(FileNotFoundError, match=r"no text file 'absent.jsonl'"):
        made(files, replay="absent.jsonl").check(setup())
    with pytest.raises(FileNotFoundError, match=r"no text file 'absent.txt'"):
        made(files, general_text="absent.txt").check(setup())
    for key in ("text", "replay"):
        shown = str(files / f"{key}.jsonl")
        with pytest.raises(ValueError, match=rf"general_text .*{key}.jsonl is shown in training"):
            made(files, general_text=shown, replay=str(files / "replay.jsonl")).check(setup())
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"text": "a b"}\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match=r"chat.jsonl:2: continual pretraining takes plain text"):
        made(files).read(setup(data=(str(chat),)))
    objective, run = made(files, embedding_lr=1e-5), setup()
    objective.read(run)
    model: Any = load_model(llama_folder)
    add_adapter(model, LoRAConfig(r=2))
    with pytest.raises(
        ValueError, match="embedding_lr is 1e-05, but neither embedding nor head is"
    ):
        objective.prepare(run, model)


@pytest.mark.parametrize("replay", [False, True])
def test_rows_beyond_the_positions_of_the_model_are_refused(
    setup: Callable[..., Setup], files: Path, tmp_path: Path, replay: bool
) -> None:
    long = write(tmp_path / "long.jsonl", [" ".join(DOCUMENTS)] * 2)
    run = setup(data=(str(long),), max_length=600, eval_fraction=0.0)
    more = {"replay": str(files / "replay.jsonl"), "replay_share": 0.5} if replay else {}
    objective = made(files, **more)
    objective.read(run)
    with pytest.raises(ValueError, match=r"rows of 600 tokens .* the 512 positions .*-length 512"):
        objective.prepare(run, load_model(run.settings.model))


def test_replay_has_the_usual_names_whatever_the_data_calls_its_text(
    setup: Callable[..., Setup], files: Path, tmp_path: Path
) -> None:
    body = write(tmp_path / "body.jsonl", DOCUMENTS, "body")
    objective = made(files, replay=f"{files / 'replay.jsonl'}:2")
    run = setup(data=(str(body),), columns="text=body")
    objective.check(run)
    objective.read(run)
    assert {row["source"] for row in objective.rows} == {"text", "replay"}
