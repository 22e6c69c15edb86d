"""What a loss reports beside itself, and sources that make their batches as they are asked."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.data import collate
from lora_core.train import TrainConfig, train
from lora_core.train.batches import make_batches
from lora_core.train.step import CausalLoss, LossResult


class Counting:
    """Next-token loss that also reports the rows of its batch, and nothing now and then."""

    def count(self, batch: Any) -> float:
        return CausalLoss().count(batch)

    def __call__(self, model: nn.Module, batch: Any, normalizer: float) -> LossResult:
        value, rows = CausalLoss()(model, batch, normalizer)
        size = len(batch["input_ids"])
        return LossResult(value, rows, {"rows": (torch.tensor(3.0 * size), size), "none": (0, 0)})


def test_figures_are_sums_over_counts_of_the_whole_step(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    config = TrainConfig(epochs=1, batch_size=2, accumulate=2, progress=False)
    found = train(tiny(), make_rows(5), config, eval_dataset=make_rows(3, 1), loss=Counting())
    for record in found.history:
        assert record["rows"] == 3.0
        assert "none" not in record
    assert found.history[-1]["eval_rows"] == 3.0


class Made:
    """Batches made when they are asked for; notes the weight that each was made with."""

    def __init__(self, model: nn.Module, rows: Any) -> None:
        self.weight: Tensor = next(model.parameters())
        self.rows = rows
        self.seen: list[float] = []

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        for row in self.rows[start:]:
            self.seen.append(self.weight.detach().double().sum().item())
            yield collate([row])

    def per_epoch(self) -> int:
        return len(self.rows)

    def note(self) -> None: ...

    def largest(self) -> None: ...


def test_a_source_makes_each_batch_by_the_model_of_its_step(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    model = tiny()
    source = Made(model, make_rows(4))
    config = TrainConfig(epochs=1, batch_size=1, accumulate=1, lr=0.1, warmup=0, progress=False)
    train(model, source, config)
    assert len(set(source.seen)) == 4
    assert make_batches(source, 1, 0) is source
    with pytest.raises(ValueError, match="Made makes its batches itself: leave out packing"):
        make_batches(source, 1, 0, packing=16)
