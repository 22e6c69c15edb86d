"""PEFT's files about heads: ties that are kept in training, targets inside a copied head."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, adapted_modules, add_adapter
from lora_core.checkpoint import load_adapter, save_adapter

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers"),
]

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 49, 10, 11, 0]])
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def peft(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("peft")


@pytest.fixture
def tied() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def classifier() -> nn.Module:
    """A model whose head has a layer called as those of the body are: 'dense'."""
    import transformers

    config = transformers.RobertaConfig(**SIZES, num_hidden_layers=1, num_labels=3)
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config).eval()


def shake(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in parameters:
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


def tell(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(got: Tensor, model: nn.Module) -> bool:
    """Within twice a model's own error, and two roundings of its largest value."""
    y, truth = tell(model), tell(copy.deepcopy(model).double())
    own = (y.double() - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max()
    return bool((got.double() - truth).abs().max() <= 2 * own)


def written(peft: ModuleType, base: nn.Module, directory: Path, **options: Any) -> nn.Module:
    """PEFT's adapter, trained and saved."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **options)).eval()
    shake(model.parameters())
    model.save_pretrained(directory)
    return model


def there_and_back(peft: ModuleType, base: nn.Module, directory: Path, theirs: nn.Module) -> None:
    """What PEFT wrote is read here, and what is then written here PEFT reads."""
    ours = copy.deepcopy(base)
    load_adapter(ours, directory, untie=True)
    assert not close(tell(base), ours)
    assert close(tell(theirs), ours)
    save_adapter(ours, directory / "again")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory / "again").eval()
    assert close(tell(read), ours)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
        {"target_modules": ["value", "key"], "exclude_modules": ["0.attention.self.value"]},
    ],
    ids=["dense", "all-linear", "biases", "excluding"],
)
def test_a_copied_head(
    options: dict[str, Any], classifier: nn.Module, peft: ModuleType, tmp_path: Path
) -> None:
    there_and_back(peft, classifier, tmp_path, written(peft, classifier, tmp_path, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=["embedding copied", "head copied", "embedding", "head"],
)
def test_ties_that_training_kept(
    options: dict[str, Any], tied: nn.Module, peft: ModuleType, tmp_path: Path
) -> None:
    """Both modules are in the file: equal outputs. To train them on as one is refused."""
    theirs = written(peft, tied, tmp_path, ensure_weight_tying=True, **options)
    there_and_back(peft, tied, tmp_path, theirs)
    with pytest.raises(ValueError, match=r"ensure_weight_tying=True trains '.*' and '.*' as"):
        load_adapter(tied, tmp_path, trainable=True, untie=True)
    assert not list(adapted_modules(tied))


def test_token_rows_of_a_tied_head(tied: nn.Module, peft: ModuleType, tmp_path: Path) -> None:
    rows = {"lm_head": [4, 9]}
    written(peft, tied, tmp_path, target_modules=["q_proj"], trainable_token_indices=rows)
    with pytest.raises(ValueError, match="token rows of 'lm_head' alone"):
        load_adapter(tied, tmp_path)
    ours = copy.deepcopy(tied)
    add_adapter(ours, LoRAConfig(r=2, targets=["q_proj"], trainable_token_indices=rows))
    shake(p for _, host in adapted_modules(ours) for p in host.adapters.parameters())
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(tied), tmp_path / "ours").eval()
    assert not close(tell(tied), ours)
    assert close(tell(read), ours)
