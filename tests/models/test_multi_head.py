"""Heads on one backbone: logits and losses against plain arithmetic, adapters, files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import BottleneckConfig, LoRAConfig, add_adapter
from lora_core.checkpoint import adapter_state_dict, load_adapter, save_adapter
from lora_core.checkpoint.heads import differing, load_heads, read_heads, save_heads
from lora_core.models import CausalLM, EncoderConfig, ModelConfig, build_model
from lora_core.models.multi_head import MultiHead, poolings
from lora_core.models.task_heads import Head, HeadShape

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
BACKBONES = ["bert", "roberta", "masked", "decoder", "tied"]


def backbone(kind: str) -> Any:
    torch.manual_seed(5)
    model: Any
    if kind in ("decoder", "tied"):
        model = CausalLM(ModelConfig(**SIZES, tie_word_embeddings=kind == "tied"))
    else:
        family = "roberta" if kind == "roberta" else "bert"
        head = "masked" if kind == "masked" else "none"
        model = build_model(EncoderConfig(**SIZES, pad_token_id=1, model_type=family, head=head))
        if kind == "roberta":
            model = build_model(
                EncoderConfig(**SIZES, pad_token_id=1, model_type=family, head="sequence")
            )
    model.init_weights(0.2)
    return model.eval()


SHAPES = {
    "topic": HeadShape(kind="sequence", labels=("a", "b", "c")),
    "many": HeadShape(
        kind="sequence", labels=("x", "y"), problem="multi_label_classification", pooling="mean"
    ),
    "stars": HeadShape(kind="sequence", problem="regression"),
    "tags": HeadShape(kind="token", labels=("O", "B-X")),
    "squad": HeadShape(kind="span"),
}


def heads_on(model: nn.Module) -> MultiHead:
    torch.manual_seed(1)
    whole = MultiHead(model, {name: Head(shape, 32) for name, shape in SHAPES.items()})
    with torch.no_grad():
        for parameter in whole.heads.parameters():
            parameter.normal_(std=0.5)
    return whole.eval()


LENGTHS = (7, 4, 5)
MASK = torch.tensor([[1] * n + [0] * (7 - n) for n in LENGTHS])
LABELS: dict[str, dict[str, Tensor]] = {
    "topic": {"labels": torch.tensor([2, 0, 1])},
    "many": {"labels": torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])},
    "stars": {"labels": torch.tensor([0.5, -1.0, 3.0])},
    "tags": {"labels": torch.where(MASK == 1, torch.arange(21).view(3, 7) % 2, -100)},
    "squad": {
        "start_positions": torch.tensor([0, 1, 9]),
        "end_positions": torch.tensor([6, 3, 9]),
    },
}


def ids() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(2, 61, (3, 7)).masked_fill(MASK == 0, 1)


def expected_sum(task: str, logits: Tensor) -> tuple[float, int]:
    """The summed loss and the count, element by element in float64."""
    logits, labels = logits.double(), {k: v.tolist() for k, v in LABELS[task].items()}

    def surprise(row: Tensor, right: int) -> float:
        return float(torch.logsumexp(row, 0) - row[right])

    if task == "topic":
        return sum(surprise(logits[b], y) for b, y in enumerate(labels["labels"])), 3
    if task == "many":
        p = torch.sigmoid(logits)
        y = LABELS[task]["labels"].double()
        return float(-(y * p.log() + (1 - y) * (1 - p).log()).mean(1).sum()), 3
    if task == "stars":
        return sum((float(logits[b, 0]) - y) ** 2 for b, y in enumerate(labels["labels"])), 3
    if task == "tags":
        pairs = [
            (b, t, y) for b, row in enumerate(labels["labels"]) for t, y in enumerate(row) if y >= 0
        ]
        return sum(surprise(logits[b, t], y) for b, t, y in pairs), len(pairs)
    total = 0.0
    for b in (0, 1):  # the third row's answer was cut off
        real = logits[b, : LENGTHS[b]]
        total += surprise(real[:, 0], labels["start_positions"][b]) / 2
        total += surprise(real[:, 1], labels["end_positions"][b]) / 2
    return total, 2


@pytest.mark.parametrize("task", list(SHAPES))
@pytest.mark.parametrize("kind", BACKBONES)
def test_losses_are_sums_over_what_is_graded(kind: str, task: str) -> None:
    model = heads_on(backbone(kind))
    out = model(task, ids(), MASK, **LABELS[task])
    total, count = expected_sum(task, out.logits.detach())
    assert int(out.count) == count
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(float(out.loss.detach()), total / count, rtol=1e-5, atol=1e-6)
    normed = model(task, ids(), MASK, **LABELS[task], normalizer=11.0)
    torch.testing.assert_close(float(normed.loss.detach()), total / 11, rtol=1e-5, atol=1e-6)
    # rows alone, without padding, add up to the batch
    parts = 0.0
    for b, n in enumerate(LENGTHS):
        labels = {
            k: v[b : b + 1, :n] if k == "labels" and task == "tags" else v[b : b + 1]
            for k, v in LABELS[task].items()
        }
        parts += float(model(task, ids()[b : b + 1, :n], **labels, normalizer=11.0).loss.detach())
    torch.testing.assert_close(parts, total / 11, rtol=1e-4, atol=1e-5)


def test_a_sequence_head_reads_what_its_pooling_says() -> None:
    encoder, decoder = backbone("bert"), backbone("decoder")
    hidden = encoder(ids(), MASK)
    last = decoder(ids(), MASK, output_hidden_states=True).hidden_states[-1]
    means = [states[b, :n].mean(0) for states in (last,) for b, n in enumerate(LENGTHS)]
    cases = [
        (encoder, None, hidden.pooler_output),
        (encoder, "first", hidden.last_hidden_state[:, 0]),
        (decoder, None, torch.stack([last[b, n - 1] for b, n in enumerate(LENGTHS)])),
        (decoder, "mean", torch.stack(means)),
    ]
    for model, pooling, state in cases:
        head = Head(HeadShape(kind="sequence", labels=("a", "b"), pooling=pooling), 32)
        found = MultiHead(model, {"t": head}).eval()("t", ids(), MASK).logits
        torch.testing.assert_close(found, head.out(state), rtol=1e-4, atol=1e-5)


def test_the_last_token_is_found_behind_padding_on_the_left() -> None:
    model = heads_on(backbone("decoder"))
    alone = model("topic", ids()[1:2, :4]).logits
    left = torch.cat([torch.ones(1, 3, dtype=torch.long), ids()[1:2, :4]], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 4])
    torch.testing.assert_close(model("topic", left, mask).logits, alone, rtol=1e-4, atol=1e-5)


def test_a_decoder_labels_a_word_by_what_stands_before_it() -> None:
    other = ids().clone()
    other[:, 4:] = 7
    decoder, encoder = heads_on(backbone("decoder")), heads_on(backbone("bert"))
    same = [
        m("tags", ids()).logits[:, :4].equal(m("tags", other).logits[:, :4])
        for m in (decoder, encoder)
    ]
    assert same == [True, False]


def test_no_logits_over_the_vocabulary_are_computed() -> None:
    for kind in ("decoder", "masked"):
        model = heads_on(backbone(kind))
        head = model.backbone.get_output_embeddings()
        head.register_forward_pre_hook(lambda *_: pytest.fail("the output head was called"))
        model("topic", ids(), MASK, labels=LABELS["topic"]["labels"])


@pytest.mark.parametrize("config", [LoRAConfig(r=2, alpha=4), BottleneckConfig(reduction=4)])
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_adapter_is_the_bases_own(
    kind: str, config: Any, tmp_path: Path, shake: Callable[..., nn.Module]
) -> None:
    model = heads_on(backbone(kind))
    add_adapter(model.backbone, config)
    shake(model.backbone)
    plain = backbone(kind)
    add_adapter(plain, config)
    assert adapter_state_dict(model.backbone).keys() == adapter_state_dict(plain).keys()
    assert all(p.requires_grad for p in model.heads.parameters())
    save_adapter(model.backbone, tmp_path)
    save_heads(model, tmp_path, {"max_length": 9})
    again = backbone(kind)
    load_adapter(again, tmp_path)
    twin = MultiHead(again, load_heads(tmp_path, 32)).eval()
    assert read_heads(tmp_path)[1] == {"max_length": 9}
    assert differing(model, tmp_path) is None
    for task in SHAPES:
        assert twin.head(task).shape == model.head(task).shape
        assert twin(task, ids(), MASK).logits.equal(model(task, ids(), MASK).logits)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_what_no_head_reads_is_known(kind: str, method: str) -> None:
    model = heads_on(backbone(kind))
    if method == "lora":
        add_adapter(model.backbone, LoRAConfig(r=2, alpha=4))
    for parameter in model.unused():
        parameter.requires_grad_(False)
    for task in SHAPES:
        model(task, ids(), MASK, **LABELS[task]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    if kind == "bert":  # without a head that reads the pooler it is unused as well
        alone = MultiHead(model.backbone, {"tags": model.head("tags")})
        assert {id(p) for p in alone.unused()} == {
            id(p) for p in model.backbone.pooler.parameters()
        }


def test_heads_stay_in_float32() -> None:
    model = heads_on(backbone("bert")).to(torch.bfloat16)
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32}
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model("tags", ids(), MASK, labels=LABELS["tags"]["labels"])
    assert (out.logits.dtype, out.loss.dtype) == (torch.float32, torch.float32)


def test_what_a_model_refuses() -> None:
    encoder, decoder = backbone("bert"), backbone("decoder")
    head = Head(SHAPES["topic"], 32)
    with pytest.raises(TypeError, match=r"one of this library's encoders .* got Linear"):
        MultiHead(nn.Linear(2, 2), {"a": head})
    with pytest.raises(ValueError, match="needs at least one head"):
        MultiHead(encoder, {})
    with pytest.raises(ValueError, match=r"'a\.b' cannot name a task"):
        MultiHead(encoder, {"a.b": head})
    with pytest.raises(ValueError, match="reads states of 8; the backbone's are 32"):
        MultiHead(encoder, {"a": Head(SHAPES["topic"], 8)})
    last = HeadShape(kind="sequence", labels=("a", "b"), pooling="last")
    with pytest.raises(ValueError, match=r"cannot pool by 'last' here; .* pooled, first, mean"):
        MultiHead(encoder, {"a": Head(last, 32)})
    assert poolings(decoder) == ("last", "mean")
    model = heads_on(decoder)
    with pytest.raises(ValueError, match="no head 'topics'; nearest names: 'topic'"):
        model("topics", ids())
    with pytest.raises(ValueError, match="a decoder takes no token_type_ids"):
        model("topic", ids(), token_type_ids=ids())
    with pytest.raises(
        ValueError, match="a span head takes start_positions and end_positions; got"
    ):
        model("squad", ids(), start_positions=torch.zeros(3, dtype=torch.long))
    zeros = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="must be alike"):
        model("squad", ids(), start_positions=zeros, end_positions=zeros[:2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "word"}, "kind must be one of sequence, token, span; got 'word'"),
        ({"kind": "sequence"}, "a sequence head needs labels"),
        ({"kind": "span", "labels": ("a",)}, "a head for spans has no labels"),
        ({"kind": "token", "labels": ("a", "a")}, "labels hold 'a' twice"),
        ({"kind": "token", "labels": ("a",), "pooling": "mean"}, "pooling is a sequence head's"),
        ({"kind": "token", "labels": ("a",), "problem": "regression"}, "regression is for seq"),
        ({"kind": "sequence", "problem": "x"}, "problem must be one of single_label"),
        ({"kind": "sequence", "labels": ("a",), "pooling": "max"}, "pooling must be one of pooled"),
        ({"kind": "sequence", "labels": ("a",), "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_what_a_shape_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadShape(**fields)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no heads\.json: no heads were trained"):
        read_heads(tmp_path)
    model = heads_on(backbone("bert"))
    save_heads(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"topic\.out\.weight is \(3, 32\); the head needs \(3, 8\)"
    ):
        load_heads(tmp_path, 8)
    content = json.loads((tmp_path / "heads.json").read_text())
    with torch.no_grad():
        model.head("tags").out.bias += 1
    assert differing(model, tmp_path) == "tags.out.bias"
    del content["heads"]["topic"]
    (tmp_path / "heads.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"do not fit together: 'topic\.out\.bias' is in only one"):
        load_heads(tmp_path)
    content["heads"]["tags"]["kind"] = "word"
    (tmp_path / "heads.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"heads\.json: tags: a head's kind must be one of"):
        load_heads(tmp_path)
    (tmp_path / "heads.json").write_text('{"heads": []}')
    with pytest.raises(ValueError, match='must hold an object "heads"'):
        load_heads(tmp_path)
    save_heads(model, tmp_path)
    (tmp_path / "heads.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no heads\.safetensors"):
        load_heads(tmp_path)
