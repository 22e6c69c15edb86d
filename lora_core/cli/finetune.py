"""`lora-core finetune`: a Hugging Face folder and JSONL in, a trained and verified adapter out.

The work is `lora_core.runs.finetune`; here its settings are read and its result is told. `run.json`
holds every setting, so `--config run.json` repeats the run.
"""

import argparse
import json

from lora_core.cli.finetune_flags import add_arguments, settings
from lora_core.runs import FinetuneConfig, finetune
from lora_core.train.ranks import RankError, joined_ranks

__all__ = ["EXAMPLE", "HELP", "add_arguments", "run"]

HELP = "train an adapter (or a whole model) on JSONL conversations"
EXAMPLE = "lora-core finetune --model DIR --data chats.jsonl --out runs/mine --method qlora --r 16"


def _folder_flag(config: FinetuneConfig) -> str:
    """The flag by which the result is opened."""
    return f"--{'model' if config.method == 'full' else 'adapter'} {config.out}"


def run(args: argparse.Namespace) -> int:
    """Train, and say where the result lies."""
    chosen = settings(args)
    config = chosen.config
    try:
        with joined_ranks() as ranks:
            done = finetune(config, chosen.adapter, chosen.training, chosen.options)
    except RankError as error:
        if error.speaks:
            raise
        return 1  # another process says why
    code = 130 if done.result.interrupted else 0
    if not ranks.first:
        return code
    last = done.result.history[-1] if done.result.history else {}
    facts = {
        "out": config.out,
        "method": config.method,
        "objective": config.objective,
        "steps": done.result.steps,
        "tokens": done.result.tokens,
        "loss": last.get("loss"),
        "best_eval_loss": done.result.best_loss,
        "tokens_per_second": done.result.tokens_per_second,
        "peak_memory": done.result.peak_memory,
        "interrupted": done.result.interrupted,
    }
    if args.json:
        print(json.dumps(facts))
    else:
        print(f"{config.method}: {done.result.steps} steps; the result is in {config.out}")
        if config.objective == "heads":
            print(f"  try:   lora-core generate {_folder_flag(config)} --label FILE.jsonl")
        elif config.objective == "reward":
            print(f"  use:   lora-core finetune --objective ppo --reward {config.out} …")
        elif config.method != "full":
            print(f"  try:   lora-core generate --adapter {config.out} --prompt '…'")
        if config.method in ("lora", "qlora") and config.objective not in ("heads", "reward"):
            print(f"  merge: lora-core merge --adapter {config.out} --out {config.out}-merged")
    return code
