"""Logits, loss and gradients of every family equal transformers', padded, packed or plain."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.oracle


@pytest.mark.column("logits")
def test_logits(
    family: str,
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
) -> None:
    ours, theirs, truth, _ = make_pair(family)
    ids = draw()
    with torch.no_grad():
        within(*(m(ids).logits for m in (ours, theirs, truth)))
