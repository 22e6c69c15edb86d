"""The public names: a list that changes only on purpose."""

import ast
from itertools import pairwise
from pathlib import Path

import lora_core

# CONTRACT's names that exist so far; later ones join this list when they are built
CONTRACT = [
    "BottleneckAdapter",
    "BottleneckConfig",
    "LoRAConfig",
    "LoRALinear",
    "NF4Linear",
    "PTuningConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SFTDataset",
    "TrainConfig",
    "adapter_state_dict",
    "adapter_rows",
    "add_adapter",
    "base_model_path",
    "combine_adapters",
    "delete_adapter",
    "disable_adapters",
    "generate",
    "linear_cross_entropy",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "masked_cross_entropy",
    "merge_adapters",
    "quantize_4bit",
    "quantize_model",
    "quantize_nf4",
    "save_adapter",
    "set_adapters",
    "train",
    "unload_adapters",
    "unmerge_adapters",
]
BESIDES = [
    "Adapted",
    "Adapter",
    "CausalLM",
    "LoRA",
    "ModelConfig",
    "NF4Tensor",
    "TrainResult",
    "adapter_report",
    "adapter_spectrum",
    "convert_to_lora",
    "dequantize_model",
    "export_adapter",
    "extract_lora",
    "grow_vocabulary",
    "load_adapterhub",
    "perplexity",
    "register_adapter",
    "save_adapterhub",
    "save_model",
    "swap_adapter",
]


def test_the_list_is_pinned() -> None:
    assert lora_core.__all__ == sorted([*CONTRACT, *BESIDES])


def test_every_public_name_has_a_docstring() -> None:
    for name in lora_core.__all__:
        assert getattr(lora_core, name).__doc__, name


def test_every_paper_that_the_code_cites_is_listed() -> None:
    root = Path(lora_core.__file__).parents[1]
    listed = (root / "docs" / "references.md").read_text()
    cited: dict[str, str] = {}
    for folder in (root / "lora_core", root / "kernels"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    words = node.value.replace(":", " ").replace("(", " ").replace(")", " ").split()
                    for before, word in pairwise(words):
                        if before.lower() == "arxiv":
                            cited.setdefault(word.strip(".,;"), path.name)
    assert len(cited) > 8
    assert {k: v for k, v in cited.items() if k not in listed} == {}
