"""`train` on an encoder: with a loss of its own, and not with that of a decoder."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.models import EncoderConfig, build_model
from lora_core.train import TrainConfig, train


class ByText:
    """The model's own mean over texts, as the batch's sum over the step's number of texts."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], normalizer: float) -> Tensor:
        inputs = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        return model(**inputs).loss * len(batch["labels"]) / normalizer

    def count(self, batch: dict[str, Tensor]) -> float:
        return len(batch["labels"])


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([row["ids"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def make() -> nn.Module:
    config = EncoderConfig(30, 16, 24, 1, 2, head="sequence", hidden_dropout_prob=0.0)
    model = build_model(config)
    model.init_weights(0.3)
    add_adapter(model, LoRAConfig(r=2, targets=["query", "value"], modules_to_save=["classifier"]))
    return model


def rows() -> list[dict[str, Any]]:
    return [{"ids": [6 + 14 * (i % 2), 3, 4], "label": i % 2} for i in range(32)]


def test_a_classifier_is_trained() -> None:
    config = TrainConfig(epochs=8, batch_size=8, accumulate=1, lr=2e-2)
    result = train(make(), rows(), config, collate=collate, loss=ByText())
    assert result.history[-1]["loss"] < 0.3 * result.history[0]["loss"]


def test_the_decoders_loss_is_refused() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    with pytest.raises(ValueError, match=r"no loss of an encoder \(SequenceClassifier\)"):
        train(make(), [batch], TrainConfig(epochs=1))
