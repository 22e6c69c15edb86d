"""Prompt tuning and P-tuning: by hand, in a model's call, beside other adapters, errors."""

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    active_names,
    adapted_modules,
    adapter_rows,
    add_adapter,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
)
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.cache import KVCache
from lora_core.models.generate import generate_ids, left_pad
from lora_core.quant import quantize_model
from lora_core.testing.bounds import exceeds, gamma

EXACT = 2.0**-53  # unit roundoff of float64, in which both sides of a formula are computed
P = 3
KINDS = {
    "prompt": PromptTuningConfig(P),
    "mlp": PTuningConfig(P, hidden=5),
    "lstm": PTuningConfig(P, "lstm", hidden=5),
    "prefix": PrefixTuningConfig(P, projection=False, std=1.0),
    "network": PrefixTuningConfig(P, projection=True, hidden=5),
}
IN_FRONT = ["prompt", "mlp", "lstm"]


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


def adapter(model: nn.Module, name: str = "default") -> Any:
    """What is at the embedding."""
    return next(h for _, h in adapted_modules(model) if name in h.adapters).adapter(name)


def widened(model: nn.Module) -> nn.Module:
    """The model and its adapters' parameters in float64, so that formulas can be told apart."""
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


def hooks(model: nn.Module) -> list[Any]:
    every = [(*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for m in model.modules()]
    return [known for some in every for known in some]


# --- the formulas ---


@pytest.mark.parametrize("kind", IN_FRONT)
def test_virtual_tokens_stand_in_front_of_the_text(kind: str) -> None:
    model, x = decoder(), ids()
    bare = copy.deepcopy(model)
    add_adapter(model, KINDS[kind])
    front = adapter(model).embeddings().expand(2, -1, -1)
    y = model(x, labels=x, output_hidden_states=True)
    whole = torch.cat([front, bare.model.embed_tokens(x)], 1)
    labels = torch.cat([torch.full((2, P), -100), x], 1)
    by_hand = bare(inputs_embeds=whole, labels=labels, output_hidden_states=True)
    assert torch.equal(y.logits, by_hand.logits[:, P:])
    assert torch.equal(y.loss, by_hand.loss)
    for got, wanted in zip(y.hidden_states, by_hand.hidden_states, strict=True):
        assert torch.equal(got, wanted[:, P:])
    embedded = bare.model.embed_tokens(x)
    assert torch.equal(model(inputs_embeds=embedded).logits, y.logits)
    assert torch.equal(model(x, torch.ones_like(x)).logits, y.logits)
    assert torch.equal(model(x, None, torch.arange(6)[None]).logits, y.logits)
    y = widened(model)(x).logits
    for keep in (1, 2, 6, 8):
        close(model(x, logits_to_keep=keep).logits, y[:, -keep:])


def written_mlp(prompt: Any) -> Tensor:
    one, _, two, _, three = prompt.mlp
    h = torch.relu(prompt.inputs @ one.weight.T + one.bias)
    h = torch.relu(h @ two.weight.T + two.bias)
    return h @ three.weight.T + three.bias


def written_lstm(prompt: Any) -> Tensor:
    """Two bidirectional layers, gate by gate, and the head."""
    sequence = list(prompt.inputs)
    for layer in range(2):
        outputs: list[list[Tensor]] = []
        for suffix in ("", "_reverse"):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w, u, b, c = (getattr(prompt.lstm, f"{n}_l{layer}{suffix}") for n in names)
            h = cell = torch.zeros(5, dtype=w.dtype)
            states = []
            for x in sequence if not suffix else sequence[::-1]:
                i, f, g, o = (w @ x + b + u @ h + c).chunk(4)
                cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(cell)
                states.append(h)
            outputs.append(states if not suffix else states[::-1])
        sequence = [torch.cat(both) for both in zip(*outputs, strict=True)]
    one, _, two = prompt.mlp
    h = torch.relu(torch.stack(sequence) @ one.weight.T + one.bias)
    return h @ two.weight.T + two.bias


@pytest.mark.parametrize(("kind", "written"), [("mlp", written_mlp), ("lstm", written_lstm)])
def test_encoders_are_the_formulas(kind: str, written: Callable[[Any], Tensor]) -> None:
    model = decoder()
    add_adapter(model, KINDS[kind])
    prompt = adapter(widened(model))
    close(prompt.embeddings(), written(prompt))
    parameters = list(prompt.parameters())
    toward = torch.randn(P, 32, dtype=torch.float64)
    got = torch.autograd.grad((prompt.embeddings() * toward).sum(), parameters)
    wanted = torch.autograd.grad((written(prompt) * toward).sum(), parameters)
    for a, b in zip(got, wanted, strict=True):
        close(a, b)
        assert b.abs().max() > 0


@pytest.mark.parametrize("kind", IN_FRONT)
def test_gradients_are_those_of_a_longer_input(kind: str) -> None:
    model, x = decoder(), ids()
    bare = widened(copy.deepcopy(model))
    add_adapter(model, KINDS[kind])
    model = widened(model)
    prompt, toward = adapter(model), torch.randn(2, 6, 97, dtype=torch.float64)
    got = torch.autograd.grad((model(x).logits * toward).sum(), list(prompt.parameters()))
    whole = torch.cat([prompt.embeddings().expand(2, -1, -1), bare.model.embed_tokens(x)], 1)
    by_hand = bare(inputs_embeds=whole).logits[:, P:]
    wanted = torch.autograd.grad((by_hand * toward).sum(), list(prompt.parameters()))
    for a, b in zip(got, wanted, strict=True):
        close(a, b)
        assert b.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("prompt", 3 * 32),
        ("mlp", 3 * 32 + 2 * 5 * 32 + 5**2 + 2 * 5 + 32),
        (
            "lstm",
            3 * 32 + 8 * 5 * (32 + 5 + 2) + 8 * 5 * (3 * 5 + 2) + 4 * 25 + 10 + 2 * 5 * 32 + 32,
        ),
        ("prefix", 3 * 2 * 2 * 2 * 8),
        ("network", 3 * 32 + 5 * 32 + 5 + 2 * 2 * 2 * 8 * (5 + 1)),
    ],
)
def test_parameter_counts(kind: str, count: int) -> None:
    report = add_adapter(decoder(), KINDS[kind])
    assert (report.parameters, report.trainable) == (count, count)


# --- starts ---


def test_starts() -> None:
    model = decoder()
    table = model.model.embed_tokens.weight
    add_adapter(model, PromptTuningConfig(40, "random"), "random")
    start = adapter(model, "random").prompt
    assert start.abs().max() <= 0.5
    # 1280 uniform numbers: their standard deviation is 1/sqrt(12) to six of its own deviations
    assert abs(start.std().item() - 12**-0.5) < 6 * 0.13 / 1280**0.5
    add_adapter(model, PromptTuningConfig(9, vocabulary=10), "vocabulary")
    rows = adapter(model, "vocabulary").prompt
    at = [(table[:10] == row).all(1).nonzero().item() for row in rows]
    assert len(set(at)) == 9
    for count, wanted in ((2, [5, 6]), (3, [5, 6, 7]), (7, [5, 6, 7, 5, 6, 7, 5])):
        config = PromptTuningConfig(count, "text", token_ids=(5, 6, 7))
        add_adapter(model, config, f"text{count}")
        assert torch.equal(adapter(model, f"text{count}").prompt, table[wanted])


def test_a_text_is_encoded_once_and_the_tokenizer_is_not_kept() -> None:
    class Tok:
        def encode(self, text: str) -> list[int]:
            return [ord(c) - 97 for c in text]

    config = PromptTuningConfig(4, "text", "abc", tokenizer=Tok())
    assert config.token_ids == (0, 1, 2)
    assert "Tok" not in repr(config)
    assert config == PromptTuningConfig(4, "text", "abc", token_ids=(0, 1, 2))
    assert pickle.loads(pickle.dumps(config)) == config


def test_dropout_between_lstm_layers_is_for_training() -> None:
    model = decoder()
    add_adapter(model, PTuningConfig(P, "lstm", hidden=5, dropout=0.5))
    prompt = adapter(model)
    assert torch.equal(prompt.embeddings(), prompt.embeddings())
    model.train()
    assert not torch.equal(prompt.embeddings(), prompt.embeddings())


# --- the call ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 1), (2, 6)])
def test_disabled_is_the_base_and_every_parameter_learns(
    kind: str, shape: tuple[int, int], same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    model, x = decoder(), ids(*shape)
    before = model(x).logits
    frozen = dict(model.named_parameters())
    add_adapter(model, KINDS[kind])
    y = model(x).logits
    assert y.shape == before.shape
    assert not torch.equal(y, before)
    with disable_adapters(model):
        assert same_bits(model(x).logits, before)
    y.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.abs().max() > 0 for p in trained)
    assert all(p.grad is None for p in frozen.values())
    set_adapters(model, [])
    assert same_bits(model(x).logits, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", ["delete", "unload"])
def test_nothing_is_left_when_it_goes(kind: str, leave: str) -> None:
    model, x = decoder(), ids()
    before, modules = model(x).logits, [(n, id(m)) for n, m in model.named_modules()]
    add_adapter(model, KINDS[kind])
    add_adapter(model, KINDS[kind], "second")
    assert len(hooks(model)) == 2
    if leave == "delete":
        delete_adapter(model, "default")
        assert len(hooks(model)) == 2
        delete_adapter(model, "second")
    else:
        unload_adapters(model)
    assert hooks(model) == []
    assert not model._forward_pre_hooks_with_kwargs
    assert not model._forward_hooks_with_kwargs
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("kind", KINDS)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_padded_rows_are_their_own(kind: str, lengths: list[int]) -> None:
    model = decoder()
    add_adapter(model, KINDS[kind])
    model = widened(model)
    rows = [ids(1, length)[0].tolist() for length in lengths]
    x, mask = left_pad(rows)
    with torch.no_grad():
        together = model(x, attention_mask=mask).logits
        for row, wanted in enumerate(rows):
            close(together[row, -len(wanted) :], model(torch.tensor([wanted])).logits[0])


@pytest.mark.parametrize("kind", KINDS)
@given(cut=st.integers(1, 5), padded=st.booleans())
def test_cached_is_uncached(kind: str, cut: int, padded: bool) -> None:
    model, x = decoder(), ids(2, 6)
    add_adapter(model, KINDS[kind])
    model = widened(model)
    mask = torch.ones_like(x)
    mask[0, : int(padded)] = 0
    given_mask = mask if padded else None
    with torch.no_grad():
        whole = model(x, given_mask).logits
        cache = KVCache(4)
        first = model(x[:, :cut], None if given_mask is None else mask[:, :cut], cache=cache)
        rest = model(x[:, cut:], given_mask, cache=cache)
        again = torch.cat([first.logits, rest.logits], 1)
        close(again[mask.bool()], whole[mask.bool()])
        # one by one, as text is generated, and with positions that the caller counts
        cache, steps = KVCache(4), []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for t in range(6):
            call = {"attention_mask": mask[:, : t + 1], "position_ids": positions[:, t : t + 1]}
            steps.append(model(x[:, t : t + 1], cache=cache, **call).logits)
        close(torch.cat(steps, 1)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("kind", IN_FRONT)
def test_embeddings_after_a_cache_are_the_callers_own(kind: str) -> None:
    model, x = decoder(), ids(2, 9)
    embedded = model.model.embed_tokens(x)
    add_adapter(model, KINDS[kind])
    whole, cache = model(x).logits, KVCache()
    first = model(x[:, :3], cache=cache).logits
    rest = model(inputs_embeds=embedded[:, 3:], cache=cache).logits
    assert (first.shape, rest.shape) == ((2, 3, 97), (2, 6, 97))
    bound = torch.full_like(whole, gamma(2000) * whole.abs().max().item())
    assert exceeds(torch.cat([first, rest], 1), whole, bound) is None


@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind: str) -> None:
    model = decoder()
    add_adapter(model, KINDS[kind])
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    found = generate_ids(model, *left_pad(rows), max_new_tokens=5)
    for row, new in zip(rows, found, strict=True):
        text = list(row)
        for _ in range(5):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert text[len(row) :] == new
        assert generate_ids(model, torch.tensor([row]), max_new_tokens=5) == [new]
    with disable_adapters(model):
        assert generate_ids(model, *left_pad(rows), max_new_tokens=5) != found


# --- beside others ---


def test_several_prompts_stand_one_after_the_other() -> None:
    model, x = decoder(), ids()
    add_adapter(model, PromptTuningConfig(2), "a")
    add_adapter(model, PTuningConfig(3, hidden=5), "b")
    set_adapters(model, ["b", "a"])
    front = torch.cat([adapter(model, "b").embeddings(), adapter(model, "a").embeddings()])
    both = model(x).logits
    one = decoder()
    add_adapter(one, PromptTuningConfig(5))
    adapter(one).prompt.data.copy_(front)
    assert torch.equal(both, one(x).logits)
    set_adapters(model, ["a", "b"])
    assert not torch.equal(model(x).logits, both)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_beside_it_does_what_it_does(
    kind: str, shake: Callable[[nn.Module, float], None]
) -> None:
    model, x = decoder(), ids()
    add_adapter(model, LoRAConfig(r=2), "lora")
    shake(model, 0.3)
    lone = copy.deepcopy(model)
    add_adapter(model, KINDS[kind], "soft")
    soft = model(x).logits
    set_adapters(model, ["lora", "soft"], trainable=True)
    both = model(x).logits
    both.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # the same prompt before a model into which the LoRA is merged for good
    unload_adapters(lone, merge=True)
    add_adapter(lone, KINDS[kind], "soft")
    state = {k: v for k, v in model.state_dict().items() if ".adapters.soft." in k}
    assert not lone.load_state_dict(state, strict=False).unexpected_keys
    bound = torch.full_like(both, gamma(2000) * both.abs().max().item())
    assert exceeds(both, lone(x).logits, bound) is None
    assert exceeds(both, soft, bound) is not None
    delete_adapter(model, "soft")
    assert active_names(model) == ["lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_do_without_it(
    kind: str, shake: Callable[[nn.Module, float], None]
) -> None:
    model, x = decoder(), ids()
    before = model(x).logits
    add_adapter(model, LoRAConfig(r=2), "lora")
    shake(model, 0.3)
    alone = model(x).logits
    add_adapter(model, KINDS[kind], "soft")
    refused = pytest.raises(ValueError, match="rows of a batch cannot name 'soft'")
    with refused as caught, adapter_rows(model, ["lora", "soft"]):
        pass
    assert "\n" not in str(caught.value)
    with adapter_rows(model, ["lora", None]):
        mixed = model(x).logits
    bound = torch.full_like(mixed, gamma(2000) * alone.abs().max().item())
    assert exceeds(mixed, torch.stack([alone[0], before[1]]), bound) is None


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused(kind: str, state_of: Callable[[nn.Module], dict[str, object]]) -> None:
    model = decoder()
    add_adapter(model, KINDS[kind])
    before = state_of(model)
    with pytest.raises(ValueError, match="no weight gives the same"):
        merge_adapters(model)
    assert state_of(model) == before


# --- precision, copies, compilers ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_keeps_float32_prompts(kind: str) -> None:
    model, x = decoder().bfloat16(), ids()
    add_adapter(model, KINDS[kind])
    y = model.to(torch.bfloat16)(x)
    assert y.logits.dtype == torch.bfloat16
    y.logits.float().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(x).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["mlp", "lstm", "network"])
def test_autocast_leaves_the_encoder_in_float32(kind: str) -> None:
    model = decoder()
    add_adapter(model, KINDS[kind])
    sites = [h.adapter("default") for _, h in adapted_modules(model)]
    outputs = [lambda: sites[-1].states()[0]] if kind == "network" else [sites[0].embeddings]
    for output in outputs:
        plain = output()
        assert plain.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(output(), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(kind: str, way: str) -> None:
    model, x = decoder(), ids()
    add_adapter(model, KINDS[kind])
    y = model(x).logits
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x).logits, y)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    assert not torch.equal(model(x).logits, y)
    assert torch.equal(twin(x).logits, y)
    delete_adapter(twin, "default")
    assert hooks(twin) == []
    assert len(hooks(model)) == 2


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_compiled_equals_eager(kind: str) -> None:
    model, x = decoder(), ids()
    add_adapter(model, KINDS[kind])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x).logits, model(x).logits)
        with disable_adapters(model):
            assert torch.equal(compiled(x).logits, model(x).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str) -> None:
    model, x = decoder(), ids()
    add_adapter(model, KINDS[kind])
    y = model(x).logits
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    nothing = {k: torch.zeros_like(p) for k, p in trained.items()}
    out = torch.func.functional_call(model, nothing, (x,)).logits
    assert torch.equal(model(x).logits, y)
    with torch.no_grad():
        for p in trained.values():
            p.zero_()
    assert torch.equal(model(x).logits, out)


@pytest.mark.parametrize("kind", KINDS)
def test_ddp(kind: str, tmp_path: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, x = decoder(), ids()
        add_adapter(model, KINDS[kind])
        twin = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel(x, labels=x).loss.backward()
            twin(x, labels=x).loss.backward()
        # a wrapper that outlives its group waits, at its end, for the group's threads while it
        # holds Python's lock, which one of them may want: a deadlock, seen once
        del parallel
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_leaves_nothing_behind(
    kind: str, state_of: Callable[[nn.Module], dict[str, object]]
) -> None:
    model, x = decoder(), ids()
    add_adapter(model, KINDS[kind])
    y, before = model(x).logits, state_of(model)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    handle.remove()
    assert state_of(model) == before
    assert torch.equal(model(x).logits, y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_around_the_host_changes_nothing(kind: str) -> None:
    model, x = decoder(), ids()
    add_adapter(model, KINDS[kind])
    y = model(x).logits
    model.model.embed_tokens = Adapted(model.model.embed_tokens)
    assert torch.equal(model(x).logits, y)


def test_a_model_inside_another_is_found() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = decoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.lm(x).logits.sum(-1)

    model, x = Scored(), ids()
    before = model(x)
    report = add_adapter(model, PromptTuningConfig(P))
    assert report.sites == ("lm.model.embed_tokens",)
    assert model(x).shape == before.shape
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_4_bit_base(kind: str) -> None:
    model, x = decoder(), ids()
    quantize_model(model)
    before = model(x).logits
    add_adapter(model, KINDS[kind])
    model(x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with disable_adapters(model):
        assert torch.equal(model(x).logits, before)


# --- errors ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTuningConfig(0), "num_virtual_tokens must be a whole number, 1 or more; g"),
        (lambda: PTuningConfig(-1), "num_virtual_tokens must be a whole number.*got -1"),
        (lambda: PromptTuningConfig(2.5), "num_virtual_tokens must be a whole number.*got 2.5"),
        (lambda: PromptTuningConfig(2, "nearest"), "init must be one of 'vocabulary', 'random', "),
        (lambda: PromptTuningConfig(2, "text"), 'init="text" needs the text, or its token_ids'),
        (lambda: PromptTuningConfig(2, text="a"), 'text belongs to init="text"; this is \'vocab'),
        (lambda: PromptTuningConfig(2, token_ids=(1,)), 'token_ids belongs to init="text"'),
        (lambda: PromptTuningConfig(2, "text", token_ids=()), "needs a text with tokens"),
        (lambda: PromptTuningConfig(2, vocabulary=0), "vocabulary must be a whole number"),
        (lambda: PTuningConfig(2, "gru"), "encoder must be one of 'mlp', 'lstm', got 'gru'"),
        (lambda: PTuningConfig(2, hidden=0), "hidden must be a whole number, 1 or more, or None"),
        (lambda: PTuningConfig(2, layers=0), "layers must be a whole number, 1 or more; got 0"),
        (lambda: PTuningConfig(2, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: PTuningConfig(2, dropout=0.1), "dropout is between LSTM layers: it needs two"),
        (lambda: PTuningConfig(2, "lstm", None, 1, 0.1), "dropout is between LSTM layers"),
    ],
)
def test_values_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


class NoEmbeds(nn.Module):
    """A language model that takes ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(3, 3)),
            PromptTuningConfig(2),
            r"a language model with get_input_embeddings\(\); Sequential has none",
        ),
        (NoEmbeds, PromptTuningConfig(2), "NoEmbeds.forward has no attention_mask"),
        (
            decoder,
            PromptTuningConfig(98, "vocabulary"),
            r"draws 98 different tokens, but there are 97: .*'model.embed_tokens' has 97 rows",
        ),
        (decoder, PromptTuningConfig(4, "vocabulary", vocabulary=3), "but there are 3: lower num"),
        (decoder, PromptTuningConfig(4, "text", "a text"), r"no tokenizer: PromptTuningConfig\(…,"),
        (
            decoder,
            PromptTuningConfig(2, "text", token_ids=(97,)),
            "token_ids: 97 is not in the 97 rows of 'model.embed_tokens'",
        ),
    ],
)
def test_models_it_does_not_fit(
    make: Callable[[], nn.Module],
    config: Any,
    message: str,
    state_of: Callable[[nn.Module], dict[str, object]],
) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        add_adapter(model, config)
    assert "\n" not in str(caught.value)
    assert state_of(model) == before
    assert hooks(model) == []


def test_what_does_not_go_with_a_prompt() -> None:
    model, x = decoder(), ids()
    add_adapter(model, PromptTuningConfig(2))
    y = model(x).logits
    for call, message in (
        ({"document_ids": torch.zeros_like(x)}, r"document_ids \(packed rows\) do not go with a p"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, r"position_ids that begin again"),
        ({"token_type_ids": x}, "token_type_ids do not go with a prompt"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"attention_mask \(B, past \+ T\), got shape"),
        ({"inputs_embeds": torch.zeros(2, 6, 32)}, "give either input_ids or inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            model(x, **call)
        assert "\n" not in str(caught.value)
    assert torch.equal(model(x).logits, y)
