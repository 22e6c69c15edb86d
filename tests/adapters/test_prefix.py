"""Prefix tuning: attention over [prefix; text] written out, masks, packing, recomputed layers."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import PrefixTuningConfig, adapted_modules, add_adapter, set_adapters
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.cache import KVCache
from lora_core.testing.bounds import exceeds, gamma
from lora_core.train.recompute import recomputed_layers

EXACT = 2.0**-53
P = 3
FLAT = PrefixTuningConfig(P, projection=False, std=1.0)
NETWORK = PrefixTuningConfig(P, projection=True, hidden=5)


def decoder(**changes: Any) -> CausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**{"vocab_size": 97, **sizes, **heads, **ends, **changes}))
    model.init_weights(0.1)
    return model.eval()


def ids(batch: int = 2, tokens: int = 6) -> Tensor:
    return torch.randint(97, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def at(model: nn.Module, name: str = "default") -> list[Any]:
    """The site at the embedding, then those of the layers."""
    return [h.adapter(name) for _, h in adapted_modules(model) if name in h.adapters]


def widened(model: nn.Module) -> nn.Module:
    model.double()
    for p in model.parameters():
        p.data = p.data.double()
    return model


def close(got: Tensor, wanted: Tensor, n: int = 4000) -> None:
    """Equal to n float64 roundings of the largest value: another order of the same sums."""
    assert got.dtype == wanted.dtype == torch.float64
    bound = torch.full_like(wanted, gamma(n, EXACT) * wanted.abs().max().item())
    wrong = exceeds(got, wanted, bound)
    assert wrong is None, wrong


# --- the formula ---


def turned(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions, pair by pair: x (T, H, D)."""
    out, half = x.clone(), x.shape[-1] // 2
    # frequencies and angles are float32 in the model, whatever its dtype
    frequency = 1.0 / theta ** (torch.arange(half).float() * 2 / x.shape[-1])
    for t, position in enumerate(positions):
        angle = position.float() * frequency
        c, s = angle.cos().double(), angle.sin().double()
        a, b = x[t, :, :half], x[t, :, half:]
        out[t, :, :half], out[t, :, half:] = a * c - b * s, b * c + a * s
    return out


def written_attention(attention: Any, x: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    """softmax(q [P_K; K]ᵀ / √D) [P_V; V] for one row x (T, C), head by head and query by query."""
    tokens, positions = len(x), torch.arange(start, start + len(x))
    q, k, v = (
        (x @ proj.weight.T).view(tokens, -1, attention.head_dim)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = turned(q, positions), turned(k, positions)
    rows = []
    for t in range(tokens):
        heads = []
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            keys = torch.cat([key[:, group], k[: t + 1, group]])
            values = torch.cat([value[:, group], v[: t + 1, group]])
            weights = torch.softmax(keys @ q[t, head] / math.sqrt(attention.head_dim), 0)
            heads.append(weights @ values)
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ attention.o_proj.weight.T


def written_states(layer: Any, shared: Any) -> tuple[Tensor, Tensor]:
    if layer.up is None:
        return layer.key, layer.value
    h = torch.tanh(shared.inputs @ shared.hidden.weight.T + shared.hidden.bias)
    both = h @ layer.up.weight.T + layer.up.bias
    half = both.shape[1] // 2
    return both[:, :half].view(P, 2, 8), both[:, half:].view(P, 2, 8)


def written(model: Any, bare: Any, row: Tensor) -> Tensor:
    """Logits (T, V) of one row: the whole decoder, its attention written out."""
    shared, *layers = at(model)
    x = bare.model.embed_tokens(row)
    for layer, prefix in zip(bare.model.layers, layers, strict=True):
        states = written_states(prefix, shared)
        x = x + written_attention(layer.self_attn, layer.input_layernorm(x), *states, P)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return bare.lm_head(bare.model.norm(x))


@pytest.mark.parametrize("config", [FLAT, NETWORK], ids=["flat", "network"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_and_gradients_are_the_formula(config: PrefixTuningConfig, tokens: int) -> None:
    model, x = decoder(), ids(2, tokens)
    bare = widened(copy.deepcopy(model))
    add_adapter(model, config)
    model = widened(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    toward = torch.randn(2, tokens, 97, dtype=torch.float64)
    by_hand = torch.stack([written(model, bare, row) for row in x])
    got = model(x).logits
    close(got, by_hand)
    wanted = torch.autograd.grad((by_hand * toward).sum(), parameters)
    found = torch.autograd.grad((got * toward).sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
        assert b.abs().max() > 0


def test_two_prefixes_are_one_longer_one() -> None:
    model, x = decoder(), ids()
    add_adapter(model, FLAT, "a")
    add_adapter(model, PrefixTuningConfig(2, False, std=1.0), "b")
    set_adapters(model, ["a", "b"])
    one = decoder()
    add_adapter(one, PrefixTuningConfig(P + 2, False))
    model, one = widened(model), widened(one)
    for layer, a, b in zip(at(one)[1:], at(model, "a")[1:], at(model, "b")[1:], strict=True):
        layer.key.data = torch.cat([a.key, b.key]).data
        layer.value.data = torch.cat([a.value, b.value]).data
    close(model(x).logits, one(x).logits)
    set_adapters(model, ["b", "a"])
    close(model(x).logits, one(x).logits)


def test_the_real_cache_holds_the_text_alone() -> None:
    model, x = decoder(), ids()
    add_adapter(model, FLAT)
    cache = KVCache()
    model(x, cache=cache)
    assert cache.length == 6
    key, _ = cache._layers[0]
    assert cache._lengths == {0: 6, 1: 6}
    assert key.shape[0] == 2


# --- packing ---


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3), network=st.booleans())
def test_every_document_of_a_packed_row_sees_the_prefix(lengths: list[int], network: bool) -> None:
    model = decoder()
    add_adapter(model, NETWORK if network else FLAT)
    model = widened(model)
    texts = [ids(1, n) for n in lengths]
    documents = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    with torch.no_grad():
        together = model(torch.cat(texts, 1), document_ids=documents).logits
        close(together, torch.cat([model(text).logits for text in texts], 1))
        falling = model(torch.cat(texts, 1), document_ids=9 - documents).logits
        assert torch.equal(falling, together)


# --- recomputed layers ---


@pytest.mark.parametrize("config", [FLAT, NETWORK], ids=["flat", "network"])
@pytest.mark.parametrize("way", ["own", "recomputed_layers"])
@pytest.mark.parametrize("padded", [False, True])
def test_activation_checkpointing_leaves_gradients(
    config: PrefixTuningConfig, way: str, padded: bool
) -> None:
    model, x = decoder().train(), ids()
    add_adapter(model, config)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    call = {"attention_mask": mask} if padded else {}

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x, labels=x, **call).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.model.layers[0].self_attn.register_forward_hook(count)
    if way == "own":
        model.gradient_checkpointing = True
        again = gradients()
    else:
        with recomputed_layers(model):
            again = gradients()
    assert runs == 2  # once, and once more in backward
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(g.abs().max() > 0 for g in plain)


# --- starts ---


def test_starts() -> None:
    model = decoder()
    add_adapter(model, PrefixTuningConfig(200, False), "normal")
    _, first, _ = at(model, "normal")
    # 3200 normal numbers: their deviation is 0.02 to six of its own deviations
    assert abs(first.key.std().item() - 0.02) < 6 * 0.02 / 6400**0.5
    add_adapter(model, PrefixTuningConfig(P, False, init="zeros"), "zeros")
    add_adapter(model, PrefixTuningConfig(P, init="zeros"), "network")
    for name in ("zeros", "network"):
        shared, *layers = at(model, name)
        assert all(not s.any() for layer in layers for s in layer.states())
    assert shared.hidden.out_features == 512
    assert shared.inputs.any()


def test_zero_keys_still_take_their_share_of_attention() -> None:
    """A prefix of zeros is no identity: it is P values of zero that every query looks at."""
    model, x = decoder(), ids()
    before = model(x).logits
    add_adapter(model, PrefixTuningConfig(P, False, init="zeros"))
    assert not torch.equal(model(x).logits, before)


def test_flat_zeros_stay_equal_and_the_network_parts_them() -> None:
    """All virtual tokens of a flat prefix of zeros get one gradient, at every step."""
    for config, parted in (
        (PrefixTuningConfig(P, False, init="zeros"), False),
        (PrefixTuningConfig(P, hidden=5, init="zeros"), True),
    ):
        model, x = decoder(), ids()
        add_adapter(model, config)
        for _ in range(3):
            model(x, labels=x).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad)
                        p.grad = None
        key, value = at(model)[1].states()
        assert key.any()
        assert value.any()
        assert torch.equal(value[0], value[1]) != parted


# --- what it is attached to ---


def test_sites() -> None:
    report = add_adapter(decoder(), FLAT)
    layers = tuple(f"model.layers.{i}.self_attn" for i in range(2))
    assert report.sites == ("model.embed_tokens", *layers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixTuningConfig(0), "num_virtual_tokens must be a whole number, 1 or more"),
        (lambda: PrefixTuningConfig(2, init="uniform"), "init must be one of 'normal', 'zeros'"),
        (
            lambda: PrefixTuningConfig(2, False, 4),
            "hidden is the network's width: a flat prefix has none",
        ),
        (lambda: PrefixTuningConfig(2, True, 0), "hidden must be a whole number, 1 or more"),
        (lambda: PrefixTuningConfig(2, std=-1.0), "std must be a finite number, 0 or more; got -1"),
        (lambda: PrefixTuningConfig(2, std=math.nan), "std must be a finite number"),
    ],
)
def test_values_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


class NoAttention(nn.Module):
    """A language model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        return self.embed(input_ids)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


class Uneven(NoAttention):
    """Two attention modules with different heads."""

    def __init__(self) -> None:
        super().__init__()
        models = [decoder(), decoder(num_key_value_heads=4)]
        self.layers = nn.ModuleList(model.model.layers[0].self_attn for model in models)


class NoPositions(NoAttention):
    """Attention that a prefix fits, in a model whose positions cannot be moved (BART's decoder)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = decoder().model.layers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NoPositions, "NoPositions.forward takes no position_ids: use PromptTuningConfig"),
        (NoAttention, r"takes a mask and a cache \(past_key_values\); NoAttention has none"),
        (Uneven, "the same key/value heads in every layer; this model has 2 × 8, 4 × 8"),
        (lambda: nn.Linear(2, 2), r"with get_input_embeddings\(\); Linear has none"),
    ],
)
def test_models_it_does_not_fit(
    make: Callable[[], nn.Module],
    message: str,
    state_of: Callable[[nn.Module], dict[str, object]],
) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        add_adapter(model, FLAT)
    assert "\n" not in str(caught.value)
    assert state_of(model) == before
    assert not model._forward_pre_hooks


def test_masks_that_cannot_be_made_wider_are_refused() -> None:
    model = decoder()
    add_adapter(model, FLAT)
    attention = model.model.layers[0].self_attn
    x, rotary = torch.zeros(1, 2, 32), (torch.ones(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))
    with pytest.raises(ValueError, match=r"a prefix needs attention with a dense mask") as caught:
        attention(x, rotary, "a block mask", None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("causal", [True, False])
def test_no_mask_is_made_for_attention_that_looks_both_ways(causal: bool) -> None:
    model = decoder()
    add_adapter(model, FLAT)
    prefix = at(model)[1]
    prefix.call = dataclasses.replace(prefix.call, causal=causal)
    seen: list[Any] = []

    def base(x: Tensor, rotary: Any, mask: Tensor | None, cache: Any) -> None:
        states = torch.zeros(1, 2, 4, 8)  # two more than this call's
        seen.extend([mask, *cache.update(0, states, states)])

    prefix.replace(base, (torch.zeros(1, 2, 32), None, None, None), {})
    mask, key, value = seen
    assert (mask is None) != causal
    assert key.shape == value.shape == (1, 2, P + (2 if causal else 4), 8)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_masks_of_every_kind_are_made_wider(kind: torch.dtype) -> None:
    """The module called by itself: added to the scores, or True and 1 where a query may look."""
    model = decoder()
    add_adapter(model, FLAT)
    prefix = at(model)[1]
    seen: list[Tensor] = []

    def base(x: Tensor, rotary: Any, mask: Tensor, cache: Any) -> None:
        seen.append(mask)

    mask = torch.tensor([[1, 0], [1, 1]], dtype=kind)[None, None]
    prefix.replace(base, (torch.zeros(1, 2, 32), None, mask, None), {})
    front = 0 if kind == torch.float32 else 1
    assert seen[0].dtype == kind
    assert torch.equal(seen[0][..., P:], mask)
    assert (seen[0][..., :P] == front).all()
