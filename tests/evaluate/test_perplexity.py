"""Perplexity against a direct computation, over rows and over batches of any size."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.data import collate
from lora_core.evaluate import Perplexity, perplexity

VOCABULARY = 11


class Bigram(nn.Module):
    """Logits of the next token from the last one alone, with dropout that has to be off."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.dropout(self.table(input_ids)))


def make_rows(seed: int, count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (1,), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        masked = int(torch.randint(0, length, (1,), generator=generator))
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


def direct(model: Bigram, rows: list[dict[str, list[int]]]) -> tuple[float, int, int]:
    nll, tokens, correct = 0.0, 0, 0
    for row in rows:
        for before, label in zip(row["input_ids"], row["labels"][1:], strict=False):
            if label != -100:
                logp = model.table.weight[before].detach().double().log_softmax(0)
                nll, tokens = nll - float(logp[label]), tokens + 1
                correct += int(logp.argmax()) == label
    return nll, tokens, correct


def by_row(model: Bigram, rows: list[dict[str, list[int]]]) -> list[tuple[float, int, int]]:
    return [direct(model, [row]) for row in rows]


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_equals_a_direct_computation(seed: int, count: int, batch_size: int) -> None:
    torch.manual_seed(seed)
    model, rows = Bigram(), make_rows(seed, count)
    nll, tokens, correct = direct(model, rows)
    model.train()
    found = perplexity(model, rows, batch_size=batch_size, graded_bytes=123)
    assert model.training
    assert (found.tokens, found.accuracy) == (tokens, correct / tokens)
    # each token's loss is rounded once to float32; losses here stay below 16
    assert found.nll == pytest.approx(nll, abs=tokens * 16 * torch.finfo(torch.float32).eps)
    assert found.loss == found.nll / tokens
    assert found.perplexity == math.exp(found.loss)
    assert found.bits_per_byte == pytest.approx(found.nll / 123 / 0.6931471805599453, rel=1e-12)


def test_batches_pass_through_and_the_cut_does_not_matter() -> None:
    model, rows = Bigram(), make_rows(0, 8)
    by_row = perplexity(model, rows, batch_size=1)
    batches = [collate(rows[:5]), collate(rows[5:])]
    assert perplexity(model, batches).loss == pytest.approx(by_row.loss, rel=1e-12)
    assert by_row.bits_per_byte is None
    # a mean of the batches' means would be another number
    means = [perplexity(model, [batch]).loss for batch in batches]
    assert abs(sum(means) / 2 - by_row.loss) > 1e-4


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_sums_of_rows_and_their_intervals(seed: int, count: int, batch_size: int) -> None:
    torch.manual_seed(seed)
    model, rows = Bigram(), make_rows(seed, count)
    said = [{**row, "graded_bytes": 2 + i % 3} for i, row in enumerate(rows)]
    found = perplexity(model, said, batch_size=batch_size)
    for mine, (nll, tokens, correct) in zip(
        zip(found.row_nll, found.row_tokens, found.row_correct, strict=True),
        by_row(model, rows),
        strict=True,
    ):
        assert mine[0] == pytest.approx(nll, abs=9 * 16 * torch.finfo(torch.float32).eps)
        assert mine[1:] == (tokens, correct)
    assert found.row_bytes == tuple(2 + i % 3 for i in range(count))
    assert found.graded_bytes == sum(found.row_bytes)
    estimates = found.estimates()
    assert list(estimates) == ["loss", "perplexity", "accuracy", "bits_per_byte"]
    for name, estimate in estimates.items():
        assert estimate.value == pytest.approx(getattr(found, name), rel=1e-13)
        assert estimate.count == (found.graded_bytes if "byte" in name else found.tokens)
        assert estimate.unit == ("bytes" if "byte" in name else "tokens")
        if count == 1:  # one row has no interval
            assert math.isnan(estimate.low)
        else:
            assert estimate.low <= estimate.value * (1 + 1e-12)
            assert estimate.high >= estimate.value * (1 - 1e-12)


def test_rows_are_resampled_whole() -> None:
    """Two kinds of rows: the interval spans what rows can give, tokens alone would not."""
    model = Bigram()
    nn.init.zeros_(model.table.weight)
    with torch.no_grad():
        model.table.weight[1, 1] = 100.0
    sure, unsure = {"input_ids": [1] * 50}, {"input_ids": [2] * 50}
    rows = [{**row, "labels": row["input_ids"]} for row in (sure, unsure, sure, unsure)]
    loss = perplexity(model, rows).estimates()["loss"]
    uniform = math.log(VOCABULARY)
    assert loss.value == pytest.approx(uniform / 2, rel=1e-6)
    # a row of one kind four times over has probability 1/16, within the outer 5 %
    assert (loss.low, loss.high) == (pytest.approx(0, abs=1e-6), pytest.approx(uniform, rel=1e-6))


def test_bytes_in_sum_alone() -> None:
    found = perplexity(Bigram(), make_rows(1, 6), graded_bytes=77)
    assert found.row_bytes is None
    bits, loss = (found.estimates()[name] for name in ("bits_per_byte", "loss"))
    assert bits.value == pytest.approx(found.bits_per_byte, rel=1e-13)
    scale = found.tokens / 77 / math.log(2)
    assert (bits.low, bits.high) == pytest.approx((loss.low * scale, loss.high * scale), rel=1e-12)


def test_few_rows_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lora_core.evaluate.perplexity"]
    model, rows = Bigram(), make_rows(5, 9)
    whole = perplexity(model, rows, batch_size=9)
    sizes, inner = [], module.token_cross_entropy
    monkeypatch.setattr(
        module, "token_cross_entropy", lambda x, y: sizes.append(len(x)) or inner(x, y)
    )
    longest = max(len(row["input_ids"]) for row in rows)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 2 * longest * VOCABULARY)
    assert perplexity(model, rows, batch_size=9) == whole
    assert sizes == [2, 2, 2, 2, 1]


def test_bytes_that_contradict() -> None:
    rows = make_rows(0, 2)
    said = [{**row, "graded_bytes": 3} for row in rows]
    with pytest.raises(ValueError, match="the rows say their graded_bytes themselves"):
        perplexity(Bigram(), said, graded_bytes=6)
    for batch_size, got in ((1, r"\[3\]"), (2, r"\[3, -1\]")):
        with pytest.raises(ValueError, match=rf"got {got} for the first of 2 rows"):
            perplexity(Bigram(), [said[0], rows[1]], batch_size=batch_size)
    with pytest.raises(ValueError, match=r"above 0 in one; got \[0, 0\]"):
        perplexity(Bigram(), [{**row, "graded_bytes": 0} for row in rows])
    with pytest.raises(ValueError, match="intervals need each row's sums"):
        Perplexity(1.0, 2.0, 0.5, 3, 3.0, None).estimates()


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    model = Bigram()
    nn.init.zeros_(model.table.weight)
    with torch.no_grad():
        model.table.weight[:, 0] = 5000.0
    found = perplexity(model, [{"input_ids": [1, 2], "labels": [-100, 2]}])
    assert found.perplexity == math.inf
    assert found.loss == 5000


def test_nothing_to_judge() -> None:
    with pytest.raises(ValueError, match="no token of the data is graded, so it has no perplexity"):
        perplexity(Bigram(), [{"input_ids": [1, 2], "labels": [-100, -100]}])
    with pytest.raises(ValueError, match="graded_bytes must be 1 or more; got 0"):
        perplexity(Bigram(), make_rows(0, 1), graded_bytes=0)


def test_what_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match=r"needs input_ids and labels; got \['text'\]"):
        perplexity(Bigram(), [{"text": "a"}])
    with pytest.raises(ValueError, match="batch_size must be 1 or more; got 0"):
        perplexity(Bigram(), make_rows(0, 2), batch_size=0)


def test_a_nan_is_no_perplexity() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the loss over 2 graded tokens is NaN"):
        perplexity(model, [{"input_ids": [1, 3, 2], "labels": [1, 3, 2]}])


def test_every_module_keeps_its_mode() -> None:
    model = Bigram().train()
    model.table.eval()
    perplexity(model, make_rows(0, 2))
    assert (model.training, model.dropout.training, model.table.training) == (True, True, False)
