"""A small model with heads, and tasks for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import LoRAConfig, add_adapter
from lora_core.data.task_rows import TaskData
from lora_core.models.multi_head import MultiHead
from lora_core.models.task_heads import Head, HeadShape

VOCABULARY = 40


@pytest.fixture
def tasks() -> dict[str, TaskData]:
    """Which of two texts it is, whether a token is even, and where the highest token stands."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in [6, 9] * 6]
    kind = [{"input_ids": ids, "label": int(ids[-1] > 20)} for ids in texts]
    parity = [{"input_ids": ids, "labels": [i % 2 for i in ids]} for ids in texts[:8]]
    spans = []
    for ids in texts[:4]:
        at = ids.index(max(ids))
        spans.append({"input_ids": ids, "start": at, "end": at})
    made: Any = TaskData
    return {
        "kind": made("kind", "sequence", ["low", "high"], kind),
        "parity": made("parity", "token", ["even", "odd"], parity),
        "peak": made("peak", "span", [], spans),
    }


@pytest.fixture
def multi_head(
    small_decoder: Callable[..., nn.Module], tasks: dict[str, TaskData]
) -> Callable[..., MultiHead]:
    """The same model with heads each time: with a new adapter, unless told otherwise."""

    def make(adapter: bool = True) -> MultiHead:
        torch.manual_seed(0)
        backbone = small_decoder(hidden_size=32, num_hidden_layers=2)
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        heads = {
            name: Head(HeadShape(kind=task.kind, labels=tuple(task.labels)), 32)
            for name, task in tasks.items()
        }
        model = MultiHead(backbone, heads)
        if adapter:
            add_adapter(model.backbone, LoRAConfig(r=2, targets=["q_proj", "v_proj"]))
        return model

    return make
