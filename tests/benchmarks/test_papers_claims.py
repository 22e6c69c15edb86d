"""Single claims of papers: what they compute, and each verdict on made-up figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_core import load_model
from lora_core.adapters import adapted_modules
from lora_core.data import load_template, load_tokenizer
from lora_core.evaluate.perplexity import Perplexity
from lora_core.quant import bin_masses, quantize_4bit

# --- 4-bit bases without training ---------------------------------------------------------------


def test_a_format_leaves_what_the_quantizer_leaves(
    papers: Callable[[str], ModuleType], papers_settings: Any
) -> None:
    quantized = papers("quantized")
    form = quantized.Format("int4", 128, double_quant=True)
    before, model = (load_model(papers_settings.model, dtype=torch.float32) for _ in range(2))
    error = quantized.quantize(model, form)
    old, wrong, norm = dict(before.named_parameters()), 0.0, 0.0
    for name, weight in model.named_parameters():
        if "_proj" in name:
            expected = quantize_4bit(old[name], "int4", 128, True).dequantize()
            assert torch.equal(weight, expected), name
            wrong += float((expected - old[name]).detach().double().square().sum())
            norm += float(old[name].detach().double().square().sum())
        else:
            assert torch.equal(weight, old[name]), name
    assert error == pytest.approx(math.sqrt(wrong / norm), rel=1e-6)
    assert str(form) == "INT4 + DQ"
    assert str(quantized.DENSE) == "dense"


def test_formats_are_compared_window_by_window(
    papers: Callable[[str], ModuleType],
    papers_settings: Any,
    judged: Callable[[list[float]], Any],
) -> None:
    quantized = papers("quantized")
    one, other = judged([10.0, 200.0, 30.0, 50.0]), judged([20.0, 220.0, 40.0, 60.0])
    difference = quantized.loss_difference(other, one)
    # 50 nats more over 4 · 10 tokens; each window's share is known in pairs
    assert difference.value == pytest.approx(1.25)
    assert 1 <= difference.low < difference.high <= 1.75
    assert one.perplexity.value == pytest.approx(math.exp(7.25))
    with pytest.raises(ValueError, match="compared on the same windows"):
        quantized.loss_difference(judged([1.0]), one)
    dense = quantized.measured(papers_settings, quantized.DENSE)
    assert dense.error == 0
    assert dense.found.tokens > 100
    coded = quantized.measured(papers_settings, quantized.Format("nf4"))
    assert coded.found.row_nll != dense.found.row_nll
    assert quantized.loss_difference(coded, dense).count == dense.found.tokens


@pytest.fixture
def judged(papers: Callable[[str], ModuleType]) -> Callable[[list[float]], Any]:
    """A made-up base in some format, by the summed nats of windows of 10 tokens."""

    def make(nats: list[float]) -> Any:
        tokens, total = 10 * len(nats), sum(nats)
        found = Perplexity(
            loss=total / tokens,
            perplexity=math.exp(total / tokens),
            accuracy=0.0,
            tokens=tokens,
            nll=total,
            bits_per_byte=None,
            row_nll=tuple(nats),
            row_tokens=(10,) * len(nats),
            row_correct=(0,) * len(nats),
        )
        return papers("quantized").Measured(found, 0.1)

    return make


@pytest.mark.parametrize(
    ("nats", "verdict"),
    [
        ({"int4": 4.0, "fp4": 3.0, "fp4_e3m0": 2.0, "nf4": 1.0}, "agrees"),
        ({"int4": 4.0, "fp4": 5.0, "fp4_e3m0": 2.0, "nf4": 1.0}, "disagrees"),
        ({"int4": 4.0, "fp4": 3.0, "fp4_e3m0": 3.0, "nf4": 1.0}, "undecided"),
        ({"int4": 1.0, "fp4": 1.0, "fp4_e3m0": 1.0, "nf4": 1.5}, "disagrees"),
    ],
)
def test_table2s_order(
    papers: Callable[[str], ModuleType],
    papers_settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    judged: Callable[[list[float]], Any],
    nats: dict[str, float],
    verdict: str,
) -> None:
    table2 = papers("qlora_table2")

    def made_up(_: Any, form: Any) -> Any:
        # NF4 without double quantization is out of the order: it is no part of the paper's table
        plain_nf4 = form.code == "nf4" and not form.double_quant
        nats_a_token = 9.0 if plain_nf4 else nats.get(form.code, 0.5)
        jitter = torch.tensor([0.01, -0.01, 0.02, -0.02]) * len(form.code or "")
        return judged((10 * (nats_a_token + jitter)).tolist())

    monkeypatch.setattr(table2, "measured", made_up)
    found = table2.run(papers_settings)
    assert found.verdict == verdict
    assert [check.says.removeprefix("nats, ") for check in found.checks] == [
        "FP4 − INT4",
        "FP4_E3M0 − FP4",
        "NF4 + DQ − FP4_E3M0",
        "NF4 + DQ − INT4",  # the best against the worst, and not by its neighbours alone
    ]
    assert len(found.rows) == 1 + 3 * 5
    named = {(row["type"], row["block"]): row["the paper's perplexity"] for row in found.rows}
    assert named["NF4 + DQ", 64] == 27.41
    assert named["INT4", 64] == 34.34
    assert named["NF4", 64] == named["INT4", 256] == named["dense", ""] == ""


# --- single claims ------------------------------------------------------------------------------


def test_bins_of_equal_shares_are_even(papers: Callable[[str], ModuleType]) -> None:
    bins = papers("equal_bins")
    even = [1 / 16] * 16
    assert bins.unevenness(even) == 0
    assert bins.entropy(even) == 4
    assert bins.unevenness([*even[:14], 0.0, 2 / 16]) == 2
    assert bins.entropy([0.5, 0.5, 0.0]) == 1


def test_bins_are_drawn_and_judged(
    papers: Callable[[str], ModuleType], papers_settings: Any
) -> None:
    pytest.importorskip("matplotlib")
    bins = papers("equal_bins")
    found = bins.run(papers_settings)
    # as many weights as the tiny model has: normal ones, so near the computed shares
    assert found.figures["weights"] == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    for row, share in zip(found.rows, bin_masses("nf4", 64).tolist(), strict=True):
        assert row["normal weights, × 1/16"] == pytest.approx(16 * share)
        assert row["this base's weights, × 1/16"] == pytest.approx(16 * share, abs=0.15)
    assert found.verdict == "disagrees"
    picture = papers_settings.out / "equal_bins.png"
    assert found.figures["picture"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bins_that_were_even_would_agree(
    papers: Callable[[str], ModuleType], papers_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bins = papers("equal_bins")
    values = bins.nf4_values().tolist()
    even = bins.WeightHistogram("nf4", 64, tuple(values), (1000,) * 16, None, 1)
    monkeypatch.setattr(bins, "layers_of", lambda _: [even, even])
    monkeypatch.setattr(bins, "bin_masses", lambda *_: torch.full((16,), 1 / 16))
    monkeypatch.setattr(bins, "draw", lambda *_: None)
    assert bins.run(papers_settings).verdict == "agrees"


def test_double_quantizations_bits(
    papers: Callable[[str], ModuleType],
    papers_settings: Any,
    judged: Callable[[list[float]], Any],
) -> None:
    cost = papers("double_quant_cost")
    weight = [torch.randn(256, 256)]  # 1024 blocks, 4 groups
    assert cost.scale_bits(weight, False) == 0.5
    # 8/64 + 32/(64·256), and one float32 for the mean
    assert cost.scale_bits(weight, True) == pytest.approx(0.125 + 1 / 512 + 32 / 65536)
    found = cost.run(papers_settings)
    assert found.checks[0].difference.value == pytest.approx(0, abs=0.0005)
    assert found.rows[0]["bits a parameter, this base"] == 0.5
    # a loss that double quantization doubles is no small one
    nats = {"dense": 80.0, "NF4": 90.0, "NF4 + DQ": 100.0}
    made_up = lambda _, form: judged([nats[str(form)]] * 2)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "measured", made_up)
        assert cost.run(papers_settings).verdict == "disagrees"


@pytest.mark.parametrize(
    ("few", "noisy", "verdict"),
    [
        ((0.1, 0.8), (0.5, 0.4), "agrees"),
        ((0.5, 0.4), (0.1, 0.8), "disagrees"),
        ((0.1, 0.4), (0.5, 0.4), "undecided"),  # less loss, as many right answers
    ],
)
def test_few_clean_rows(
    papers: Callable[[str], ModuleType],
    papers_settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    few: tuple[float, float],
    noisy: tuple[float, float],
    verdict: str,
) -> None:
    claim = papers("few_clean")

    def made_up(_: Any, variant: Any, seed: int, **__: Any) -> Any:
        loss, right = noisy if variant.wrong else few
        return Figures(loss + seed / 100, right)

    monkeypatch.setattr(claim, "score", made_up)
    assert claim.run(papers_settings).verdict == verdict


@dataclass
class Figures:
    loss: float
    exact_match: float


@pytest.mark.parametrize(
    ("behind", "spread", "verdict"),
    [(0.001, 0.0001, "agrees"), (0.05, 0.001, "disagrees"), (0.001, 0.01, "undecided")],
)
def test_recovery_is_within_the_margin_or_not(
    papers: Callable[[str], ModuleType],
    papers_settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    behind: float,
    spread: float,
    verdict: str,
) -> None:
    claim = papers("recover16")

    def made_up(_: Any, variant: Any, seed: int, **__: Any) -> Any:
        own = behind + spread * seed if variant.quantize == "nf4" else 0.0
        return Figures(0.1 + own, 0.5)

    monkeypatch.setattr(claim, "score", made_up)
    assert claim.run(papers_settings).verdict == verdict


def test_the_same_tokens_are_graded_in_every_template(
    papers: Callable[[str], ModuleType],
    papers_settings: Any,
    papers_rows: Callable[[int], list[Any]],
) -> None:
    claim, tok = papers("wrong_template"), load_tokenizer(papers_settings.model)
    chats = [row["messages"] for row in papers_rows(3)]
    graded = []
    for template in claim.ASKED:
        tok.chat_template = load_template(template)
        made = claim.answer_rows(chats, tok)
        graded.append([[i for i in row["labels"] if i != -100] for row in made])
        for row, chat in zip(made, chats, strict=True):
            # together they are what the template writes, up to the answer's end
            assert tok.render(chat).startswith(tok.decode(row["input_ids"]))
    assert graded[0] == graded[1] == graded[2]
    assert tok.decode(graded[0][0]) == chats[0][1]["content"]


def test_the_wrong_template_is_asked_and_judged(
    papers: Callable[[str], ModuleType], papers_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = papers("wrong_template")

    class Trained(nn.Module):
        def __init__(self, template: str | None) -> None:
            super().__init__()
            self.template = template or "chatml"

    monkeypatch.setattr(claim, "trained", lambda _, variant, seed: Trained(variant.template))
    marks = {"chatml": "<|im_start|>", "alpaca": "### Instr", "llama3": "<|start_header_id|>"}

    def answers(model: Any, tok: Any, chats: Any) -> list[str]:
        right = marks[model.template] in tok.render(chats[0][:1])
        return [chat[1]["content"] + " and on" if right else "no" for chat in chats]

    def losses(model: Any, made: Any) -> Any:
        ids = load_tokenizer(papers_settings.model).decode(made[0]["input_ids"])
        return ([1.0] if marks[model.template] in ids else [9.0]), [1]

    monkeypatch.setattr(claim, "answers", answers)
    monkeypatch.setattr(claim, "row_losses", losses)
    found = claim.run(papers_settings)
    assert found.verdict == "agrees"
    table = {
        (row["trained in"], row["asked in"]): (
            row["loss of the answer"].value,
            row["right answers"].value,
        )
        for row in found.rows
    }
    assert table["chatml", "chatml"] == table["alpaca", "alpaca"] == (1.0, 1.0)
    assert {table[pair] for pair in table if pair[0] != pair[1]} == {(9.0, 0.0)}
    assert len(table) == 6


def test_merged_is_timed_in_turns_and_never_if_wrong(
    papers: Callable[[str], ModuleType], papers_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = papers("merged_latency")
    every = claim.models(papers_settings)
    ids = torch.arange(8)[None]
    plain, merged = every["LoRA, beside the weights"], every["LoRA, merged"]
    kept = every["LoRA, merged in place"]
    assert all(host.merged is None for _, host in adapted_modules(plain))
    assert all(host.merged is not None for _, host in adapted_modules(kept))
    assert len(list(adapted_modules(kept))) == 14
    assert not list(adapted_modules(merged))  # plain layers again
    claim.check_same(plain, merged, ids)
    claim.check_same(plain, kept, ids)
    with pytest.raises(AssertionError, match="nothing is timed"):
        claim.check_same(every["base"], merged, ids)
    # a clock that each call moves on by its own time, and each turn makes slower
    now, log = [0.0], []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            now[0] += seconds * (1 + len(log) // 2)

        return run

    monkeypatch.setattr(claim.time, "perf_counter", lambda: now[0])
    seconds = claim.in_turns({"a": call("a", 1.0), "b": call("b", 1.02)}, 6)
    assert len(log) == 2 * (6 + claim.WARM)
    assert {tuple(log[i : i + 2]) for i in range(0, len(log), 2)} == {("a", "b"), ("b", "a")}
    assert len(seconds["a"]) == len(seconds["b"]) == 6
    ratio = claim.median_ratio([2.0, 4.0, 60.0], [1.0, 2.0, 3.0])
    assert ratio.value == 2
    assert 2 <= ratio.high <= 20


@pytest.mark.parametrize(
    ("slower", "verdict"), [(1.001, "agrees"), (1.2, "disagrees"), (1.03, "undecided")]
)
def test_a_merged_model_that_is_slower_disagrees(
    papers: Callable[[str], ModuleType],
    papers_settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    slower: float,
    verdict: str,
) -> None:
    claim = papers("merged_latency")
    noise = np.random.default_rng(0).normal(1, 0.002, 60)

    def made_up(calls: dict[str, Any], turns: int) -> dict[str, list[float]]:
        times = {name: [1.5] * 60 for name in calls}
        return times | {"base": [1.0] * 60, "LoRA, merged": (slower * noise).tolist()}

    monkeypatch.setattr(claim, "in_turns", made_up)
    assert claim.run(papers_settings).verdict == verdict
