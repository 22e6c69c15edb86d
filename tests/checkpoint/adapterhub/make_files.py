"""Writes the folders beside it, with the library they are for; the tests only read them.

In an environment of its own, since the library needs an older transformers than the other tests:

    pip install torch "adapters==1.3.0"
    python tests/checkpoint/adapterhub/make_files.py

A folder has what the library saved, `<family>-<configuration>/`, and `logits.safetensors` what its
model then returned in float64, by folder; "<family>" alone is the model without an adapter.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
IDS = torch.tensor([[3, 7, 1, 12, 5], [2, 2, 9, 4, 10]])
SIZES = {
    "vocab_size": 13,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "bert": ("BertConfig", "BertForMaskedLM", {"intermediate_size": 12}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"intermediate_size": 12}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_inner": 12}),
}


def waves(model: nn.Module, only: str = "") -> None:
    """Fill parameters with numbers that need no random generator: sines, by name."""
    for name, parameter in model.named_parameters():
        if only in name:
            start = sum(name.encode())
            values = (
                torch.arange(parameter.numel(), dtype=torch.float64) * (1 + start % 7 / 9) + start
            )
            norm = parameter.dim() == 1 and name.endswith("weight")
            filled = 0.4 * values.sin() + (1.0 if norm else 0.0)
            parameter.data.copy_(filled.view(parameter.shape))


def tiny(family: str) -> nn.Module:
    """A model of two layers."""
    import transformers

    config, kind, sizes = FAMILIES[family]
    config = getattr(transformers, config)(**SIZES, **sizes)
    model = getattr(transformers, kind)(config).eval()
    waves(model)
    return model


def logits(model: nn.Module) -> Tensor:
    """In float64; the model is left in float64."""
    with torch.no_grad():
        return model.double()(input_ids=IDS).logits


def main() -> None:
    """Write everything."""
    import adapters
    from safetensors.torch import save_file

    settings = {
        "seq_bn": adapters.SeqBnConfig(reduction_factor=3),
        "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
        "par_bn": adapters.ParBnConfig(),
        "both": adapters.SeqBnConfig(
            mh_adapter=True, reduction_factor={"0": 2, "default": 4}, non_linearity="gelu"
        ),
        "learned": adapters.ParBnConfig(
            mh_adapter=True, leave_out=[0], scaling="learned", non_linearity="leakyrelu"
        ),
        "normed": adapters.SeqBnConfig(
            original_ln_after=False,
            residual_before_ln=False,
            scaling="channel",
            non_linearity="gelu_new",
        ),
    }
    outputs = {}
    for family in FAMILIES:
        outputs[family] = logits(tiny(family))
        for name, config in settings.items():
            model = tiny(family)
            adapters.init(model)
            model.add_adapter("task", config=config)
            model.set_active_adapters("task")
            waves(model, only=".task.")
            folder = HERE / f"{family}-{name}"
            model.eval().save_adapter(folder, "task", with_head=False, use_safetensors=True)
            outputs[folder.name] = logits(model)
    save_file(outputs, HERE / "logits.safetensors")


if __name__ == "__main__":
    main()
