"""A plain MLP: pretrain, quantize to 4 bits, adapt with LoRA to a changed task, merge.

$ python docs/examples/mlp.py
"""

import torch
from torch import nn

import lora_core as lora


def task(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Points x in the square and sin(3 x0 + shift) + x1 squared."""
    x = torch.rand(512, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return x, torch.sin(3 * x[:, :1] + shift) + x[:, 1:].square()


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float) -> float:
    """Train whatever is trainable; return the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)]
    return nn.Sequential(*layers)


model = build()
print(f"pretrained on the first task: loss {fit(model, *task(0.0), steps=300, lr=0.01):.5f}")
weights = model.state_dict()
lora.quantize_model(model, skip=["4"])  # the last layer stays dense
x, y = task(1.0)
print(f"second task, before: loss {nn.functional.mse_loss(model(x), y):.5f}")

print(lora.add_adapter(model, lora.LoRAConfig(r=4, alpha=8, rank_pattern={"0": 2, "4": 1})))
print(f"second task, adapted: loss {fit(model, x, y, steps=300, lr=0.02):.5f}")
with lora.disable_adapters(model):
    print(f"second task, disabled: loss {nn.functional.mse_loss(model(x), y):.5f}")

lora.save_adapter(model, "mlp-adapter")
fresh = build()
fresh.load_state_dict(weights)
lora.quantize_model(fresh, skip=["4"])
lora.load_adapter(fresh, "mlp-adapter")
print(f"reloaded, same outputs: {torch.equal(fresh(x), model(x))}")
before = model(x)
lora.merge_adapters(model)
print(f"merged, largest difference: {(model(x) - before).abs().max():.1e}")
