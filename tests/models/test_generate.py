"""Generation: greedy by definition, sampling by its distribution, batches, stops, options."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.models import CausalLM, generate, generate_ids, left_pad

Make = Callable[..., CausalLM]


def greedy(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """The definition: the likeliest next token of the whole text, again and again."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


class FixedLogits(nn.Module):
    """A model whose next token never depends on the text."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


class Letters:
    """A tokenizer of one token a letter; `.` ends a text."""

    eos_ids = (26,)
    letters = "abcdefghijklmnopqrstuvwxyz."

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[i] for i in ids)

    def render(self, messages: Any, add_generation_prompt: bool = False) -> str:
        assert add_generation_prompt
        return "".join(message["content"] for message in messages)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), count=st.integers(1, 8))
def test_batch_is_its_rows_is_the_definition(
    make_model: Make, lengths: list[int], count: int
) -> None:
    model = make_model(std=0.3)
    prompts = [torch.randint(97, (n,)).tolist() for n in lengths]
    expected = [greedy(model, prompt, count) for prompt in prompts]
    assert generate_ids(model, *left_pad(prompts), max_new_tokens=count) == expected


def test_any_module_with_logits_runs_uncached(make_model: Make) -> None:
    class Bare(nn.Module):
        def __init__(self, model: CausalLM) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return self.model(input_ids, attention_mask)

    model = make_model(std=0.3)
    batch = left_pad([[5, 6, 7], [8]])
    found = generate_ids(Bare(model), *batch, max_new_tokens=9)
    assert found == generate_ids(model, *batch, max_new_tokens=9)


def test_rows_stop_by_themselves(make_model: Make) -> None:
    model = make_model(std=0.3)
    prompts = [[1, 2, 3], [4], [5, 6]]
    free = generate_ids(model, *left_pad(prompts), max_new_tokens=12)
    stop = {free[0][3], free[1][7]}
    cut = [row[: next((i + 1 for i, t in enumerate(row) if t in stop), None)] for row in free]
    assert cut != free
    assert generate_ids(model, *left_pad(prompts), max_new_tokens=12, eos_ids=stop) == cut


def test_sampling_follows_the_softmax_at_that_temperature() -> None:
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0])
    rows = generate_ids(
        FixedLogits(logits),
        torch.zeros(4000, 1, dtype=torch.long),
        max_new_tokens=1,
        temperature=0.7,
        seed=1,
    )
    counts = Counter(row[0] for row in rows)
    for token, p in enumerate((logits / 0.7).softmax(0).tolist()):
        assert abs(counts[token] - 4000 * p) < 5 * (4000 * p * (1 - p)) ** 0.5


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.91, {0, 1, 2}), (0.79, {0, 1}), (0.01, {0})]
)
def test_top_p_keeps_the_shortest_head_that_reaches_it(top_p: float, kept: set[int]) -> None:
    model = FixedLogits(torch.tensor([0.5, 0.3, 0.15, 0.05]).log())
    rows = generate_ids(
        model,
        torch.zeros(2000, 1, dtype=torch.long),
        max_new_tokens=1,
        temperature=1.0,
        top_p=top_p,
        seed=0,
    )
    assert {row[0] for row in rows} == kept


@pytest.mark.parametrize("temperature", [1e-8, 1e-40, 1e-310])
def test_the_lowest_temperatures_take_the_likeliest(temperature: float) -> None:
    model = FixedLogits(torch.tensor([60.0, 70.0, 80.0, -90.0]))
    ids = torch.zeros(20, 1, dtype=torch.long)
    rows = generate_ids(model, ids, max_new_tokens=1, temperature=temperature, seed=0)
    assert rows == [[2]] * 20


def test_seed_repeats_and_leaves_the_global_generator_alone(make_model: Make) -> None:
    model, ids = make_model(), torch.tensor([[1, 2]])
    before = torch.get_rng_state()
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0}
    runs = [generate_ids(model, ids, seed=seed, **options) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]
    torch.manual_seed(9)
    first = generate_ids(model, ids, **options)
    torch.manual_seed(9)
    assert generate_ids(model, ids, **options) == first


def test_modes_are_restored_also_after_an_error(make_model: Make) -> None:
    model = make_model(attention_dropout=0.5).train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    found = generate_ids(model, torch.tensor([[1]]), max_new_tokens=5)
    assert found == [greedy(model.eval(), [1], 5)]  # no dropout
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    with pytest.raises(IndexError):
        generate_ids(model, torch.tensor([[10_000]]))
    assert [module.training for module in model.modules()] == modes


def test_generate_text_and_messages(make_model: Make) -> None:
    model, tok = make_model(vocab_size=27, std=0.3), Letters()
    text = generate(model, tok, "hello", max_new_tokens=30)
    ids = generate_ids(model, torch.tensor([tok.encode("hello")]), max_new_tokens=30, eos_ids=[26])
    assert text == tok.decode(ids[0]).removesuffix(".")
    messages = [{"role": "user", "content": "hel"}, {"role": "user", "content": "lo"}]
    assert generate(model, tok, messages, max_new_tokens=30) == text
    assert generate(FixedLogits(torch.arange(27.0)), tok, "a") == ""  # ends at once
    sampled = [generate(model, tok, "a", temperature=1.0, top_p=0.9, seed=2) for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_left_pad_by_hand() -> None:
    ids, mask = left_pad([[5], [7, 8, 9]], pad_id=3)
    assert ids.tolist() == [[3, 3, 5], [7, 8, 9]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_wrong_arguments(make_model: Make) -> None:
    model, ids = make_model(), torch.tensor([[1, 2], [3, 4]])
    right = torch.tensor([[1, 0], [1, 1]])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": -1.0}, "temperature must be finite and not negative; got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite.*got nan"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"attention_mask": right}, "padded on the left"),
        ({"attention_mask": right[:1]}, r"input_ids' shape \(2, 2\); got \(1, 2\)"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            generate_ids(model, ids, **options)
    with pytest.raises(ValueError, match=r"\(B, T\) with T at least 1; got \(2, 0\)"):
        generate_ids(model, ids[:, :0])
    with pytest.raises(ValueError, match="takes no attention_mask"):
        generate_ids(FixedLogits(torch.zeros(9)), ids, torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        left_pad([[1], []])
    with pytest.raises(ValueError, match="there are no prompts"):
        left_pad([])
