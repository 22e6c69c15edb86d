"""BERTScore by its definition, token by token, and what it says of empty, long and odd text."""

import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, add_adapter, disable_adapters
from lora_core.checkpoint import load_model
from lora_core.data import load_tokenizer
from lora_core.evaluate.bertscore import bert_score, default_layer

WORDS = ["json", "encoder", "linear", "layer", "[SEP]", "naïve", "日本", "a"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
ROWS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def opened(encoder_folder: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    @cache
    def read(family: str) -> tuple[Any, Any]:
        return load_model(encoder_folder(family)), load_tokenizer(encoder_folder(family))

    return read


def by_hand(
    model: nn.Module, tok: Any, candidate: str, reference: str, layer: int, weigh: dict[int, float]
) -> tuple[float, float, float]:
    """One pair, each text alone in its batch, in float64."""
    sides, weights = [], []
    for text in (candidate, reference):
        ids = tok.encode(text, add_special_tokens=True)
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        x = out.hidden_states[layer][0].double()
        sides.append(x / x.norm(dim=1, keepdim=True))
        weights.append([0.0 if i in (ids[0], ids[-1]) else weigh.get(i, 1.0) for i in ids])

    def one_way(mine: Tensor, other: Tensor, w: list[float]) -> float:
        best = [float((other @ token).max()) for token in mine]
        return sum(x * y for x, y in zip(best, w, strict=True)) / sum(w) if sum(w) else 0.0

    p = one_way(sides[0], sides[1], weights[0])
    r = one_way(sides[1], sides[0], weights[1])
    return p, r, 2 * p * r / (p + r) if p + r else 0.0


@given(rows=ROWS, layer=st.integers(0, 3), idf=st.booleans(), batch_size=st.integers(1, 4))
def test_by_its_definition(
    opened: Callable[[str], tuple[Any, Any]],
    rows: list[tuple[str, list[str]]],
    layer: int,
    idf: bool,
    batch_size: int,
) -> None:
    model, tok = opened("bert")
    flat = [text for _, known in rows for text in known]
    weigh = {}
    for i in range(tok.vocab_size if idf else 0):
        held = sum(i in tok.encode(text) for text in flat)
        weigh[i] = math.log((len(flat) + 1) / (held + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have weight 0|.*empty")
        found = bert_score(
            model,
            tok,
            [candidate for candidate, _ in rows],
            [known for _, known in rows],
            layer=layer,
            idf=idf,
            batch_size=batch_size,
        )
    assert (found.layer, found.idf, found.truncated, found.empty) == (layer, idf, 0, ())
    for mine, (candidate, known) in zip(found.rows, rows, strict=True):
        pairs = [by_hand(model, tok, candidate, text, layer, weigh) for text in known]
        assert mine == pytest.approx([max(column) for column in zip(*pairs, strict=True)], abs=5e-6)
    assert list(found.estimates()) == [
        "bertscore_precision",
        "bertscore_recall",
        "bertscore_f1",
    ]
    assert found.estimates()["bertscore_f1"] == found.f1
    assert found.f1.value == pytest.approx(sum(row[2] for row in found.rows) / len(rows))


def test_the_same_text_scores_one(opened: Callable[[str], tuple[Any, Any]]) -> None:
    found = bert_score(
        *opened("roberta"), ["json encoder", " a layer\n"], [["json encoder"], ["a layer"]]
    )
    for row in found.rows:
        assert row == pytest.approx((1, 1, 1), abs=1e-6)


def test_a_baseline_spreads_scores(opened: Callable[[str], tuple[Any, Any]]) -> None:
    texts = ["json encoder"], [["a layer"]]
    plain = bert_score(*opened("bert"), *texts).rows[0]
    one = bert_score(*opened("bert"), *texts, baseline=0.3).rows[0]
    assert one == pytest.approx([(x - 0.3) / 0.7 for x in plain])
    three = bert_score(*opened("bert"), *texts, baseline=(0.1, 0.2, 0.3)).rows[0]
    assert three == pytest.approx(
        [(x - b) / (1 - b) for x, b in zip(plain, (0.1, 0.2, 0.3), strict=True)]
    )


def test_empty_texts_score_nothing_and_are_named(opened: Callable[[str], tuple[Any, Any]]) -> None:
    candidates = ["json", "", " \n", "a layer", ""]
    references = [["json"], ["json"], ["", "a"], ["", "a layer"], [""]]
    with pytest.warns(UserWarning, match="4 rows have an empty .*: rows 1, 2, 3, 4"):
        found = bert_score(*opened("bert"), candidates, references)
    assert found.empty == (1, 2, 3, 4)
    assert [round(row[2], 5) for row in found.rows] == [1, 0, 0, 1, 0]
    assert found.f1.count == 5


def test_nothing_but_tokens_that_every_reference_has(
    opened: Callable[[str], tuple[Any, Any]],
) -> None:
    with pytest.warns(
        UserWarning, match="1 rows have a text whose tokens all have weight 0.* rows 0"
    ):
        found = bert_score(*opened("bert"), ["a", "json layer"], [["a"], ["a json"]], idf=True)
    assert found.weightless == (0,)
    assert found.rows[0] == (0, 0, 0)
    assert found.rows[1][2] > 0


def test_long_texts_are_cut_and_counted(opened: Callable[[str], tuple[Any, Any]]) -> None:
    model, tok = opened("bert")
    long = "a json " * 40
    found = bert_score(model, tok, [long, "a"], [[long + "encoder"], ["a"]])
    assert found.truncated == 2
    assert found.rows[0] == pytest.approx((1, 1, 1), abs=1e-6)  # the same first 36 tokens
    exact = " ".join(["a"] * 36)
    assert bert_score(model, tok, [exact], [["a"]]).truncated == 0
    assert bert_score(model, tok, [exact + " a"], [["a"]]).truncated == 1


def test_an_adapter_counts_and_modes_stay(
    opened: Callable[[str], tuple[Any, Any]], encoder_folder: Any, shake: Any
) -> None:
    model, tok = load_model(encoder_folder("bert")), opened("bert")[1]
    texts = ["json encoder"], [["the linear layer"]]
    plain = bert_score(model, tok, *texts).rows
    add_adapter(model, LoRAConfig(r=2, targets="all-linear"))
    shake(model)
    model.train()
    assert bert_score(model, tok, *texts).rows == bert_score(model, tok, *texts).rows  # no dropout
    assert bert_score(model, tok, *texts).rows != plain
    assert model.training
    with disable_adapters(model):
        assert bert_score(model, tok, *texts).rows == plain


def test_a_head_is_passed_over(
    opened: Callable[[str], tuple[Any, Any]], encoder_folder: Any
) -> None:
    texts = ["json encoder"], [["the linear layer"]]
    with pytest.warns(UserWarning, match="made anew"):
        headed = load_model(encoder_folder("bert"), head="sequence", num_labels=3)
    tok = opened("bert")[1]
    assert bert_score(headed, tok, *texts).rows == bert_score(*opened("bert"), *texts).rows


@pytest.mark.parametrize(
    ("family", "layers", "layer"),
    [
        ("bert", 12, 9),
        ("roberta", 24, 17),
        ("roberta", 12, 10),
        ("camembert", 12, 9),
        ("bert", 1, 1),
    ],
)
def test_the_layer_of_an_encoder(family: str, layers: int, layer: int) -> None:
    assert default_layer(family, layers) == layer


def test_what_cannot_be_scored(
    opened: Callable[[str], tuple[Any, Any]], small_decoder: Callable[..., nn.Module]
) -> None:
    model, tok = opened("bert")
    one = ["a"], [["a"]]
    with pytest.raises(ValueError, match=r"embedded by an encoder .*; got CausalLM: load such"):
        bert_score(small_decoder(), tok, *one)
    with pytest.raises(ValueError, match=r"layer must be 0 .* 3 for this encoder; got 4"):
        bert_score(model, tok, *one, layer=4)
    with pytest.raises(ValueError, match="layer must be 0"):
        bert_score(model, tok, [""], [[""]], layer=-1)
    with pytest.raises(ValueError, match="batch_size must be 1 or more; got 0"):
        bert_score(model, tok, *one, batch_size=0)
    for baseline in (1.0, (0.1, 0.2), (0.1, 0.2, 1.5)):
        with pytest.raises(ValueError, match="baseline must be a number below 1, or three"):
            bert_score(model, tok, *one, baseline=baseline)
    with pytest.raises(ValueError, match="predictions is empty"):
        bert_score(model, tok, [], [])
    with pytest.raises(ValueError, match="1 predictions and references for 2 rows"):
        bert_score(model, tok, ["a"], [["a"], ["b"]])
    with pytest.raises(TypeError, match="references"):
        bert_score(model, tok, ["a"], ["a"])
    with pytest.raises(ValueError, match=r"references\[0\]"):
        bert_score(model, tok, ["a"], [[]])


def test_another_tokenizer_is_refused(
    opened: Callable[[str], tuple[Any, Any]], tokenizer_folder: Path
) -> None:
    with pytest.raises(ValueError, match="400"):
        bert_score(opened("bert")[0], load_tokenizer(tokenizer_folder), ["a"], [["a"]])


def test_nan_is_no_score(opened: Callable[[str], tuple[Any, Any]], encoder_folder: Any) -> None:
    model, tok = load_model(encoder_folder("bert")), opened("bert")[1]
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[0] = float("nan")
    texts = ["json encoder"], [["the layer"]]
    with pytest.raises(ValueError, match="the encoder's layer 2 gives NaN"):
        bert_score(model, tok, *texts, layer=2)
    assert bert_score(model, tok, *texts, layer=1).f1.value > 0
