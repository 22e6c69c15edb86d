"""`lora-core quickstart`: the whole path on the model that ships with the package.

The base was pretrained on the text of Python's standard library and has seen no JSON answer. The
task is to read what `help()` prints about a function and to answer with a JSON object: its module,
name and first sentence. QLoRA learns it from some two thousand functions; what is printed is
measured on functions that were held out. Everything goes through the same code as
`lora-core finetune`, `merge` and `generate`, and every file stays in `--out`.
"""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from lora_core.adapters import LoRAConfig
from lora_core.checkpoint import base_model_path, load_model
from lora_core.cli.merge import merged_folder, probe_logits
from lora_core.data import load_tokenizer
from lora_core.data.stdlib import HELD_OUT_FILE, TRAIN_FILE, write_function_task
from lora_core.evaluate.function_task import MAX_LENGTH, Judged, judge
from lora_core.runs import FinetuneConfig, finetune, open_model
from lora_core.train import TrainConfig

HELP = "the whole path on the model that ships with the package, in minutes"
EXAMPLE = "lora-core quickstart --out quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--out", metavar="DIR", default="quickstart", help="[quickstart]")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps [300]")
    parser.add_argument("--held-out", type=int, default=64, help="functions to judge by [64]")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training [0]")
    parser.add_argument("--force", action="store_true", help="replace an earlier quickstart in DIR")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def folder_bytes(path: Path) -> int:
    """Bytes of a folder's files, its sub-folders left out."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def run(args: argparse.Namespace) -> int:
    """Take every step of the path and print what it gave."""
    out, began = Path(args.out), time.perf_counter()
    if out.exists() and any(out.iterdir()):
        if not args.force:
            raise ValueError(f"{out} is not empty: --force replaces it, or choose another --out")
        shutil.rmtree(out)
    base = base_model_path()
    print(f"1. data: questions about the functions of the standard library → {out / 'data'}")
    kept, held = write_function_task(out / "data", args.held_out, args.seed)
    print(f"   {len(kept)} functions to train on, {len(held)} held out")

    print("2. base model, quantized to NF4 with double quantization as it loads")
    tok = load_tokenizer(base)
    quantized = load_model(base, quantize="nf4", dtype=torch.float32)
    before = judge(quantized, tok, held, out / "data" / HELD_OUT_FILE)
    _print_judged("   before", before)

    print("3. QLoRA: rank 16 on every linear layer")
    done = finetune(
        FinetuneConfig(
            model=str(base),
            data=(str(out / "data" / TRAIN_FILE),),
            out=str(out / "adapter"),
            method="qlora",
            eval_fraction=0.0125,
            max_length=MAX_LENGTH,
        ),
        LoRAConfig(r=16, alpha=32),
        TrainConfig(
            out=out / "adapter",
            lr=4e-3,  # twenty times the usual rate: the model is a thousandth of the usual size
            steps=args.steps,
            batch_size=8,
            accumulate=1,
            eval_every=max(args.steps // 3, 1),
            seed=args.seed,
        ),
    )
    after = judge(done.model, tok, held, out / "data" / HELD_OUT_FILE)
    _print_judged("   before", before)
    _print_judged("   after ", after)
    for row, was, now in list(zip(held, before.answers, after.answers, strict=True))[:2]:
        print(f"   {row['module']}.{row['name']}")
        print(f"     before: {was[:100]!r}")
        print(f"     after:  {now}")

    print("4. the adapter, loaded into a fresh model")
    ids = tok.encode(json.dumps(held[0]["messages"]))
    wanted = probe_logits(done.model.eval(), ids)
    fresh = open_model(None, out / "adapter")
    same = torch.equal(probe_logits(fresh.model, ids), wanted)
    print(f"   logits of {len(ids)} tokens: {'the same, bit for bit' if same else 'DIFFERENT'}")

    print("5. merged into a Hugging Face folder")
    merged_folder(fresh, out / "merged", torch.float32)
    merged = load_model(out / "merged", dtype=torch.float32)
    difference = (probe_logits(merged, ids) - wanted).abs().max().item()
    print(f"   logits differ by at most {difference:.2g} of {wanted.abs().max().item():.3g}")

    facts = {
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
        "reload_bit_equal": same,
        "merge_largest_difference": difference,
        "attached": done.report,
        "steps": done.result.steps,
        "tokens_per_second": done.result.tokens_per_second,
        "peak_memory": done.result.peak_memory,
        "bytes": {
            "base": folder_bytes(base),
            "adapter": (out / "adapter" / "adapter_model.safetensors").stat().st_size,
            "merged": folder_bytes(out / "merged"),
        },
        "seconds": time.perf_counter() - began,
    }
    (out / "quickstart.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False))
    _print_files(out, facts)
    if args.json:
        print(json.dumps(facts))
    return 0 if same else 1


def _print_judged(label: str, judged: Judged) -> None:
    print(
        f"{label}: valid JSON {judged.valid_json:.0%} · right module {judged.right_module:.0%} · "
        f"all three right {judged.right_answer:.0%} · perplexity {judged.perplexity:.3f}"
    )


def _print_files(out: Path, facts: dict[str, Any]) -> None:
    sizes = {name: f"{count / 1e6:.1f} MB" for name, count in facts["bytes"].items()}
    print(
        f"6. base {sizes['base']}, adapter {sizes['adapter']}, merged {sizes['merged']} (float32)"
    )
    print(f"   {facts['attached'].splitlines()[-1]}")
    for path in ("adapter/adapter_model.safetensors", "adapter/metrics.jsonl", "adapter/run.json"):
        print(f"   {out / path}")
    if (out / "adapter" / "loss.png").exists():
        print(f"   {out / 'adapter' / 'loss.png'}")
    print(f"   {out / 'merged'}/  {out / 'quickstart.json'}")
    print(
        f"   {facts['seconds']:.0f} s in all; training {facts['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {facts['peak_memory'] / 1e9:.2f} GB"
    )
    print(f"   next: lora-core generate --adapter {out / 'adapter'} --prompt '…'")
