"""Vectors of texts against each text's hidden states alone; cosines against a direct sum."""

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

from lora_core.checkpoint import load_model
from lora_core.data import load_tokenizer
from lora_core.evaluate.embedding import embed, embedding_similarity, similarity_rows

FAMILIES = ["bert", "roberta", "xlm-roberta"]
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.lists(st.sampled_from(["json", "a", "encoder", "linear"]), max_size=9).map(" ".join),
)


@pytest.fixture(scope="module")
def opened(encoder_folder: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    @cache
    def read(family: str) -> tuple[Any, Any]:
        return load_model(encoder_folder(family)), load_tokenizer(encoder_folder(family))

    return read


def alone(model: nn.Module, tok: Any, text: str, pooling: str, layer: int) -> Tensor:
    ids = tok.encode(text.strip(), add_special_tokens=True)
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    states = out.hidden_states[layer][0].double()
    return states[0] if pooling == "cls" else states.mean(0)


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=6),
    pooling=st.sampled_from(["mean", "cls"]),
    batch_size=st.integers(1, 4),
    layer=st.integers(0, 3),
    normalize=st.booleans(),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_each_text_alone(
    opened: Callable[[str], tuple[Any, Any]],
    family: str,
    texts: list[str],
    pooling: str,
    batch_size: int,
    layer: int,
    normalize: bool,
) -> None:
    model, tok = opened(family)
    options = {"batch_size": batch_size, "layer": layer, "normalize": normalize}
    found = embed(model, tok, texts, pooling, **options)
    truth = torch.stack([alone(model, tok, text, pooling, layer) for text in texts])
    truth = truth / truth.norm(dim=-1, keepdim=True) if normalize else truth
    assert (found.dtype, found.shape) == (torch.float32, truth.shape)
    assert not found.requires_grad
    assert (found.double() - truth).abs().max() < 1e-5 * truth.abs().max()


def test_the_last_layer_by_mean_unless_said(opened: Callable[[str], tuple[Any, Any]]) -> None:
    model, tok = opened("bert")
    assert torch.equal(
        embed(model, tok, ["json"]), embed(model, tok, ["json"], "mean", layer=3, normalize=False)
    )
    assert not torch.equal(embed(model, tok, ["json"]), embed(model, tok, ["json"], layer=2))


@given(
    rows=st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4)
)
def test_the_best_cosine_of_each_row(
    opened: Callable[[str], tuple[Any, Any]], rows: list[tuple[str, list[str]]]
) -> None:
    model, tok = opened("bert")
    predictions, references = [p for p, _ in rows], [r for _, r in rows]

    def cosine(one: str, other: str) -> float:
        if not (one.strip() and other.strip()):
            return 0.0
        x, y = (alone(model, tok, text, "mean", 3) for text in (one, other))
        return float(x @ y / x.norm() / y.norm())

    wanted = [max(cosine(p, text) for text in known) for p, known in rows]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rows have an empty text")
        found = similarity_rows(model, tok, predictions, references, batch_size=3)
        figure = embedding_similarity(model, tok, predictions, references)
    assert found == pytest.approx(wanted, abs=5e-6)
    assert figure.value == pytest.approx(sum(wanted) / len(rows), abs=5e-6)
    assert (figure.count, figure.unit) == (len(rows), "rows")


def test_the_same_text_is_like_itself(opened: Callable[[str], tuple[Any, Any]]) -> None:
    found = embedding_similarity(
        *opened("bert"), ["json a"] * 3, [["b"], ["b", "json a"], ["json a"]]
    )
    assert found.value > 0.7
    rows = similarity_rows(*opened("bert"), ["json a"] * 2, [["linear"], ["linear", " json a"]])
    assert rows[0] < 0.99 < rows[1]


def test_empty_texts_are_named(opened: Callable[[str], tuple[Any, Any]]) -> None:
    texts = ["", "json", "json"], [["json"], ["json", " "], ["json"]]
    with pytest.warns(UserWarning, match="2 rows have an empty text.*: rows 0, 1"):
        rows = similarity_rows(*opened("bert"), *texts)
    assert rows == pytest.approx([0, 1, 1], abs=1e-6)


def test_long_texts_are_cut(opened: Callable[[str], tuple[Any, Any]]) -> None:
    model, tok = opened("bert")
    texts = ["json " * 50, "json " * 60, "json"]
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than 36 tokens: cut"):
        found = embed(model, tok, texts)
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_what_cannot_be_embedded(
    opened: Callable[[str], tuple[Any, Any]], small_decoder: Callable[..., nn.Module]
) -> None:
    model, tok = opened("bert")
    with pytest.raises(ValueError, match="texts is empty"):
        embed(model, tok, [])
    with pytest.raises(TypeError, match="texts must be a list of strings; got the string 'json'"):
        embed(model, tok, "json")
    with pytest.raises(ValueError, match="pooling must be one of mean, cls; got 'max'"):
        embed(model, tok, ["a"], "max")
    with pytest.raises(ValueError, match=r"embedded by an encoder .*; got CausalLM"):
        embed(small_decoder(), tok, ["a"])
    with pytest.raises(ValueError, match="layer must be 0"):
        embed(model, tok, ["a"], layer=4)
    with pytest.raises(ValueError, match="predictions is empty"):
        embedding_similarity(model, tok, [], [])
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string"):
        embed(model, tok, ["a", None])


def test_nan_is_no_vector(opened: Callable[[str], tuple[Any, Any]], encoder_folder: Any) -> None:
    model, tok = load_model(encoder_folder("bert")), opened("bert")[1]
    with torch.no_grad():
        model.encoder.layer[2].output.dense.bias[0] = float("nan")
    with pytest.raises(ValueError, match="the encoder's layer 3 gives NaN"):
        embed(model, tok, ["json"])
    with torch.no_grad():  # what stands in the padding alone is no fault
        model.encoder.layer[2].output.dense.bias[0] = 0
    assert embed(model, tok, ["json", "a json encoder"]).isfinite().all()
