"""The internals of LoRA and QLoRA, by hand, in PyTorch.

Adapters, 4-bit weights, losses, a training loop and what surrounds them; docs/ has a page on each.
Importing this package needs torch alone: tokenizers, safetensors, jinja2, numpy and tqdm are
imported by the functions that use them.
"""

from lora_core.adapters import (
    Adapted,
    Adapter,
    BottleneckAdapter,
    BottleneckConfig,
    LoRA,
    LoRAConfig,
    LoRALinear,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    adapter_report,
    adapter_rows,
    adapter_spectrum,
    add_adapter,
    combine_adapters,
    convert_to_lora,
    delete_adapter,
    disable_adapters,
    extract_lora,
    grow_vocabulary,
    merge_adapters,
    register_adapter,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.checkpoint import (
    adapter_state_dict,
    base_model_path,
    export_adapter,
    load_adapter,
    load_adapterhub,
    load_model,
    save_adapter,
    save_adapterhub,
    save_model,
    swap_adapter,
)
from lora_core.data import SFTDataset, load_tokenizer
from lora_core.evaluate import perplexity
from lora_core.losses import linear_cross_entropy, masked_cross_entropy
from lora_core.models import CausalLM, ModelConfig, generate
from lora_core.quant import (
    NF4Linear,
    NF4Tensor,
    dequantize_model,
    quantize_4bit,
    quantize_model,
    quantize_nf4,
)
from lora_core.train import TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Adapter",
    "BottleneckAdapter",
    "BottleneckConfig",
    "CausalLM",
    "LoRA",
    "LoRAConfig",
    "LoRALinear",
    "ModelConfig",
    "NF4Linear",
    "NF4Tensor",
    "PTuningConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SFTDataset",
    "TrainConfig",
    "TrainResult",
    "adapter_report",
    "adapter_rows",
    "adapter_spectrum",
    "adapter_state_dict",
    "add_adapter",
    "base_model_path",
    "combine_adapters",
    "convert_to_lora",
    "delete_adapter",
    "dequantize_model",
    "disable_adapters",
    "export_adapter",
    "extract_lora",
    "generate",
    "grow_vocabulary",
    "linear_cross_entropy",
    "load_adapter",
    "load_adapterhub",
    "load_model",
    "load_tokenizer",
    "masked_cross_entropy",
    "merge_adapters",
    "perplexity",
    "quantize_4bit",
    "quantize_model",
    "quantize_nf4",
    "register_adapter",
    "save_adapter",
    "save_adapterhub",
    "save_model",
    "set_adapters",
    "swap_adapter",
    "train",
    "unload_adapters",
    "unmerge_adapters",
]
