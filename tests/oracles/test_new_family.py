"""The family that docs/extending.md adds: under 30 lines, and equal to transformers'."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_core.checkpoint import load_model
from lora_core.models import families

pytestmark = pytest.mark.oracle
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def test_a_family_in_under_30_lines(oracle: Callable[[str], ModuleType], tmp_path: Path) -> None:
    transformers = oracle("transformers")
    section = PAGE.read_text(encoding="utf-8").split("## A family of models")[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    assert len(block[1].strip().splitlines()) < 30
    known = dict(families.FAMILIES)
    try:
        families.FAMILIES.pop("olmo3", None)
        exec(compile(block[1], str(PAGE), "exec"), {})
        torch.manual_seed(0)
        config = transformers.Olmo3Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=7,
            eos_token_id=None,
            pad_token_id=None,
        )
        theirs = transformers.Olmo3ForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        theirs.save_pretrained(tmp_path)
        ours = load_model(tmp_path)
        ids = torch.randint(97, (2, 21))
        with torch.no_grad():
            found, wanted = ours(ids).logits, theirs(ids).logits
            truth = theirs.double()(ids).logits
        error, own = (found - truth).abs().max(), (wanted - truth).abs().max()
        assert error <= 2 * own + 2 * torch.finfo(torch.float32).eps * truth.abs().max()
    finally:
        families.FAMILIES.clear()
        families.FAMILIES.update(known)


def test_a_name_that_is_taken() -> None:
    family = families.FAMILIES["olmo2"]
    with pytest.raises(ValueError, match="'olmo2' is known already"):
        families.register_family("olmo2", family)
    with pytest.raises(ValueError, match="Olmo2ForCausalLM' is 'olmo2' already"):
        families.register_family("olmo9", family)
    with pytest.raises(ValueError, match="norm must be one of llama, gemma, wide; got other"):
        families.Family("X", norm="other")
