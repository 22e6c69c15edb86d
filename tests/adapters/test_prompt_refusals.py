"""Where a prompt would silently be wrong: caches, pooled outputs, two models, scaled rows."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    PrefixTuningConfig,
    PromptTuningConfig,
    adapted_modules,
    add_adapter,
    disable_adapters,
)
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.cache import KVCache
from lora_core.models.decoder import ModelOutput
from lora_core.testing.bounds import exceeds, gamma

P = 3
PROMPT = PromptTuningConfig(P)


def decoder() -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = CausalLM(ModelConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None))
    model.init_weights(0.1)
    return model.eval()


def ids(batch: int = 2, tokens: int = 6) -> Tensor:
    return torch.randint(97, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


class Around(nn.Module):
    """A model around a decoder, whose embedding is its own too."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = decoder()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_params: object = None,
    ) -> Any:
        return self.lm(input_ids, attention_mask, inputs_embeds=inputs_embeds)

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.model.embed_tokens


# --- starts ---


class Scaled(nn.Embedding):
    """Rows times √C, as Gemma's."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) * math.sqrt(self.embedding_dim)


def test_a_start_is_what_the_embedding_gives() -> None:
    model, x = decoder(), ids()
    old = model.model.embed_tokens
    model.model.embed_tokens = Scaled(97, 32)
    model.model.embed_tokens.load_state_dict(old.state_dict())
    front = torch.tensor([5, 9, 11])
    by_hand = model(torch.cat([front.expand(2, -1), x], 1)).logits[:, P:]
    add_adapter(model, PromptTuningConfig(P, "text", token_ids=(5, 9, 11)))
    assert torch.equal(model(x).logits, by_hand)
    start = next(h for _, h in adapted_modules(model)).adapter("default").prompt
    assert not start.grad_fn


# --- two models with one embedding ---


@pytest.mark.parametrize("inner_first", [True, False])
@pytest.mark.parametrize("second", [PROMPT, PrefixTuningConfig(P, False)])
def test_one_prompt_would_go_in_twice(
    inner_first: bool, second: Any, state_of: Callable[[nn.Module], dict[str, object]]
) -> None:
    outer = Around()
    parts = (outer.lm, outer) if inner_first else (outer, outer.lm)
    add_adapter(parts[0], PROMPT, "a")
    y, before = outer(ids()).logits, state_of(outer)
    with refused("shares its embedding with a model around it or inside it, which has") as caught:
        add_adapter(parts[1], second, "b")
    assert "\n" not in str(caught.value)
    assert state_of(outer) == before
    add_adapter(parts[0], PROMPT, "b")
    assert outer(ids()).logits.shape == y.shape


# --- caches ---


def test_a_cache_without_the_prompt_is_refused() -> None:
    model, x = decoder(), ids(1, 6)
    add_adapter(model, PROMPT)
    cache = KVCache()
    with disable_adapters(model):
        model(x, cache=cache)
    message = "2 new tokens do not follow a cache of 6 positions, 3 of them the prompt's: fill"
    with refused(message) as caught:
        model(x[:, :2], torch.ones(1, 8), cache=cache)
    assert "\n" not in str(caught.value)
    with refused(message):  # no mask: the caller's positions tell
        model(x[:, :2], position_ids=torch.tensor([[6, 7]]), cache=cache)
    short = KVCache()
    with disable_adapters(model):
        model(x[:, :2], cache=short)
    with refused("a cache of 2 positions, 3 of them"):
        model(x, cache=short)
    for mask in (torch.ones(1, 5), torch.ones(1, 9)):  # no cache
        with refused("6 new tokens do not follow a cache of 0 positions"):
            model(x, mask)


def test_a_cache_with_the_prompt_goes_on() -> None:
    model, x = decoder(), ids(1, 6)
    add_adapter(model, PROMPT)
    for mask, positions in (
        (None, None),
        (None, torch.tensor([[4, 5]])),
        (torch.ones(1, 6), None),
        (torch.ones(1, 6), torch.tensor([[4, 5]])),
    ):
        cache = KVCache()
        model(x[:, :4], cache=cache)
        y = model(x[:, 4:], mask, positions, cache=cache).logits
        whole = model(x).logits[:, 4:]
        bound = torch.full_like(whole, gamma(2000) * whole.abs().max().item())
        assert exceeds(y, whole, bound) is None


@pytest.mark.parametrize("state", [{"use_cache": True}, {"cache_params": object()}])
def test_a_state_without_a_length_is_refused(state: dict[str, Any]) -> None:
    """A state space model's: whether the prompt is in it already cannot be seen."""
    model, x = Around(), ids()
    add_adapter(model, PROMPT)
    y = model(x).logits
    with refused(r"a prompt needs a cache with a length \(past_key_values\)") as caught:
        model(x, **state)
    assert "\n" not in str(caught.value)
    assert torch.equal(model(x, use_cache=False).logits, y)
    with disable_adapters(model):
        model(x, **state)


# --- outputs without positions ---


class Pooled(Around):
    """One answer a row, from the row's last token; a place that transformers finds in input_ids."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        y = self.lm(input_ids, attention_mask, inputs_embeds=inputs_embeds).logits[:, -1, :2]
        hidden = (torch.zeros(1, 9, 4),)
        forms = {
            "tensor": y,
            "tuple": (y, hidden),
            "dataclass": ModelOutput(y, None, hidden),
            "both": (torch.zeros(len(y), P + 6, 4), y),
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dataclass"])
def test_outputs_without_positions_are_refused(form: str) -> None:
    model, x = Pooled(form), ids()
    add_adapter(model, PROMPT)
    message = "a prompt needs logits and labels for every token; Pooled has others"
    with refused(message) as caught:
        model(x)
    assert "\n" not in str(caught.value)
    with refused(message):
        model(x, labels=torch.tensor([0, 1]))
    with disable_adapters(model):
        model(x)


def test_a_pooled_output_beside_one_with_positions_is_not() -> None:
    """BertModel's, for instance."""
    model = Pooled("both")
    add_adapter(model, PROMPT)
    hidden, pooled = model(ids())
    assert (hidden.shape, pooled.shape) == ((2, 6, 4), (2, 2))


# --- tables with rows before the first position ---


class Table(nn.Module):
    """A model that reports positions, from a table with two rows before the first (RoBERTa's)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 4), nn.Embedding(16, 4, padding_idx=1)
        self.config = type("Config", (), {"max_position_embeddings": 16})()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: object = None,
    ) -> Tensor:
        self.seen = position_ids
        return self.words(input_ids) if inputs_embeds is None else inputs_embeds

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def test_positions_begin_where_the_table_does() -> None:
    model, x = Table(), torch.tensor([[3, 4, 5]])
    add_adapter(model, PROMPT)
    model(x, torch.ones(1, 3))
    assert model.seen.tolist() == [[2, 3, 4, 5, 6, 7]]
    model(x, torch.tensor([[0, 1, 1]]))  # the padded column's place does not matter
    assert model.seen[0, [0, 1, 2, 4, 5]].tolist() == [2, 3, 4, 5, 6]
    model(x, position_ids=torch.tensor([[2, 3, 4]]))
    assert model.seen.tolist() == [[2, 3, 4, 5, 6, 7]]
    assert model(torch.full((1, 11), 3)).shape == (1, 11, 4)
    with refused("need 17 positions, the model has 16"):
        model(torch.full((1, 12), 3))
