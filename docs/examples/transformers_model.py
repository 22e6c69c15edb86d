"""A transformers model: 4-bit weights, a LoRA and a bottleneck adapter, PEFT reads the LoRA.

$ python docs/examples/transformers_model.py        (needs transformers and peft)
"""

import copy

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core import (
    BottleneckConfig,
    LoRAConfig,
    add_adapter,
    dequantize_model,
    quantize_model,
    save_adapter,
    set_adapters,
)

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
print(quantize_model(base))
model = copy.deepcopy(base)

# counting upwards from a random start, modulo the vocabulary
ids = (torch.randint(0, 64, (32, 1)) + torch.arange(16)) % 64


def fit(steps: int) -> None:
    """Train the adapter that is trainable."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"  step {step + 1}: loss {loss.item():.3f}")


print(add_adapter(model, LoRAConfig(r=8, alpha=16), name="lora"))
fit(30)
print(add_adapter(model, BottleneckConfig(reduction=4, placement="parallel"), name="bottleneck"))
fit(30)
model.eval()

set_adapters(model, "lora")
save_adapter(model, "lora-adapter", name="lora")
save_adapter(model, "bottleneck-adapter", name="bottleneck")
dequantize_model(base)  # PEFT on the weights that the adapter was trained on
theirs = PeftModel.from_pretrained(base.eval(), "lora-adapter")
with torch.no_grad():
    difference = (theirs(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
print(f"PEFT's logits differ from ours by at most {difference:.1e}")
