"""`lora-core quantize`: write a model with its linear layers in 4 bits, in bitsandbytes' format.

Weights are quantized as they are read, so that the 4-bit model is all that is ever in memory; but
comparing its logits with the original's takes the original whole, once before it, which
`--no-compare` spares. Encoders have no logits of a next token, and are written without.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.checkpoint import load_model, save_model
from lora_core.cli.merge import probe_logits
from lora_core.data import load_tokenizer
from lora_core.device import resident_dtype
from lora_core.models import ModelConfig, read_config
from lora_core.quant import NF4Linear, NF4Stack, NF4Tensor
from lora_core.runs.opening import fit_notes

HELP = "write a model with its linear layers in 4 bits, in bitsandbytes' format"
EXAMPLE = "lora-core quantize --model DIR --out DIR-nf4"
PROBE = "def add(a, b):\n    return a + b\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--model", metavar="DIR", required=True, help="Hugging Face folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; must be new")
    parser.add_argument("--code", choices=["nf4", "fp4"], default="nf4", help="4-bit code [nf4]")
    parser.add_argument(
        "--no-compare",
        action="store_true",
        help="do not compare logits with the original's, which takes it whole in memory",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Quantize as it loads, write, load again, compare."""
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder for the quantized model")
    config = read_config(args.model)
    compares = not args.no_compare and isinstance(config, ModelConfig)
    dtype, ids = resident_dtype(torch.device("cpu")), []
    if compares:
        tok = load_tokenizer(args.model)
        for note in fit_notes(config.vocab_size, tok):
            print(f"note: {note}", file=sys.stderr)
        ids = tok.encode(PROBE)
    dense = probe_logits(load_model(args.model, dtype=dtype), ids) if compares else None
    model = load_model(args.model, quantize=args.code)
    save_model(model, out, source=args.model, quantized=True)
    del model  # before the next one: of a large one there is no room for two
    again = load_model(out, dtype=dtype)
    layers = [weight for module in again.modules() for weight in _matrices(module)]
    bits = sum(8 * weight.nbytes for weight in layers)
    weights = sum(weight.shape.numel() for weight in layers)
    facts: dict[str, Any] = {
        "out": str(out),
        "layers": len(layers),
        "bits_per_weight": bits / weights,
        "bytes_before": _weights_bytes(Path(args.model)),
        "bytes_after": _weights_bytes(out),
    }
    facts |= {} if dense is None else _errors(probe_logits(again, ids), dense)
    if args.json:
        print(json.dumps(facts))
        return 0
    print(
        f"wrote {out}: {facts['layers']} layers at {facts['bits_per_weight']:.3f} bits a weight, "
        f"{facts['bytes_before'] / 1e6:.1f} MB -> {facts['bytes_after'] / 1e6:.1f} MB on disk"
    )
    if dense is not None:
        print(
            f"logits of {len(ids)} tokens: rms error {facts['logit_rms_error']:.3g} of "
            f"{facts['logit_rms']:.3g}"
        )
    return 0


def _matrices(module: nn.Module) -> list[NF4Tensor]:
    """The 4-bit weights that a module itself holds: a layer's one, or stacked experts' many."""
    if isinstance(module, NF4Stack):
        return [module[number] for number in range(len(module))]
    return [module.quantized] if isinstance(module, NF4Linear) else []


def _errors(got: Tensor, wanted: Tensor) -> dict[str, float]:
    return {
        "logit_rms_error": (got - wanted).square().mean().sqrt().item(),
        "logit_rms": wanted.square().mean().sqrt().item(),
    }


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
