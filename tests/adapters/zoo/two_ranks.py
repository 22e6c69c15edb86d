"""One of the two processes of test_distributed.py: gradients of its shard, alone and averaged.

The test itself is rank 0, so that only rank 1 has to start a Python and import PyTorch.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_core.adapters import BottleneckConfig, LoRAConfig, add_adapter


class Reader(nn.Module):
    """An embedding, a linear layer, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mix(self.embed(ids)))))


ROWS = {"embed": [1, 4]}
CONFIGS = {
    "lora and rows": LoRAConfig(r=2, targets=["mix"], trainable_token_indices=ROWS),
    "dora": LoRAConfig(r=2, targets=["mix"], use_dora=True, bias="all"),
    "full": LoRAConfig(r=2, targets=["mix"], modules_to_save=["norm"]),
    "bottleneck": BottleneckConfig(2, feed_forward=["mix"]),
}


def run(rank: int, config: object) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Reader()
    add_adapter(model, config)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    shard = torch.tensor([[1, 4, 5], [2, 4, 1]])[rank]
    (model(shard).square().mean() * (1 + rank)).backward()
    own = {k: p.grad.clone() for k, p in trained.items()}
    model.zero_grad()
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (wrapped(shard).square().mean() * (1 + rank)).backward()
        if step == 0:
            ddp = {k: p.grad.clone() for k, p in trained.items()}
        optimizer.step()
    return {"own": own, "ddp": ddp, "after": {k: p.detach() for k, p in trained.items()}}


def join(rank: int, folder: Path) -> None:
    """Be a rank: meet the other in the folder, and leave the results there."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=3)
    )
    try:
        results = {key: run(rank, config) for key, config in CONFIGS.items()}
        torch.save(results, folder / f"{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    join(int(sys.argv[1]), Path(sys.argv[2]))
