"""The Kneser–Ney model that the base model is measured against: by its definition, slowly."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def _load() -> ModuleType:
    """The benchmark by its file: the repository's root is not on the path of a test run."""
    file = Path(__file__).parents[2] / "benchmarks" / "base_model.py"
    spec = importlib.util.spec_from_file_location("benchmarks_base_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = _load()
STREAMS = st.lists(st.integers(0, 4), min_size=12, max_size=60)


def slow_probability(
    train: Sequence[int], history: Sequence[int], token: int, order: int, vocabulary: int
) -> float:
    """Chen and Goodman's equations 24 to 26, by dictionaries and recursion over the orders."""
    raw = [
        Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
        for n in range(1, order + 1)
    ]
    result = 1.0 / vocabulary
    for n in range(1, order + 1):
        counts: Counter[tuple[int, ...]] = raw[n - 1]
        if n < order:  # how many different tokens stand before each n-gram
            counts = Counter(gram[1:] for gram in raw[n])
        context = tuple(history[len(history) - n + 1 :])
        if len(context) < n - 1:
            break
        d = bench.discounts(np.array([counts.get(gram, 0) for gram in raw[n - 1]]))
        following = {
            gram[-1]: count for gram, count in counts.items() if gram[:-1] == context and count
        }
        if context and context not in raw[n - 2]:
            break
        total = sum(following.values())
        if not total:
            continue  # the context ends the text: all mass goes to the order below
        left = sum(d[min(count, 3)] for count in following.values()) / total
        own = following.get(token, 0)
        result = max(own - d[min(own, 3)], 0) / total + left * result
    return result


@given(train=STREAMS, test=STREAMS, order=st.integers(2, 4))
def test_probabilities_are_those_of_the_definition(
    train: list[int], test: list[int], order: int
) -> None:
    found = bench.KneserNey(np.array(train), 5, order).probabilities(np.array(test))
    wanted = [
        slow_probability(train, test[max(0, i - order + 1) : i], test[i], order, 5)
        for i in range(1, len(test))
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@given(train=STREAMS, history=st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_probabilities_sum_to_one_after_any_history(train: list[int], history: list[int]) -> None:
    model = bench.KneserNey(np.array(train), 5, 4)
    total = sum(model.probabilities(np.array([*history, word]))[-1] for word in range(5))
    assert total == pytest.approx(1, abs=1e-12)


def test_the_discounts_are_the_published_formula() -> None:
    counts = np.repeat([1, 2, 3, 4, 7], [50, 20, 10, 6, 3])
    y = 50 / (50 + 2 * 20)
    wanted = [0, 1 - 2 * y * 20 / 50, 2 - 3 * y * 10 / 20, 3 - 4 * y * 6 / 10]
    assert bench.discounts(counts) == pytest.approx(wanted)
    # none seen four times: one discount for all
    assert bench.discounts(np.array([1, 1, 2, 3])) == pytest.approx([0, 0.5, 0.5, 0.5])


def test_a_model_that_does_not_sum_to_one_is_refused() -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 60)
    model = bench.KneserNey(tokens, 5, 3)
    bench.check_sums(model, tokens)
    level = model._levels[0]
    model._levels[0] = bench.Level(level.keys, level.discounted * 1.001, level.left_over)
    with pytest.raises(AssertionError, match="sum to"):
        bench.check_sums(model, tokens)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be 2 or more; got 1"):
        bench.KneserNey(np.arange(9), 9, 1)
    with pytest.raises(ValueError, match="3 tokens are too few for n-grams of 5"):
        bench.KneserNey(np.arange(3), 9, 5)
