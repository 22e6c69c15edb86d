"""Metrics by name: what they give, what they need, and figures that are compared pairwise."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import load_tokenizer
from lora_core.evaluate.answers import Answer
from lora_core.evaluate.bertscore import bert_score
from lora_core.evaluate.bleu import bleu
from lora_core.evaluate.diversity import distinct, repetition
from lora_core.evaluate.embedding import embedding_similarity
from lora_core.evaluate.estimate import Estimate, paired_difference, ratio
from lora_core.evaluate.figures import (
    Figure,
    difference,
    differences,
    of_perplexity,
    of_ratio,
    of_scores,
)
from lora_core.evaluate.metrics import (
    METRICS,
    Encoder,
    check_metrics,
    check_references,
    measure,
    metric_figures,
)
from lora_core.evaluate.perplexity import Perplexity
from lora_core.evaluate.rouge import rouge
from lora_core.evaluate.squad import exact_match, f1_score
from lora_core.models import EncoderConfig, build_model

TEXTUAL = [name for name, metric in METRICS.items() if not metric.encoder]
SAID = ["the cat sat on the mat", "", "a dog", "b b b b b b", "the cat sat on the mat today"]
RIGHT = [("the cat sat on a mat",), ("",), ("The dog!", "a cat"), ("c",), ("it sat", "on it")]


def answers(
    texts: Sequence[str] = SAID, references: Sequence[tuple[str, ...]] = RIGHT
) -> list[Answer]:
    return [
        Answer(str(i), "asked", text, known, f"q.jsonl:{i + 1}")
        for i, (text, known) in enumerate(zip(texts, references, strict=True))
    ]


@pytest.fixture(scope="module")
def encoder(tokenizer_folder: Path) -> Encoder:
    """2 random layers of 32; a tokenizer that puts nothing around a text."""
    torch.manual_seed(0)
    model = build_model(EncoderConfig(400, 32, 48, 2, 4, max_position_embeddings=64))
    model.init_weights(0.2)
    return model.eval(), load_tokenizer(tokenizer_folder)


def test_each_figure_is_that_of_its_own_function(encoder: Encoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows with empty texts are named
        found = measure(answers(), list(METRICS), encoder)
        wanted = {
            "exact_match": exact_match(SAID, RIGHT),
            "f1": f1_score(SAID, RIGHT),
            "bleu": bleu(SAID, RIGHT).estimate,
            **{kind: made.f1 for kind, made in rouge(SAID, RIGHT).items()},
            "distinct_1": distinct(SAID, 1),
            "distinct_2": distinct(SAID, 2),
            "repetition_4": repetition(SAID, 4),
            **bert_score(*encoder, SAID, RIGHT).estimates(),
            "embedding_similarity": embedding_similarity(*encoder, SAID, RIGHT),
        }
    assert list(found) == [*wanted, "empty_answers"]
    for name, estimate in wanted.items():
        assert found[name] == estimate, name
    assert (found["empty_answers"].value, found["empty_answers"].count) == (0.2, 5)


LONG = st.text(st.characters(codec="utf-8"), max_size=40) | st.builds(
    lambda word, often: word * often,
    st.sampled_from(["x ", "the cat ", "é", "\n", "🙂 "]),
    st.integers(0, 300),
)


@given(st.lists(st.tuples(LONG, st.lists(LONG, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_a_figure_of_all_rows_is_its_estimate(rows: list[tuple[str, list[str]]]) -> None:
    """Any text at all: no crash, and the function that differences use agrees with the estimate."""
    asked = answers([text for text, _ in rows], [tuple(known) for _, known in rows])
    for name, figure in metric_figures(asked, TEXTUAL).items():
        value = figure.on(np.arange(len(rows)))
        assert value == pytest.approx(figure.estimate.value, rel=1e-12, nan_ok=True), name
        assert figure.rows == len(rows)


def test_white_space_alone_is_an_empty_answer() -> None:
    asked = answers(["", " \n", "x"], [("x",)] * 3)
    assert measure(asked, ["exact"])["empty_answers"].value == pytest.approx(2 / 3)


def test_empty_answers_alone_are_measured(encoder: Encoder) -> None:
    asked = answers(["", ""], [("x",), ("y",)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure(asked, list(METRICS), encoder)
    assert found["empty_answers"].value == 1
    assert found["exact_match"].value == found["bertscore_f1"].value == 0
    assert found["embedding_similarity"].value == 0
    assert math.isnan(found["distinct_1"].value)
    assert math.isnan(found["repetition_4"].value)


# --- what is needed ---


def test_a_row_without_references_is_named() -> None:
    asked = answers(["a", "b", "c"], [("a",), (), ()])
    message = (
        r"^q\.jsonl:2: metric f1 compares with references, and this row has none \(2 of 3 rows "
        "have none\\): add them, or leave the metric out$"
    )
    with pytest.raises(ValueError, match=message):
        measure(asked, ["distinct", "f1", "bleu"])
    assert set(measure(asked, ["distinct", "repetition"])) > {"distinct_1", "repetition_4"}
    check_references(asked, ["distinct"])


@pytest.mark.parametrize(
    ("names", "encoder", "message"),
    [
        ([], False, "no metric is named; there are exact, f1"),
        (["bertscor"], True, r"no metric 'bertscor' \(there are .*\); did you mean bertscore\?"),
        (["zzz"], True, r"no metric 'zzz' \(there are exact.*embedding\)$"),
        (["f1", "f1"], False, "metric 'f1' is named twice"),
        (["f1", "bertscore"], False, "bertscore needs an encoder's folder: give --encoder DIR"),
        (["embedding"], False, "embedding needs an encoder's folder"),
        (["f1"], True, "no metric of f1 needs an encoder"),
    ],
)
def test_names_are_strict(names: list[str], encoder: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metrics(names, encoder=encoder)


def test_no_answers() -> None:
    with pytest.raises(ValueError, match="there are no answers to measure"):
        measure([], ["exact"])


# --- differences ---


def test_the_difference_of_means_is_that_of_the_pairs() -> None:
    after, before = [0.1, 0.5, 0.9, 0.2], [0.0, 0.7, 0.3, 0.1]
    found = difference(of_scores(after), of_scores(before))
    wanted = paired_difference(after, before)
    for name in ("value", "low", "high", "count"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-12), name


def test_the_difference_of_ratios_is_not_the_mean_of_row_differences() -> None:
    tokens = [1, 99]
    after, before = of_ratio([1, 0], tokens, "tokens"), of_ratio([0, 0], tokens, "tokens")
    assert difference(after, before).value == pytest.approx(0.01)
    assert after.estimate == ratio([1, 0], tokens, unit="tokens")


def test_equal_models_do_not_differ() -> None:
    one, two = (metric_figures(answers(), TEXTUAL) for _ in range(2))
    for name, found in differences(one, two).items():
        assert found.value == 0, name
        assert (found.low, found.high) == (0, 0), name


def test_less_varied_answers_are_seen() -> None:
    """40 different answers against the same one 40 times: the interval is far from 0."""
    varied = [f"word{i} thing{i} is number{i}" for i in range(40)]
    same = ["this is the one answer"] * 40
    none = [()] * 40
    one, two = (metric_figures(answers(t, none), ["distinct"]) for t in (same, varied))
    for name in ("distinct_1", "distinct_2"):
        found = difference(one[name], two[name])
        assert found.high < -0.5, name
        assert found.value == one[name].estimate.value - two[name].estimate.value
        assert found.method == "jackknife"


def test_the_jackknife_of_a_mean_is_the_normal_interval() -> None:
    """Of a mean the jackknife's variance is s²/n, exactly."""
    rows = np.array([0.3, 0.1, 0.8, 0.4, 0.9])
    jackknife = label("jackknife")
    zero = Figure(jackknife, 5, lambda draw: 0.0)
    found = difference(Figure(jackknife, 5, lambda draw: float(rows[draw].mean())), zero)
    half = 1.959963984540054 * rows.std(ddof=1) / math.sqrt(5)
    assert found.value == pytest.approx(rows.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half)


def test_rows_without_a_score_are_left_out() -> None:
    """A resample may hold none of the rows that have a score: it says nothing."""
    after, before = of_scores([1.0, math.nan], label()), of_scores([0.0, math.nan], label())
    found = difference(after, before)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def label(method: str = "bootstrap") -> Estimate:
    return Estimate(0, 5, 0, 0, method=method)


def test_one_row_has_no_interval() -> None:
    for name, found in differences(
        *(metric_figures(answers(["a b"], [("a",)]), TEXTUAL) for _ in range(2))
    ).items():
        assert math.isnan(found.low), name


def test_rows_must_pair() -> None:
    with pytest.raises(ValueError, match="pairs need as many rows of each; got 1 and 2"):
        difference(of_scores([1.0]), of_scores([1.0, 2.0]))


def test_figures_of_a_perplexity() -> None:
    made: Callable[..., Perplexity] = lambda scale, **more: Perplexity(  # noqa: E731
        loss=scale * 0.8,
        perplexity=math.exp(scale * 0.8),
        accuracy=0.5,
        tokens=5,
        nll=scale * 4.0,
        bits_per_byte=None,
        row_nll=(scale * 1.0, scale * 3.0),
        row_tokens=(2, 3),
        row_correct=(1, 2),
        **more,
    )
    found = of_perplexity(made(1.0))
    assert set(found) == {"loss", "perplexity", "accuracy"}
    moved: dict[str, Any] = differences(of_perplexity(made(2.0)), found)
    assert moved["loss"].value == pytest.approx(0.8)
    assert moved["perplexity"].value == pytest.approx(math.exp(1.6) - math.exp(0.8))
    assert moved["accuracy"].value == 0
    bits = of_perplexity(made(1.0, row_bytes=(4, 6)))["bits_per_byte"]
    assert bits.estimate.value == pytest.approx(4 / math.log(2) / 10)
    assert bits.on(np.array([1])) == pytest.approx(3 / math.log(2) / 6)
