"""Penalties, filters and the draw: by definition, and what a row draws among others."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.models import CausalLM, Sampling, generate_ids, left_pad
from lora_core.models.sampling import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    uniforms,
)

Make = Callable[..., CausalLM]
SHARES = torch.tensor([[0.05, 0.5, 0.15, 0.3]])


def kept(logits: Tensor) -> set[int]:
    return set(logits[0].isfinite().nonzero()[:, 0].tolist())


def test_filters_by_hand() -> None:
    logits = SHARES.log()
    assert kept(keep_top_k(logits, 2)) == {1, 3}
    assert kept(keep_top_k(logits, 9)) == {0, 1, 2, 3}
    assert kept(keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)) == {1, 2, 3}  # a tie stays
    assert kept(keep_top_p(logits, 0.81)) == {1, 3, 2}
    assert kept(keep_top_p(logits, 0.79)) == {1, 3}
    assert kept(keep_min_p(logits, 0.29)) == {1, 2, 3}
    assert kept(keep_min_p(logits, 0.31)) == {1, 3}
    assert kept(keep_min_p(logits, 1.0)) == {1}
    for name, filtered in (("k", keep_top_k(logits, 3)), ("p", keep_top_p(logits, 0.9))):
        where = filtered.isfinite()
        assert torch.equal(filtered[where], logits[where]), name  # what stays, stays as it was


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(logits, seen, 1.6).tolist() == [[1.25, pytest.approx(-3.2), 1.0, -1.0]]


def test_filters_apply_one_after_the_other() -> None:
    # top-k leaves 1, 3, 2; of these renormalised 1 and 3 reach 0.8; 0.3 is half as likely as 0.5
    logits = SHARES.log()
    assert kept(Sampling(1.0, top_k=3, top_p=0.83).filtered(logits)) == {1, 3}
    assert kept(Sampling(1.0, top_p=0.83).filtered(logits)) == {1, 3, 2}
    # a higher temperature levels the shares before they are measured
    assert kept(Sampling(1.0, min_p=0.7).filtered(logits)) == {1}
    assert kept(Sampling(2.0, min_p=0.7).filtered(logits)) == {1, 3}


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_the_draw_is_the_inverse_of_the_cumulative_distribution(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(5, size) * 3
    logits[torch.rand(5, size) < 0.4] = -math.inf
    logits[:, 0] = 0.0
    uniform = torch.tensor([0.0, 0.3, 0.5, 0.9, 1 - 2.0**-23])
    got = draw(logits, uniform)
    total = logits.double().softmax(-1).cumsum(-1)
    for row, token in enumerate(got.tolist()):
        assert logits[row, token].isfinite()
        below = float(total[row, token - 1]) if token else 0.0
        assert below - 1e-6 <= float(uniform[row]) <= float(total[row, token]) + 1e-6


def test_the_smallest_number_is_the_first_token_that_can_be() -> None:
    shares = torch.tensor([[0.0, 0.25, 0.75]])
    assert draw(shares.log(), torch.zeros(1)).tolist() == [1]


def test_the_largest_number_never_falls_off_the_end() -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        logits = torch.randn(4, 1000)
        logits[:, -300:] = -math.inf
        assert int(draw(logits, torch.full((4,), 1 - 2.0**-23)).max()) < 700


def test_uniform_numbers_are_uniform_and_a_function_of_seed_row_and_step() -> None:
    numbers = uniforms(3, 40, 1000)
    assert numbers.shape == (40, 1000)
    assert 0 <= float(numbers.min()) < 1e-3 < 0.999 < float(numbers.max()) < 1
    # chi-square of 256 bins: mean 255, deviation 22.6
    counts = torch.histc(numbers, 256, 0, 1)
    assert abs(float(((counts - 156.25) ** 2 / 156.25).sum()) - 255) < 5 * 22.6
    flat = (numbers - 0.5) / (1 / 12) ** 0.5
    assert abs(float((flat[:, 1:] * flat[:, :-1]).mean())) < 5 / 40_000**0.5  # steps
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 5 / 40_000**0.5  # rows
    assert torch.equal(uniforms(3, 2, 7), numbers[:2, :7])
    assert not torch.equal(uniforms(4, 1, 7), numbers[:1, :7])
    alone = torch.cat([uniforms(seed, 1, 7) for seed in (5, 2**40, -1)])
    assert torch.equal(uniforms([5, 2**40, -1], 3, 7), alone)
    with pytest.raises(ValueError, match="one for each of 3 rows; got 2"):
        uniforms([1, 2], 3, 7)


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4), data=st.data())
def test_a_row_draws_the_same_whatever_the_others_are(
    make_model: Make, lengths: list[int], data: st.DataObject
) -> None:
    model = make_model(std=0.3)
    prompts = [torch.randint(97, (n,)).tolist() for n in lengths]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "repetition_penalty": 1.3}
    seeds = data.draw(st.lists(st.integers(0, 99), min_size=len(lengths), max_size=len(lengths)))
    together = generate_ids(model, *left_pad(prompts), seed=seeds, **options)
    alone = [
        generate_ids(model, torch.tensor([prompt]), seed=seed, **options)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert together == alone
    # under one seed a row's place counts, and not what else is there
    shared = generate_ids(model, *left_pad(prompts), seed=7, **options)
    other = [prompts[0], *([[1, 2, 3]] * (len(prompts) - 1))]
    assert generate_ids(model, *left_pad(other), seed=7, **options)[0] == shared[0]


def test_the_penalty_counts_prompt_and_answer_but_not_padding(make_model: Make) -> None:
    model = make_model(std=0.3)
    prompts = [[1, 2, 3, 4], [0]]
    rows = generate_ids(model, *left_pad(prompts), max_new_tokens=30, repetition_penalty=1e9)
    for prompt, row in zip(prompts, rows, strict=True):
        assert len({*prompt, *row}) == len({*prompt}) + 30  # nothing comes twice
    # the definition, a step at a time, with padding's id 5 among the tokens that may come
    text = [8]
    for _ in range(12):
        logits = model(torch.tensor([text])).logits[0, -1].clone()
        for token in set(text):
            logits[token] = logits[token] * 1.5 if logits[token] < 0 else logits[token] / 1.5
        text.append(int(logits.argmax()))
    batch = left_pad([[9, 9, 9, 9, 9], [8]], pad_id=5)
    found = generate_ids(model, *batch, max_new_tokens=12, repetition_penalty=1.5)
    assert found[1] == text[1:]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"min_p": 0.29}, {1, 2, 3}),
        ({"top_p": 0.6, "min_p": 0.2}, {1, 3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_options_reach_the_draw(
    make_model: Make, options: dict[str, Any], tokens: set[int]
) -> None:
    sampling = Sampling(temperature=1.0, **options)
    noise = uniforms(1, 4000, 1)[:, 0]
    found = Counter(sampling.choose(SHARES.log().repeat(4000, 1), None, noise).tolist())
    assert set(found) == tokens
    total = sum(float(SHARES[0, token]) for token in tokens)
    for token in tokens:
        share = float(SHARES[0, token]) / total
        assert abs(found[token] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    # and they reach it from outside
    model, ids = make_model(std=0.3), torch.tensor([[1, 2]])
    plain = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    one = generate_ids(model, ids, **plain, top_k=1)
    assert one == generate_ids(model, ids, **plain, min_p=1.0)
    assert one == generate_ids(model, ids, max_new_tokens=8)
    assert one != generate_ids(model, ids, **plain)


def test_options_out_of_range() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"top_k": 0}, "top_k must be at least 1, or None for all; got 0"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\]; got -0.1"),
        ({"min_p": 1.5}, r"min_p must lie in \[0, 1\]; got 1.5"),
        ({"repetition_penalty": 0.0}, r"above 0 \(1 is off\); got 0.0"),
        ({"repetition_penalty": math.inf}, r"above 0 \(1 is off\); got inf"),
        ({"temperature": math.inf}, "finite and not negative; got inf"),
        ({"top_p": math.nan}, r"top_p must lie in \(0, 1\]; got nan"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            Sampling(**options)


def test_what_is_no_number() -> None:
    for options, message in (
        ({"temperature": "a"}, "temperature must be a number; got 'a'"),
        ({"top_p": None}, "top_p must be a number; got None"),
        ({"top_k": 2.5}, "top_k must be a whole number; got 2.5"),
        ({"top_k": True}, "top_k must be a whole number; got True"),
    ):
        with pytest.raises(TypeError, match=message):
            Sampling(**options)  # type: ignore[arg-type]
    for seed in (1.5, "a", [1, 2.5]):
        with pytest.raises(TypeError, match="seed must be a whole number, or one a row; got"):
            uniforms(seed, 1, 3)  # type: ignore[arg-type]
    expected = uniforms(7, 1, 3)
    for whole in (torch.tensor(7), torch.tensor(7).numpy()[()], [torch.tensor(7)]):
        assert torch.equal(uniforms(whole, 1, 3), expected)  # type: ignore[arg-type]


def test_ids_of_another_whole_dtype(make_model: Make) -> None:
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 4, "repetition_penalty": 1.3}
    expected = generate_ids(model, ids, **options)
    assert generate_ids(model, ids.to(torch.int32), **options) == expected
    with pytest.raises(ValueError, match=r"max_new_tokens must be at least 1; got 2\.5"):
        generate_ids(model, ids, max_new_tokens=2.5)  # type: ignore[arg-type]
