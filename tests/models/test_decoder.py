"""What the decoder promises beyond transformers' logits: packing, caching, memory, dtypes."""

import copy
import dataclasses
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.models import CausalLM, KVCache, ModelConfig
from lora_core.models.attention import attention_rule, default_positions
from lora_core.models.norm import RMSNorm

Make = Callable[..., CausalLM]
Close = Callable[[Tensor, Tensor, Tensor], None]


def whole_and_parts(make: Make, parts: list[list[int]], **changes: Any) -> tuple[Tensor, ...]:
    """Logits packed into one row; row by row; row by row in float64."""
    model, truth = make(**changes), make(**changes).double()
    row = torch.tensor([[token for part in parts for token in part]])
    ids = torch.tensor([[i for i, part in enumerate(parts) for _ in part]])
    packed = model(row, document_ids=ids).logits[0]
    alone = [torch.cat([m(torch.tensor([p])).logits[0] for p in parts]) for m in (model, truth)]
    return packed, *alone


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), groups=st.sampled_from([1, 2]))
def test_packed_rows_equal_unpacked_ones(
    make_model: Make, assert_close: Close, lengths: list[int], groups: int
) -> None:
    parts = [torch.randint(97, (n,)).tolist() for n in lengths]
    with torch.no_grad():
        assert_close(*whole_and_parts(make_model, parts, num_key_value_heads=4 // groups))


def test_packing_is_seen_when_it_is_left_out(make_model: Make) -> None:
    model = make_model()
    ids = torch.randint(97, (1, 8))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    gap = (model(ids).logits - model(ids, document_ids=documents).logits).abs().amax((0, 2))
    assert (gap[:4] == 0).all()
    assert (gap[4:] > 1e-3).all()


def test_packed_gradients_equal_unpacked_ones(make_model: Make, assert_close: Close) -> None:
    parts = [torch.randint(97, (n,)).tolist() for n in (5, 2, 7)]
    models = [make_model(), make_model(), make_model().double()]
    row = torch.tensor([[token for part in parts for token in part]])
    documents = torch.tensor([[0] * 5 + [1] * 2 + [2] * 7])
    labels = row.clone()
    labels[0, [0, 5, 7]] = -100  # the first token of each has no predecessor
    models[0](row, labels=labels, document_ids=documents).loss.backward()
    for model in models[1:]:
        losses = [
            model(t, labels=t).loss * (t.numel() - 1)
            for t in map(torch.tensor, [[p] for p in parts])
        ]
        (sum(losses) / (14 - 3)).backward()
    for group in zip(*(m.parameters() for m in models), strict=True):
        assert_close(*(p.grad for p in group))


def test_attention_rule_of_two_documents_and_padding() -> None:
    rule = attention_rule(4, 0, torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1]]))
    assert rule is not None
    assert rule.int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]  # the padded one sees itself
    ]


def test_no_mask_where_none_is_needed() -> None:
    assert attention_rule(5, 0, None, None) is None
    assert attention_rule(5, 0, torch.ones(2, 5), None) is None
    assert attention_rule(1, 7, torch.ones(2, 8), None) is None
    rule = attention_rule(2, 1, None, None)  # two new tokens after one old
    assert rule is not None
    assert rule.int().tolist() == [[[[1, 1, 0], [1, 1, 1]]]]


def test_positions_count_real_tokens_from_zero_in_each_document() -> None:
    assert default_positions(3, 2, None, None).tolist() == [[2, 3, 4]]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert default_positions(5, 0, mask, None).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert default_positions(2, 3, mask, None).tolist() == [[1, 2], [2, 2]]
    documents = torch.tensor([[4, 4, 9, 9, 9, 4]])
    assert default_positions(6, 0, None, documents).tolist() == [[0, 1, 0, 1, 2, 0]]


@given(data=st.data())
def test_any_chunking_of_the_cache_gives_the_same_logits(
    make_model: Make, assert_close: Close, data: st.DataObject
) -> None:
    chunks = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    capacity = data.draw(st.integers(1, 8))
    ids = torch.randint(97, (2, sum(chunks)))
    model, cache = make_model(), KVCache(capacity)
    with torch.no_grad():
        found = torch.cat([model(part, cache=cache).logits for part in ids.split(chunks, 1)], 1)
        assert cache.length == ids.shape[1]
        assert_close(found, model(ids).logits, make_model().double()(ids).logits)


def test_gradient_checkpointing_changes_nothing_but_memory(make_model: Make) -> None:
    plain, sparing = make_model(attention_dropout=0.3), make_model(attention_dropout=0.3)
    sparing.gradient_checkpointing = True
    assert sparing.gradient_checkpointing
    ids = torch.randint(97, (2, 12))
    sizes = []
    for model in (plain.train(), sparing.train()):
        torch.manual_seed(5)
        sizes.append(0)

        def count(tensor: Tensor) -> Tensor:
            sizes[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        loss.backward()
    for left, right in zip(plain.parameters(), sparing.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)
    assert sizes[1] < sizes[0] / 2


def test_dropout_acts_in_training_alone(make_model: Make) -> None:
    model = make_model(attention_dropout=0.5)
    ids = torch.randint(97, (1, 6))
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)


def test_hidden_states_embeddings_and_last_logits(make_model: Make) -> None:
    model = make_model()
    ids = torch.randint(97, (2, 6))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, out.logits)
    torch.testing.assert_close(
        model(ids, logits_to_keep=2).logits, out.logits[:, -2:], rtol=0, atol=1e-6
    )
    assert model.get_output_embeddings() is model.lm_head


def test_layers_outputs_are_let_go_unless_asked_for(make_model: Make) -> None:
    model, ids = make_model(num_hidden_layers=3), torch.arange(6)[None]
    first: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    layers = model.model.layers
    layers[0].register_forward_hook(lambda m, x, y: first.append(weakref.ref(y)))
    layers[2].register_forward_hook(lambda m, x, y: alive.append(first[-1]() is not None))
    with torch.no_grad():
        model(ids)
        model(ids, output_hidden_states=True)
    assert alive == [False, True]


def test_frequencies_survive_casts_copies_and_the_meta_device(make_model: Make) -> None:
    model = make_model()
    expected = model.model.rotary.inv_freq.clone()
    model.bfloat16()
    assert torch.equal(model.model.rotary.inv_freq, expected)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.device("meta"):
        copies.append(CausalLM(model.config))
    for other in copies:
        assert torch.equal(other.model.rotary.inv_freq, expected)
    assert not any("rotary" in name for name in model.state_dict())


def test_bfloat16_positions_stay_apart(make_model: Make) -> None:
    """bfloat16 would round positions 300 and 301 to one number."""
    model = make_model().bfloat16()
    cos, _ = model.model.rotary(torch.tensor([[300, 301]]))
    assert cos.dtype == torch.float32
    assert (cos[0, 0, 0] - cos[0, 0, 1]).abs().max() > 0.1
    logits = model(torch.randint(97, (1, 5))).logits
    assert logits.dtype == torch.bfloat16


def test_bfloat16_error_is_of_bfloat16(make_model: Make) -> None:
    ids = torch.randint(97, (2, 16))
    with torch.no_grad():
        exact = make_model().bfloat16().double()(ids).logits
        error = (make_model().bfloat16()(ids).logits.double() - exact).abs().max()
    assert error < 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_rms_norm_in_half_precision_is_computed_in_float32() -> None:
    norm = RMSNorm(64, 1e-6).half()
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # its square overflows float16
    assert torch.equal(norm(x), torch.ones(1, 64, dtype=torch.float16))


def test_init_weights_is_seeded_and_of_the_deviation(sizes: dict[str, Any]) -> None:
    model = CausalLM(ModelConfig(**sizes, attention_bias=True))
    states = []
    for seed in (1, 1, 2):
        model.init_weights(0.05, torch.Generator().manual_seed(seed))
        states.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    drawn = torch.cat([p.flatten() for n, p in model.named_parameters() if "proj.weight" in n])
    assert abs(drawn.std() / 0.05 - 1) < 4 / (2 * drawn.numel()) ** 0.5  # four standard errors
    assert (states[0]["model.layers.0.self_attn.q_proj.bias"] == 0).all()
    assert (states[0]["model.norm.weight"] == 1).all()


def test_tied_head_is_one_parameter(make_model: Make) -> None:
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_backward_twice_gives_the_same_gradients(make_model: Make) -> None:
    model = make_model()
    ids = torch.randint(97, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    loss = model(ids, mask, labels=ids).loss
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, first, second))
    assert all(gradient.isfinite().all() for gradient in first)


def test_fully_padded_rows_stay_finite(make_model: Make) -> None:
    model = make_model()
    ids = torch.randint(97, (2, 6))
    mask = torch.tensor([[0] * 6, [1] * 6])
    out = model(ids, mask, labels=ids)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles_whole(make_model: Make, assert_close: Close) -> None:
    model = make_model()
    ids = torch.randint(97, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for given_mask in (None, mask):
        found = compiled(ids, given_mask)
        truth = make_model().double()(ids, given_mask)
        assert_close(found.logits, model(ids, given_mask).logits, truth.logits)


def test_wrong_arguments(make_model: Make) -> None:
    model = make_model()
    ids = torch.randint(97, (2, 6))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 6, 32))
    with pytest.raises(ValueError, match=r"must have shape \(2, 6\), past and new.*got \(2, 5\)"):
        model(ids, torch.ones(2, 5))
    cache = KVCache()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"must have shape \(2, 7\)"):
        model(ids[:, :1], torch.ones(2, 1), cache=cache)
    with pytest.raises(ValueError, match="not with a cache"):
        model(ids[:, :1], cache=cache, document_ids=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"document_ids must have shape \(2, 6\); got \(2, 5\)"):
        model(ids, document_ids=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match="logits_to_keep must be at least 1; got 0"):
        model(ids, logits_to_keep=0)
    with pytest.raises(ValueError, match="capacity must be at least 1; got 0"):
        KVCache(0)


def test_config_is_frozen(make_model: Make) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_model().config.vocab_size = 5  # type: ignore[misc]
