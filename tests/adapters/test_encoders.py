"""Adapters on this library's encoders: the classic experiments."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    adapted_modules,
    adapter_rows,
    add_adapter,
    disable_adapters,
    merge_adapters,
    unmerge_adapters,
)
from lora_core.checkpoint import load_adapter, save_adapter
from lora_core.models import EncoderConfig, EncoderModel, build_model
from lora_core.quant import quantize_model

HEADS = ["none", "masked", "sequence", "token", "span"]
BOTH = ["bert", "roberta"]
IDS = torch.tensor([[7, 5, 9, 11, 4, 30], [8, 21, 2, 13, 1, 1]])
MASK = (IDS != 1).long()
LORA = LoRAConfig(r=4, alpha=8, targets=["query", "value"], modules_to_save=["classifier"])


def make(family: str = "bert", head: str = "sequence", rate: float = 0.1) -> EncoderModel:
    torch.manual_seed(5)
    config = EncoderConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        pad_token_id=1,
        hidden_dropout_prob=rate,
        attention_probs_dropout_prob=rate,
        model_type=family,
        head=head,
    )
    model = build_model(config)
    assert isinstance(model, EncoderModel)
    model.init_weights(0.2)
    return model.eval()


def tell(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS, MASK)
    return out.last_hidden_state if out.logits is None else out.logits


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in adapted_modules(model)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", BOTH)
def test_all_linear_leaves_out_the_head(family: str, head: str) -> None:
    model = make(family, head)
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    heads = {
        "masked": {"cls.predictions.decoder", "lm_head.decoder"},
        "sequence": {"classifier", "classifier.dense", "classifier.out_proj"},
        "token": {"classifier"},
        "span": {"qa_outputs"},
    }
    before = tell(model)
    add_adapter(model, LoRAConfig(r=2))
    assert set(names(model)) == linears - heads.get(head, set())
    assert torch.equal(before, tell(model))
    quantized = make(family, head)
    report = quantize_model(quantized)
    assert set(report.modules) == linears - heads.get(head, set())
    assert set(report.kept) == linears & heads.get(head, set())


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize(("placement", "sites"), [("pfeiffer", 2), ("houlsby", 4), ("parallel", 4)])
def test_bottleneck_adapters(
    family: str, placement: str, sites: int, shake: Callable[..., nn.Module]
) -> None:
    model = make(family)
    before = tell(model)
    add_adapter(model, BottleneckConfig(reduction=4, placement=placement))
    assert len(names(model)) == sites
    assert torch.equal(before, tell(model))
    assert not torch.allclose(before, tell(shake(model)))
    with disable_adapters(model):
        assert torch.equal(before, tell(model))


@pytest.mark.parametrize("family", BOTH)
def test_merging_and_coming_back(
    family: str, shake: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = make(family)
    plain = copy.deepcopy(model)
    add_adapter(model, LoRAConfig(r=2, targets=["query", "value"], modules_to_save=["classifier"]))
    before, after = tell(plain), tell(shake(model))
    assert not torch.allclose(before, after)
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    assert torch.equal(tell(plain), after)
    merge_adapters(model)
    torch.testing.assert_close(tell(model), after, rtol=1e-5, atol=1e-5)
    unmerge_adapters(model)
    assert torch.equal(tell(model), after)


@pytest.mark.parametrize("head", ["sequence", "span"])
def test_rows_that_name_their_adapters(head: str, shake: Callable[..., nn.Module]) -> None:
    model = make("bert", head)
    before = tell(model)
    add_adapter(model, LoRAConfig(r=2, targets=["query", "value"]), "a")
    after = tell(shake(model))
    with adapter_rows(model, ["a", None]):
        mixed = tell(model)
    torch.testing.assert_close(mixed, torch.stack([after[0], before[1]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", BOTH)
def test_a_prefix_comes_before_the_keys(family: str, tmp_path: Path) -> None:
    model = make(family)
    plain = copy.deepcopy(model)
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=3, projection=False, std=1.0))
    site = next(name for name in names(model) if name.endswith("attention.self"))
    host, base = model.get_submodule(site), plain.get_submodule(site)
    x = torch.randn(2, 6, 32)
    mask = MASK.bool()[:, None, None].expand(-1, 1, 6, -1)
    adapter = host.adapter("default")
    q, k, v = (
        part(x).view(2, 6, 4, 8).transpose(1, 2) for part in (base.query, base.key, base.value)
    )
    front = [t.transpose(0, 1)[None].expand(2, -1, -1, -1) for t in (adapter.key, adapter.value)]
    wide = F.pad(mask, (3, 0), value=True)
    y = F.scaled_dot_product_attention(
        q, torch.cat([front[0], k], 2), torch.cat([front[1], v], 2), wide
    )
    torch.testing.assert_close(host(x, mask), y.transpose(1, 2).flatten(2))
    after = tell(model)
    assert not torch.allclose(after, tell(plain))
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    assert torch.equal(tell(plain), after)


def test_a_prompt_moves_a_spans_labels_on() -> None:
    model = make("bert", "span")
    ids = torch.randint(2, 50, (2, 6))
    ends = {"start_positions": torch.tensor([1, 9]), "end_positions": torch.tensor([2, -1])}
    add_adapter(model, PromptTuningConfig(num_virtual_tokens=3))
    out = model(ids, **ends)
    words = model.get_input_embeddings()
    prompt = words.adapter("default").embeddings()
    with disable_adapters(model):
        x = torch.cat([prompt.expand(2, -1, -1), words(ids)], 1)
        moved = {"start_positions": torch.tensor([4, 12]), "end_positions": torch.tensor([5, 3])}
        same = model(inputs_embeds=x, **moved)
    torch.testing.assert_close(out.loss, same.loss)
    torch.testing.assert_close(out.logits, same.logits[:, 3:])


def test_a_prompt_is_refused_where_the_first_token_counts() -> None:
    model = make("bert", "sequence")
    add_adapter(model, PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="SequenceClassifier has others"):
        model(IDS, MASK)


def task(count: int) -> tuple[Tensor, Tensor]:
    """Texts of eight tokens after a first; the label is whether token 9 is among them."""
    ids = torch.randint(10, 50, (count, 9))
    labels = torch.randint(2, (count,))
    ids[:, 0] = 2
    ids[labels == 1, 3] = 9
    order = torch.rand(count, 8).argsort(1) + 1
    ids[:, 1:] = ids.gather(1, order)
    return ids, labels


@pytest.mark.parametrize(
    ("family", "config", "hits"),
    [
        ("bert", LORA, 0.85),
        ("roberta", LORA, 0.85),
        ("bert", BottleneckConfig(reduction=4), 0.75),
    ],
    ids=["bert-lora", "roberta-lora", "bert-bottleneck"],
)
def test_a_task_is_learned(family: str, config: Any, hits: float) -> None:
    model = make(family, rate=0.0)
    add_adapter(model, config)
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    model.train()
    for _ in range(40):
        ids, labels = task(32)
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, labels = task(256)
    with torch.no_grad():
        found = model.eval()(ids).logits.argmax(1)
    assert (found == labels).float().mean() > hits
    assert frozen
    assert all(torch.equal(p, before) for p, before in frozen)


def test_a_prefix_is_trained() -> None:
    model = make("roberta")
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=4, hidden=16))
    model(IDS, MASK, labels=torch.tensor([0, 1])).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)
