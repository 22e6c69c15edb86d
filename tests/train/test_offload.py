"""Layers' inputs in the host's memory: what is where, when, and that no number changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.device import host_copies
from lora_core.models import CausalLM, ModelConfig
from lora_core.train import TrainConfig, offload, train
from lora_core.train.offload import Offload
from lora_core.train.recompute import recomputed_layers

LAYERS = 6


class Recorded:
    """A device service on the CPU that writes down what it is asked, and is late.

    A copy back holds NaN until somebody waited for it, a copy out is made when it is waited for.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.copies: list[Tensor] = []
        self.late: dict[int, tuple[Tensor, Tensor]] = {}

    def _start(self, to: Tensor, source: Tensor) -> int:
        event = len(self.late)
        self.late[event] = to, source.clone()
        return event

    def out(self, tensor: Tensor) -> tuple[Tensor, int]:
        self.copies.append(torch.full_like(tensor, torch.nan))
        self.log.append(("out", len(self.copies) - 1))
        return self.copies[-1], self._start(self.copies[-1], tensor)

    def back(self, copy: Tensor) -> tuple[Tensor, int]:
        tensor = torch.full_like(copy, torch.nan)
        self.log.append(("back", next(i for i, c in enumerate(self.copies) if c is copy)))
        return tensor, self._start(tensor, copy)

    def wait(self, event: int) -> None:
        to, source = self.late[event]
        to.copy_(source)


def model(**options: Any) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_hidden_layers": LAYERS}
    made = CausalLM(ModelConfig(**(sizes | heads | options)))
    made.init_weights()
    add_adapter(made, LoRAConfig(r=2, dropout=0.2))
    return made.train()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The service in the place of a GPU's, and tensors of any size worth the trip."""
    copies = Recorded()
    monkeypatch.setattr(offload, "host_copies", lambda _: copies)
    monkeypatch.setattr(Offload.__init__, "__defaults__", (1,))
    return copies


def backward(made: CausalLM, ids: Tensor) -> list[Tensor]:
    made.zero_grad()
    torch.manual_seed(1)
    made(ids, labels=ids).loss.backward()
    return [p.grad.clone() for p in made.parameters() if p.grad is not None]


def test_gradients_are_equal_and_inputs_come_back_one_ahead(recorded: Recorded) -> None:
    made, ids = model(), torch.arange(12).view(2, 6)
    expected = backward(made, ids)
    with recomputed_layers(made, offload=True):
        found = backward(made, ids)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # the last layer's input is still there; each of the others is asked for once
    last = LAYERS - 1
    assert recorded.log == [
        *(("out", i) for i in range(LAYERS)),
        *(("back", i) for i in range(last - 1, -1, -1)),
    ]


def test_an_input_starts_its_way_back_before_the_layer_after_it_is_recomputed(
    recorded: Recorded,
) -> None:
    made, ids = model(), torch.arange(12).view(2, 6)
    for number, layer in enumerate(made.model.layers):
        layer.register_forward_pre_hook(lambda *_, n=number: recorded.log.append(("layer", n)))
        # within the checkpoint, so at the recomputation too
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: recorded.log.append(("mlp", n)))
    with recomputed_layers(made, offload=True):
        loss = made(ids, labels=ids).loss
        recorded.log.clear()
        loss.backward()
    last = LAYERS - 1
    expected = [("back", last - 1), ("mlp", last)]
    for number in range(last - 1, 0, -1):
        expected += [("back", number - 1), ("mlp", number)]
    assert recorded.log == [*expected, ("mlp", 0)]


def test_one_or_two_inputs_are_on_the_device_between_forward_and_backward(
    recorded: Recorded,
) -> None:
    made, ids = model(), torch.arange(12).view(2, 6)
    inputs: list[StorageWeakRef] = []
    alive: list[int] = []

    def seen(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(StorageWeakRef(args[0].untyped_storage()))
        alive.append(sum(not ref.expired() for ref in inputs))

    for layer in made.model.layers:
        layer.register_forward_pre_hook(seen)
    for away, most in ((False, LAYERS), (True, 3)):
        inputs.clear(), alive.clear()
        with recomputed_layers(made, offload=away):
            loss = made(ids, labels=ids).loss
            left = sum(not ref.expired() for ref in inputs)
            assert left == (1 if away else LAYERS)
            assert max(alive) == most  # the first is the embedding's, which the model holds
            loss.backward()
        assert all(ref.expired() for ref in inputs)


def test_the_hosts_copies_go_with_the_graph(recorded: Recorded) -> None:
    made, ids = model(), torch.arange(12).view(2, 6)
    with recomputed_layers(made, offload=True):
        loss = made(ids, labels=ids).loss
        refs = [StorageWeakRef(copy.untyped_storage()) for copy in recorded.copies]
        recorded.copies.clear(), recorded.late.clear()
        assert not any(ref.expired() for ref in refs)
        del loss
    assert all(ref.expired() for ref in refs)


def test_memory_of_a_copy_that_nobody_took_is_waited_for(recorded: Recorded) -> None:
    away = Offload(recorded, smallest=1)
    kept = [away.pack(torch.ones(3)), away.pack(torch.ones(3))]
    kept[1].take()  # type: ignore[union-attr]  # it went
    arriving, _ = kept[0].arriving  # type: ignore[misc,union-attr]
    assert arriving.isnan().all()
    kept.clear()
    assert arriving.eq(1).all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2),  # small
        torch.ones(64, dtype=torch.int64),
        torch.ones(8, 8).t(),
        torch.ones(64, requires_grad=True),
        nn.Parameter(torch.ones(64), requires_grad=False),
        torch.ones(64, device="meta"),
    ],
)
def test_what_stays(tensor: Tensor) -> None:
    copies = Recorded()
    assert Offload(copies, smallest=128).pack(tensor) is tensor
    assert not copies.log


def test_two_forwards_before_their_backwards(recorded: Recorded) -> None:
    """As a preference loss runs them."""
    made, ids = model(), torch.arange(24).view(2, 2, 6) % 17

    def gradients() -> list[Tensor]:
        made.zero_grad()
        torch.manual_seed(1)
        losses = [made(one, labels=one).loss for one in ids]
        (losses[0] - 2 * losses[1]).backward()
        return [p.grad.clone() for p in made.parameters() if p.grad is not None]

    expected = gradients()
    with recomputed_layers(made, offload=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients(), strict=True))


def test_backward_twice(recorded: Recorded) -> None:
    made, ids = model(), torch.arange(12).view(2, 6)
    with recomputed_layers(made, offload=True):
        loss = made(ids, labels=ids).loss
        parameters = [p for p in made.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_on_a_cpu_a_line_says_that_nothing_moves(
    tiny: Callable[..., nn.Module],
    make_rows: Callable[..., Any],
    without_times: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert host_copies("cpu") is None
    histories = []
    for more in ({}, {"offload_activations": True}):
        config = TrainConfig(activation_checkpointing=True, steps=3, progress=False, **more)
        histories.append(without_times(train(tiny(), make_rows(), config).history))
        said = "offload_activations: on cpu they lie in the host's memory already"
        assert capsys.readouterr().err.count(said) == len(more)
    assert histories[0] == histories[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_gradients_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Offload.__init__, "__defaults__", (1,))
    made, ids = model().cuda(), torch.arange(12, device="cuda").view(2, 6)
    with recomputed_layers(made):
        expected = backward(made, ids)
    with recomputed_layers(made, offload=True):
        found = backward(made, ids)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
