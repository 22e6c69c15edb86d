"""Adapters: small trainable modules beside frozen ones, and how they get into a model.

the contract          adapter, host, layers, config
in and out            inject, switch, adapter_report, tokens (ties, growing a vocabulary)
LoRA's family         lora, lora_linear, lora_config, forms (layers of every kind), dora, starts
                      (PiSSA, OLoRA, LoftQ), biases, full (copies of modules), mixed_groups
bottlenecks           bottleneck, adapterhub
soft prompts          soft, soft_call (the hooks), prompt, prefix, ptuning
many on one base      rows, row_stacks, combine, ties, swap
into the weight       merge, merge_layer, merge_report, merge_samples
looking and turning   spectrum, update, truncate, convert (any linear update to LoRA)
"""

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.adapter_report import AdapterReport, adapter_report, parameter_counts
from lora_core.adapters.adapterhub import AdapterHubConfig
from lora_core.adapters.bottleneck import BottleneckAdapter, BottleneckConfig
from lora_core.adapters.combine import CombineReport, LayerCombination, combine_adapters
from lora_core.adapters.config import AdapterConfig, register_adapter
from lora_core.adapters.convert import convert_to_lora, extract_lora
from lora_core.adapters.host import Adapted, adapted_modules
from lora_core.adapters.inject import add_adapter, delete_adapter
from lora_core.adapters.layers import dense_weight, is_linear
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.adapters.lora_linear import LoRALinear
from lora_core.adapters.merge import (
    LayerMerge,
    MergeReport,
    merge_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters.prefix import PrefixTuningConfig
from lora_core.adapters.prompt import PromptTuningConfig
from lora_core.adapters.ptuning import PTuningConfig
from lora_core.adapters.rows import adapter_rows
from lora_core.adapters.spectrum import LayerSpectrum, SpectrumReport, adapter_spectrum
from lora_core.adapters.switch import active_names, adapter_names, disable_adapters, set_adapters
from lora_core.adapters.tokens import TrainableTokens, grow_vocabulary
from lora_core.adapters.truncate import ConversionReport, LayerConversion

__all__ = [
    "Adapted",
    "Adapter",
    "AdapterConfig",
    "AdapterHubConfig",
    "AdapterReport",
    "BottleneckAdapter",
    "BottleneckConfig",
    "CombineReport",
    "ConversionReport",
    "LayerCombination",
    "LayerConversion",
    "LayerMerge",
    "LayerSpectrum",
    "LoRA",
    "LoRAConfig",
    "LoRALinear",
    "MergeReport",
    "PTuningConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SpectrumReport",
    "TrainableTokens",
    "active_names",
    "adapted_modules",
    "adapter_names",
    "adapter_report",
    "adapter_rows",
    "adapter_spectrum",
    "add_adapter",
    "combine_adapters",
    "convert_to_lora",
    "delete_adapter",
    "dense_weight",
    "disable_adapters",
    "extract_lora",
    "grow_vocabulary",
    "is_linear",
    "merge_adapters",
    "parameter_counts",
    "register_adapter",
    "set_adapters",
    "unload_adapters",
    "unmerge_adapters",
]
