"""One of the processes that test_ranks.py starts: runs what it is told and writes what came of it.

python ranks_script.py OUT '[{"name": "a", "kind": "lora", "config": {…}, "stop": 7}, …]'
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.checkpoint import adapter_state_dict
from lora_core.models import CausalLM, ModelConfig
from lora_core.quant import quantize_model
from lora_core.train import CausalLoss, TrainConfig, TrainResult, folder, state, train
from lora_core.train.ranks import joined_ranks

SIZES = {
    "vocab_size": 41,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_model(kind: str, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A two-layer decoder with a LoRA, its base dense or in 4 bits with doubly quantized scales."""
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(**SIZES))
    model.init_weights(0.2)
    if kind == "qlora":
        quantize_model(model)
    if kind == "full":
        return model
    add_adapter(model, LoRAConfig(r=4, alpha=8, dropout=dropout))
    return model


def make_rows(count: int = 21) -> list[dict[str, Any]]:
    """Rows of different lengths from two sources: 11 batches of two, the last of one."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        ids = torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "source": "ab"[number % 2]})
    return rows


def run(case: dict[str, Any], out: Path | None) -> tuple[nn.Module, TrainResult, dict[str, Any]]:
    """Train as a case says; also what was seen of the model on the way."""
    model = make_model(case["kind"], case.get("dropout", 0.0))
    seen: dict[str, Any] = {}

    def hook(record: dict[str, Any]) -> None:
        if record["step"] == 1:
            parts = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
            seen["bytes"] = sum(part.nbytes for part in parts)
            seen["kinds"] = sorted({type(p).__name__ for p in model.parameters()})
            seen["scales"] = {str(p.dtype) for n, p in model.named_parameters() if "scale" in n}
        if record["step"] == case.get("stop") and os.environ.get("RANK", "1") == "1":
            raise KeyboardInterrupt

    settings = {"steps": 20, "batch_size": 2, "lr": 1e-2, "progress": False, "out": out}
    settings |= {"eval_every": 10}
    config = TrainConfig(**{**settings, **case["config"]})
    rows = make_rows()
    result = train(model, rows, config, rows[:5], hook)
    return model, result, seen


def report(case: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """What a case came to."""
    before = {k: v.clone() for k, v in make_model(case["kind"]).state_dict().items()}
    if case.get("fails"):
        return {"error": failing(case["fails"], case, out)}
    model, result, seen = run(case, out)
    after = model.state_dict()
    frozen = [k for k in before if "lora" not in k and ".adapters." not in k]
    return {
        "history": result.history,
        "interrupted": result.interrupted,
        "best": result.best_step,
        "weights": adapter_state_dict(model) if case["kind"] != "full" else after,
        "same_names": list(before) == list(after),
        "same_base": all(torch.equal(before[k], after[k]) for k in frozen),
        "types": sorted({type(m).__name__ for m in model.modules()}),
        **seen,
    }


def failing(how: str, case: dict[str, Any], out: Path | None) -> str:
    """Fail on one rank in some way; the error as this rank sees it."""
    mine = os.environ.get("RANK")
    if how == "nan" and mine == "1":
        graded = CausalLoss.__call__
        CausalLoss.__call__ = lambda *args: tuple(t * float("nan") for t in graded(*args))
    if how == "disk" and mine == "0":

        def full(path: Path, tensors: object) -> None:
            raise OSError(f"cannot write {path.name}: no space left")

        state.write_tensors = full
    try:
        run(case, out)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main() -> None:
    """Run the cases in their order, all in one joined run."""
    torch.set_num_threads(1)
    folder.plot_loss = lambda history, path: None  # drawing takes longer than the run it shows
    root, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with joined_ranks() as ranks:
        for case in cases:
            out = root / case["out"] if "out" in case else None
            found = report(case, out)
            torch.save(found, root / f"{case['name']}.{ranks.rank}.pt")


if __name__ == "__main__":
    main()
