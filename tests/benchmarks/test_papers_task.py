"""The task that the papers' claims share, on a model of two tiny layers and made-up rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import LoRAConfig, base_model_path, load_model
from lora_core.data import load_tokenizer


def test_a_seed_draws_the_split(papers: Callable[[str], ModuleType], papers_settings: Any) -> None:
    task = papers("task")
    kept, held = task.function_task(0, 4)
    assert (len(kept), len(held)) == (36, 4)
    assert not {row["name"] for row in kept} & {row["name"] for row in held}
    assert task.function_task(0, 4) == (kept, held)
    assert task.function_task(1, 4)[1] != held
    with pytest.raises(ValueError, match="40 functions are too few to hold out 20 of them"):
        task.function_task(0, 20)


def test_wrong_answers_are_all_wrong_and_as_many_as_asked(
    papers: Callable[[str], ModuleType], papers_settings: Any
) -> None:
    task = papers("task")
    clean = task.training_messages(task.Variant(rows=20), 0, 4)
    assert len(clean) == 20
    for share, count in ((0.4, 8), (1.0, 20), (0.0, 0)):
        noisy = task.training_messages(task.Variant(rows=20, wrong=share), 0, 4)
        assert [chat[0] for chat in noisy] == [chat[0] for chat in clean]
        answers = [chat[1]["content"] for chat in noisy]
        true = [chat[1]["content"] for chat in clean]
        assert sum(a != t for a, t in zip(answers, true, strict=True)) == count
        assert sorted(answers) == sorted(true)


def test_equal_runs_share_a_folder_and_no_others(
    papers: Callable[[str], ModuleType], papers_settings: Any
) -> None:
    task = papers("task")
    one = task.run_folder(papers_settings, task.Variant(), 0)
    assert one == task.run_folder(
        papers_settings, task.Variant(steps=2), 0
    )  # the settings' own steps
    assert one == task.run_folder(
        replace(papers_settings, seeds=(5,), quick=False), task.Variant(), 0
    )
    others = [
        task.run_folder(papers_settings, variant, 0)
        for variant in (
            task.Variant(steps=3),
            task.Variant(quantize="nf4"),
            task.Variant(full=True),
            task.Variant(adapter=None, full=True),
            task.Variant(adapter=LoRAConfig(r=8)),
            task.Variant(lr=1e-3),
            task.Variant(train_on="all"),
            task.Variant(template="alpaca"),
            task.Variant(rows=10),
            task.Variant(wrong=0.5),
        )
    ]
    others += [
        task.run_folder(papers_settings, task.Variant(), 1),
        task.run_folder(replace(papers_settings, held_out=5), task.Variant(), 0),
        task.run_folder(replace(papers_settings, model=base_model_path()), task.Variant(), 0),
    ]
    assert len({one, *others}) == 1 + len(others)


@pytest.mark.parametrize("options", [{}, {"quantize": "nf4"}, {"adapter": None, "full": True}])
def test_a_run_is_trained_once_and_found_again(
    papers: Callable[[str], ModuleType],
    papers_settings: Any,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = papers("task")
    variant, trainings = task.Variant(**options), []
    train = task.train

    def counted(*args: Any, **kwargs: Any) -> Any:
        trainings.append(args)
        return train(*args, **kwargs)

    monkeypatch.setattr(task, "train", counted)
    made, found = (task.trained(papers_settings, variant, 0) for _ in range(2))
    assert len(trainings) == 1
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (made, found)]
        base = load_model(papers_settings.model, quantize=variant.quantize)(input_ids=ids).logits
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], base)  # two steps moved it
    assert not made.training
    assert not found.training
    # a score is read where it was found before
    first = task.score(papers_settings, variant, 0, exact=True, general=True)
    monkeypatch.setattr(task, "trained", None)
    assert task.score(papers_settings, variant, 0, exact=True, general=True) == first
    assert first.facts["steps"] == 2
    assert len(trainings) == 1


def test_a_score_is_that_of_the_held_out_answers(
    papers: Callable[[str], ModuleType], papers_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = papers("task")
    held = task.function_task(0, 4)[1]
    model, tok = load_model(papers_settings.model).eval(), load_tokenizer(papers_settings.model)
    total = count = 0.0
    for row in held:
        head = tok.encode_prompt(row["messages"][:1])
        ids = tok.encode(tok.render(row["messages"]))
        end = len(head) + len(tok.encode(row["messages"][1]["content"])) + 1  # <|im_end|>
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[t - 1, ids[t]]) for t in range(len(head), end))
        count += end - len(head)
    truth = [row["messages"][1]["content"] for row in held]
    written = [truth[0], truth[1] + "\n", truth[2] + "x", "no"]
    monkeypatch.setattr(task, "answers", lambda *_: written)
    found = task.score(papers_settings, task.BASE, 0, exact=True)
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert sum(found.tokens) == count
    assert found.exact == [True, True, False, False]
    assert found.exact_match == 0.5
    assert found.general is None
    assert math.isnan(task.score(papers_settings, task.BASE, 1).exact_match)


def test_general_text_in_bits_per_byte(
    papers: Callable[[str], ModuleType], papers_settings: Any
) -> None:
    task = papers("task")
    rows, sizes = task.general_windows(papers_settings)
    tok = load_tokenizer(papers_settings.model)
    graded = tok.decode([i for i in rows[1]["labels"] if i != -100])
    assert graded in papers_settings.text.read_text()
    assert sizes[1] == len(graded.encode())

    class Even(nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return Logits(torch.zeros(*input_ids.shape, 4096))

    found = task.general_losses(Even(), papers_settings)
    bits = 12 * found.tokens / sum(sizes)  # each token is one of 4096, so 12 bits
    assert found.bits_per_byte == pytest.approx(bits)


@dataclass
class Logits:
    logits: torch.Tensor
