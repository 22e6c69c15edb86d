"""`lora-core quantize`: write a model with its linear layers in 4 bits, in bitsandbytes' format."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lora_core.checkpoint import load_model, save_model
from lora_core.cli.merge import probe_logits
from lora_core.cli.opening import fit_notes, resident_dtype
from lora_core.data import load_tokenizer
from lora_core.quant import NF4Linear

HELP = "write a model with its linear layers in 4 bits, in bitsandbytes' format"
EXAMPLE = "lora-core quantize --model DIR --out DIR-nf4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", metavar="DIR", required=True, help="Hugging Face folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; must be new")
    parser.add_argument("--code", choices=["nf4", "fp4"], default="nf4", help="4-bit code [nf4]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Quantize as it loads, write, load again, compare."""
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder for the quantized model")
    dtype = resident_dtype(torch.device("cpu"))
    tok = load_tokenizer(args.model)
    ids = tok.encode("def add(a, b):\n    return a + b\n")
    original = load_model(args.model, dtype=dtype)
    for note in fit_notes(original, tok):
        print(f"note: {note}", file=sys.stderr)
    dense = probe_logits(original, ids)
    del original
    model = load_model(args.model, quantize=args.code)
    save_model(model, out, source=args.model, quantized=True)
    again = load_model(out, dtype=dtype)
    layers = [module for module in again.modules() if isinstance(module, NF4Linear)]
    bits = sum(8 * layer.quantized.nbytes for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    got = probe_logits(again, ids)
    facts: dict[str, Any] = {
        "out": str(out),
        "layers": len(layers),
        "bits_per_weight": bits / weights,
        "bytes_before": _weights_bytes(Path(args.model)),
        "bytes_after": _weights_bytes(out),
        "logit_rms_error": (got - dense).square().mean().sqrt().item(),
        "logit_rms": dense.square().mean().sqrt().item(),
    }
    if args.json:
        print(json.dumps(facts))
        return 0
    print(
        f"wrote {out}: {facts['layers']} layers at {facts['bits_per_weight']:.3f} bits a weight, "
        f"{facts['bytes_before'] / 1e6:.1f} MB -> {facts['bytes_after'] / 1e6:.1f} MB on disk"
    )
    print(
        f"logits of {len(ids)} tokens: rms error {facts['logit_rms_error']:.3g} of "
        f"{facts['logit_rms']:.3g}"
    )
    return 0


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
