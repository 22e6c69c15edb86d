"""What completions that share their prompt's computation save, in time and in memory.

    python -m benchmarks.shared_prompt            # the shipped base under a LoRA; a minute or two
    python -m benchmarks.shared_prompt --smoke    # one small case; seconds

A prompt with its completions is scored forward and backward, as DPO (2 completions) or GRPO (a
group) does it: as branches of one row (lora_core/data/branches.py), and as a row each. Nothing is
timed before both give the same log-probabilities and the same gradients to rounding. The share of
tokens that is not computed twice is the most that could be saved; the mask that keeps branches
apart costs some of it.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from lora_core import LoRAConfig, add_adapter
from lora_core.checkpoint import base_model_path, load_model
from lora_core.data.branches import Branched, branch_batch
from lora_core.objectives.scoring import completion_log_probs
from lora_core.train.batches import to_device

CASES = ((32, 32, 2), (128, 32, 2), (192, 32, 2), (128, 16, 4), (128, 16, 8), (32, 64, 8))
SMOKE = ((12, 4, 2),)
ROWS = 4  # prompts of a batch
WAYS = ("shared", "apart")


def policy(device: torch.device) -> nn.Module:
    """The shipped base under a LoRA that has learned something."""
    torch.manual_seed(0)
    model = load_model(base_model_path(), dtype=torch.float32, device=device)
    add_adapter(model, LoRAConfig(r=16, alpha=32))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def rows(prompt: int, completion: int, each: int, seed: int) -> list[Branched]:
    """Prompts of so many tokens with so many completions of so many."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 4000, (ROWS, prompt + each * completion), generator=draw).tolist()
    return [
        Branched(
            tuple(line[:prompt]),
            tuple(tuple(line[prompt + i * completion :][:completion]) for i in range(each)),
        )
        for line in ids
    ]


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of all completions, and gradients of their sum."""
    found, _ = completion_log_probs(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    return found.detach(), list(torch.autograd.grad(found.sum(), trained))


def check(model: nn.Module, batches: dict[str, dict[str, Tensor]]) -> float:
    """The largest relative difference of gradients; RuntimeError where the two ways differ."""
    (ours, mine), (theirs, other) = (step(model, batches[way]) for way in WAYS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    worst = max(
        float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(mine, other, strict=True)
    )
    if worst > 1e-3:
        raise RuntimeError(f"gradients differ by {worst:.1e}: not timed")
    return worst


def measure(
    model: nn.Module, case: tuple[int, int, int], repeats: int, device: torch.device
) -> dict[str, Any]:
    """One case's row."""
    prompt, completion, each = case
    inputs = {
        way: [
            to_device(branch_batch(rows(*case, seed), shared=way == "shared"), device)
            for seed in range(3)
        ]
        for way in WAYS
    }
    worst = check(model, {way: inputs[way][0] for way in WAYS})
    run = functools.partial(step, model)
    timed = harness.time_in_turns(dict.fromkeys(WAYS, run), inputs, repeats)
    peaks = {way: harness.peak_allocation(functools.partial(run, inputs[way][0])) for way in WAYS}
    tokens = {way: int(inputs[way][0]["attention_mask"].sum()) for way in WAYS}
    return {
        "prompt": prompt,
        "completion": completion,
        "completions": each,
        "tokens": tokens["shared"] / tokens["apart"],
        "time": timed["shared"].median / timed["apart"].median,
        "memory": peaks["shared"] / peaks["apart"],
        "seconds": timed["apart"].median,
        "gradients_differ": worst,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_prompt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="one small case; nothing is recorded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    model = policy(device)
    print(harness.machine())
    print(f"{'prompt':>7} {'answer':>7} {'answers':>8} {'tokens':>7} {'time':>6} {'memory':>7}")
    found = []
    for case in SMOKE if args.smoke else CASES:
        row = measure(model, case, 2 if args.smoke else 9, device)
        print(
            f"{row['prompt']:7} {row['completion']:7} {row['completions']:8} "
            f"{row['tokens']:7.2f} {row['time']:6.2f} {row['memory']:7.2f}"
        )
        found.append({"benchmark": "shared_prompt", **row, "machine": harness.machine()})
    print("shared / apart: tokens computed, seconds, peak bytes of forward and backward")
    if not args.smoke:
        harness.record(harness.results_file(), found)


if __name__ == "__main__":
    main()
