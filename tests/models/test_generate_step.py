"""The one-token step: on fixed memory, without a number read back, replayed as a CUDA graph is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    adapter_rows,
    add_adapter,
)
from lora_core.models import CausalLM, DecodeStep, KVCache, Sampling, generate_ids, left_pad
from lora_core.models.growing import GrowingStep, can_be_fixed
from lora_core.models.rows import Rows
from lora_core.quant import quantize_model

Make = Callable[..., CausalLM]
PROMPTS = [[5, 6, 7, 8, 9], [1], [2, 3]]
BOTTLENECK = BottleneckConfig(reduction=4)
SAMPLING = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


class Recording(TorchDispatchMode):
    """Writes down every operation of a call, and can do the same on the same memory again.

    That is what a CUDA graph does: neither Python nor a shape nor an address has a say any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in READS, f"the host reads a number: {func}"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def names(self) -> list[str]:
        return [str(func) for func, *_ in self.calls]


def started(model: nn.Module, cache: KVCache | None = None) -> DecodeStep:
    """A step after padded prompts and the first two new tokens, with room for more."""
    ids, mask = left_pad(PROMPTS)
    rows = Rows(ids, mask, 12, SAMPLING, seed=3, eos_ids=[96])
    step = DecodeStep(model, rows, cache or KVCache(32, 32))
    with torch.no_grad():
        step.start(ids, mask)
        step.step()
    return step


def dense(model: CausalLM) -> None:
    pass


def lora(model: CausalLM) -> None:
    add_adapter(model, LoRAConfig(r=4, targets="all-linear"))


def bottleneck(model: CausalLM) -> None:
    add_adapter(model, BOTTLENECK)


def nf4(model: CausalLM) -> None:
    quantize_model(model, code="nf4")
    add_adapter(model, LoRAConfig(r=4, targets="all-linear"))


@pytest.mark.parametrize("change", [dense, lora, bottleneck, nf4])
def test_a_step_replayed_on_its_memory_is_the_step(
    make_model: Make, shake: Callable[..., Any], change: Callable[[CausalLM], None]
) -> None:
    model = make_model(std=0.3)
    change(model)
    shake(model)
    model.eval()
    step = started(model)
    with torch.no_grad():
        with Recording() as first:
            step.step()
        for _ in range(6):
            first.replay()
            step.cache.advance()
    replays = step.rows.tokens.clone()
    plain = started(model)
    with torch.no_grad():
        for _ in range(7):
            plain.step()
    assert replays.tolist() == plain.rows.tokens.tolist()
    assert step.rows.lengths.tolist() == plain.rows.lengths.tolist()
    assert len({tuple(row) for row in replays[:, :8].tolist()}) == 3  # not all the same token


def test_rows_name_their_adapters_in_a_replayed_step(
    make_model: Make, shake: Callable[..., Any]
) -> None:
    model = make_model(std=0.3)
    for name in ("a", "b"):
        add_adapter(model, LoRAConfig(r=4, targets="all-linear"), name)
    shake(model)
    model.eval()
    names = ["b", None, "a"]
    with adapter_rows(model, names), torch.no_grad():
        step = started(model)
        with Recording() as recording:
            step.step()
        for _ in range(4):
            recording.replay()
            step.cache.advance()
        plain = started(model)
        for _ in range(5):
            plain.step()
    assert step.rows.tokens.tolist() == plain.rows.tokens.tolist()


def test_every_step_is_the_same_operations_on_the_same_memory(make_model: Make) -> None:
    step = started(make_model(std=0.3, model_type="mistral", sliding_window=4))
    kept = [step.mask, step.positions, step.rows.token, step.rows.tokens, step.rows.ended]
    kept += [t for pair in step.cache._layers.values() for t in pair]
    addresses, lists = [t.data_ptr() for t in kept], []
    for _ in range(5):
        with torch.no_grad(), Recording() as recording:
            step.step()
        lists.append(recording.names())
        now = [step.mask, step.positions, step.rows.token, step.rows.tokens, step.rows.ended]
        now += [t for pair in step.cache._layers.values() for t in pair]
        assert [t.data_ptr() for t in now] == addresses
    assert all(names == lists[0] for names in lists)


def test_the_step_is_one_graph_for_the_compiler(make_model: Make) -> None:
    """No Python branch hangs on a tensor: fullgraph raises where one does."""
    step, plain = (started(make_model(std=0.3)) for _ in range(2))
    compiled = torch.compile(step.once, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            compiled()
            step.cache.advance()
            plain.step()
    assert step.rows.tokens.tolist() == plain.rows.tokens.tolist()


@pytest.mark.parametrize("block", [1, 3, 64])
def test_room_that_is_used_up_is_made_anew(
    make_model: Make, poison: None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_core.models import decode_step

    made = []
    monkeypatch.setattr(decode_step, "recorded", lambda call, device: made.append(1) or call)
    monkeypatch.setattr(decode_step, "KVCache", lambda: KVCache(block, block))
    model = make_model(std=0.3)
    found = generate_ids(model, *left_pad(PROMPTS), max_new_tokens=30)
    wanted = []
    for prompt in PROMPTS:  # the definition
        text = list(prompt)
        for _ in range(30):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        wanted.append(text[len(prompt) :])
    assert found == wanted
    # 5 + 29 tokens, in rooms that grow by a quarter
    assert len(made) == {1: 8, 3: 7, 64: 1}[block]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "smollm3"])
def test_fixed_and_growing_give_the_same(make_model: Make, family: str) -> None:
    window = {} if family == "smollm3" else {"sliding_window": 5}
    model = make_model(std=0.3, model_type=family, **window)
    ids, mask = left_pad(PROMPTS)
    tokens = []
    for make in (DecodeStep, GrowingStep):
        rows = Rows(ids, mask, 20, SAMPLING, seed=5)
        steps = make(model, rows)
        with torch.no_grad():
            steps.start(ids, mask)
            for _ in range(19):
                steps.step()
        tokens.append(rows.answers())
    assert tokens[0] == tokens[1]


def test_which_models_are_run_on_fixed_memory(make_model: Make) -> None:
    assert can_be_fixed(make_model())
    adapted = make_model()
    lora(adapted)
    assert can_be_fixed(adapted)
    for config in (PromptTuningConfig(3), PrefixTuningConfig(3)):
        soft = make_model()
        add_adapter(soft, config)
        assert not can_be_fixed(soft)
    assert not can_be_fixed(nn.Linear(2, 2))


def test_rows_of_the_batch_under_their_adapters(
    make_model: Make, shake: Callable[..., Any]
) -> None:
    model = make_model(std=0.3)
    for name, config in (("a", LoRAConfig(r=4)), ("b", LoRAConfig(r=2)), ("c", BOTTLENECK)):
        add_adapter(model, config, name)
    shake(model)
    names = ["a", None, "c", "b", "a"]
    prompts = [*PROMPTS, [4, 4], [7, 1, 7]]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
    with adapter_rows(model, names):
        found = generate_ids(model, *left_pad(prompts), seed=[*range(5)], **options)
    for row, name in enumerate(names):
        with adapter_rows(model, [name]):
            alone = generate_ids(model, torch.tensor([prompts[row]]), seed=row, **options)
        assert found[row] == alone[0]
    with adapter_rows(model, [None] * 5):
        assert generate_ids(model, *left_pad(prompts), seed=[*range(5)], **options) != found
